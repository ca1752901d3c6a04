"""What sparse kernels save: seconds of a training step and bytes of a checkpoint, both measured.

The rival of a step is what a pruned network costs in plain torch: a dense weight that every forward
pass multiplies by its mask, under the same loss and the same optimizer.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tscnc.checkpoint import save_checkpoint
from tscnc.config import TrainConfig
from tscnc.data import Dataset
from tscnc.layers import dense_weight, pattern_of, prunable_layers
from tscnc.session import make_optimizer
from tscnc.tasks import TASKS, training_attack
from tscnc_kernels.nn import densify

_SEED = 7
_WARM_UP_STEPS = 2
_FEWEST_PAIRS, _MOST_PAIRS = 5, 21
_SECONDS = 4.0

# A step on one thread whose wall time exceeds its processor time by more shared the processor.
_DISTURBED = 1.1

_Clock = tuple[float, float]  # wall seconds, processor seconds


@dataclass(frozen=True)
class StepTimes:
    """Seconds per training step of two networks, measured in turns.

    Attributes:
        dense_masked: median of dense weights times masks in plain torch.
        ours: median of the masked layers.
        ratio: dense_masked / ours.
        pairs: pairs of steps behind these numbers.
        dropped: pairs left out because other work disturbed them.
        threads: CPU threads of both.
    """

    dense_masked: float
    ours: float
    ratio: float
    pairs: int
    dropped: int
    threads: int


class DenseMaskedLinear(nn.Module):
    """x (W ∘ M)ᵀ + b in plain torch: a dense weight, multiplied by its mask in every forward."""

    def __init__(self, weight: Tensor, mask: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_buffer("mask", mask.to(weight.dtype))

    def forward(self, input: Tensor) -> Tensor:
        """Computes the layer for a (N, in_features) input."""
        return F.linear(input, self.weight * self.get_buffer("mask"), self.bias)


def dense_masked(model: nn.Module) -> nn.Module:
    """Returns a copy of a network with every masked layer as a `DenseMaskedLinear`."""
    twin = copy.deepcopy(model)
    patterns = {name: pattern_of(layer) for name, layer in prunable_layers(twin).items()}
    densify(twin)
    for name, layer in prunable_layers(twin).items():
        pattern = patterns[name]
        if pattern is not None:
            dense = DenseMaskedLinear(
                dense_weight(layer), pattern.mask, getattr(layer, "bias", None)
            )
            parent, _, child = name.removesuffix(".weight").rpartition(".")
            setattr(twin.get_submodule(parent), child, dense)
    return twin


def seconds_per_step(model: nn.Module, dataset: Dataset, config: TrainConfig) -> StepTimes:
    """Measures a training step of a pruned network against its twin in plain torch.

    A step is the configured task on one batch, its backward pass and the optimizer; the penalties
    are left out of both. Both take turns on one thread.

    Args:
        model: a network with masked layers; it is not changed.
        dataset: where the batch comes from.
        config: task, attack, batch size and optimizer.

    Returns:
        Medians over the undisturbed pairs; see `summarize`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        dense = _training_step(dense_masked(model), dataset, config)
        ours = _training_step(copy.deepcopy(model), dataset, config)
        for _ in range(_WARM_UP_STEPS):
            dense(), ours()
        pairs: list[tuple[_Clock, _Clock]] = []
        started = time.perf_counter()
        while len(pairs) < _FEWEST_PAIRS or (
            len(pairs) < _MOST_PAIRS and time.perf_counter() - started < _SECONDS
        ):
            pairs.append((_timed(dense), _timed(ours)))
    finally:
        torch.set_num_threads(threads)
    return summarize(pairs)


def summarize(pairs: list[tuple[_Clock, _Clock]]) -> StepTimes:
    """Returns the medians of pairs of (wall, processor) seconds, disturbed pairs left out.

    Args:
        pairs: a dense-masked step and one of ours; at least one pair. Where fewer than five are
            undisturbed, the five least disturbed count.
    """
    calm = sorted(pairs, key=_disturbance)
    quiet = sum(_disturbance(pair) <= _DISTURBED for pair in pairs)
    used = calm[: max(quiet, _FEWEST_PAIRS)]
    dense, ours = (statistics.median(pair[side][0] for pair in used) for side in (0, 1))
    return StepTimes(
        dense_masked=dense,
        ours=ours,
        ratio=dense / ours,
        pairs=len(used),
        dropped=len(pairs) - len(used),
        threads=1,
    )


def _disturbance(pair: tuple[_Clock, _Clock]) -> float:
    """Returns how many times its processor time a step took, the worse of the two."""
    return max(wall / max(processor, 1e-9) for wall, processor in pair)


def checkpoint_bytes(
    model: nn.Module, masks: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> dict[str, int]:
    """Writes a network's checkpoint with and without its masks and returns the files' sizes.

    Returns:
        Bytes with every weight stored whole, `dense`, and of the checkpoint as it is, `ours`.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
    """
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, kept in (("dense", {}), ("ours", masks)):
            path = Path(folder) / f"{name}.safetensors"
            save_checkpoint(path, model, kept, metadata)
            sizes[name] = path.stat().st_size
    return sizes


def checkpoint_metadata(dataset: Dataset, config: TrainConfig) -> dict[str, Any]:
    """Returns what a checkpoint of a run holds beside the weights."""
    return {
        "config": dataclasses.asdict(config),
        "input_shape": list(dataset.input_shape),
        "num_classes": dataset.num_classes,
    }


def _training_step(model: nn.Module, dataset: Dataset, config: TrainConfig) -> Callable[[], None]:
    """Returns a function that trains `model` for one step, always on the same batch."""
    images = dataset.train_images[: config.batch_size]
    labels = dataset.train_labels[: config.batch_size]
    attack = training_attack(config, torch.Generator().manual_seed(_SEED))
    optimizer = make_optimizer(model, config)
    model.train()

    def step() -> None:
        loss = TASKS[config.task](model, images, labels, config, attack)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def _timed(step: Callable[[], None]) -> _Clock:
    wall, processor = time.perf_counter(), time.thread_time()
    step()
    return time.perf_counter() - wall, time.thread_time() - processor
