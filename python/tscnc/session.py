"""A training run in memory: what training changes, and how it is saved and restored to the bit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tscnc import models
from tscnc.checkpoint import pack_mask, unpack_mask
from tscnc.config import TrainConfig
from tscnc.data import Dataset
from tscnc.run_folder import RunFolderError
from tscnc_kernels.nn import sparsify

# Each use of randomness has its own stream, so that one of them drawing more does not change the
# others.
_STREAMS = ("weights", "order", "attack", "pruning")


@dataclass(frozen=True)
class Phase:
    """A stretch of a run with its own optimizer and learning rate schedule."""

    name: str
    epochs: int
    lr: float


def phases(config: TrainConfig) -> tuple[Phase, ...]:
    """Returns what a run does, in order; a dense run trains as many epochs as a pruned one."""
    after = config.epochs if config.finetune_epochs is None else config.finetune_epochs
    plan = [Phase("pretrain", config.epochs, config.lr)]
    if config.sparsity:
        plan.append(Phase("prune", 1, config.lr))
    plan.append(Phase("finetune", after, config.finetune_lr or config.lr))
    return tuple(plan)


class Session:
    """The model of a run, its masks and optimizer, the generators, and how far training has come.

    Attributes:
        phase: number of the present phase in `phases(config)`.
        epoch: epochs of that phase that are done.
        masks: bool masks of the pruned weights by parameter name; empty before pruning.
        spectra_before: singular values of every prunable weight just before pruning, by parameter
            name.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset) -> None:
        self.config = config
        self.dataset = dataset
        self.generators = {
            stream: torch.Generator().manual_seed(len(_STREAMS) * config.seed + number)
            for number, stream in enumerate(_STREAMS)
        }
        self.model: nn.Module = models.build(
            config.model,
            dataset.input_shape,
            dataset.num_classes,
            generator=self.generators["weights"],
        )
        self.masks: dict[str, Tensor] = {}
        self.spectra_before: dict[str, Tensor] = {}
        self.start_phase(0)

    def start_phase(self, number: int) -> None:
        """Moves to the start of a phase, with a fresh optimizer."""
        self.phase, self.epoch = number, 0
        self.optimizer = make_optimizer(self.model, self.config)

    def prune(self, masks: dict[str, Tensor]) -> None:
        """Replaces the named layers by masked ones that hold only the kept values."""
        sparsify(self.model, masks, mode="values")
        self.masks = masks
        self.optimizer = make_optimizer(self.model, self.config)

    def state(self) -> dict[str, Any]:
        """Returns everything that `load_state` needs, as tensors and plain values."""
        packed = {name: (list(mask.shape), pack_mask(mask)) for name, mask in self.masks.items()}
        return {
            "config": dataclasses.asdict(self.config),
            "phase": self.phase,
            "epoch": self.epoch,
            "masks": packed,
            "spectra_before": self.spectra_before,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generators": {name: each.get_state() for name, each in self.generators.items()},
        }

    def load_state(self, state: dict[str, Any], *, source: Path) -> None:
        """Restores what `state` returned.

        Raises:
            RunFolderError: the state belongs to another configuration, or is damaged.
        """
        try:
            self._refuse_changed(state["config"], source)
            packed = state["masks"].items()
            masks = {name: unpack_mask(bits, shape) for name, (shape, bits) in packed}
            if masks:
                self.prune(masks)
            self.start_phase(state["phase"])
            self.epoch = state["epoch"]
            self.spectra_before = state["spectra_before"]
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            for name, generator in self.generators.items():
                generator.set_state(state["generators"][name])
        except RunFolderError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise RunFolderError(f"{source} is damaged and cannot be resumed: {error!r}") from error

    def _refuse_changed(self, saved: dict[str, Any], source: Path) -> None:
        changed = self.config.differences(saved)
        if changed:
            raise RunFolderError(
                f"{source} was saved with another configuration: {', '.join(changed)}"
            )


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Returns the optimizer; every step sets its learning rate; weight decay is in the loss."""
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=config.lr, betas=(config.momentum, 0.999))
    return torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0
    )
