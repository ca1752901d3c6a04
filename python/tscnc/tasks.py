"""What a training step minimises before the penalties: TRADES, PGD or plain cross-entropy.

A task returns a dictionary with `loss`, `output` (the clean or adversarial logits) and any named
parts; the training loop logs whatever names it gets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tscnc.attacks import ThreatModel, pgd, trades_loss
from tscnc.config import TrainConfig


@dataclass(frozen=True)
class Attack:
    """The attack of a run: its threat model, and how it is carried out in training."""

    threat: ThreatModel
    steps: int
    step_size: float
    generator: torch.Generator


Task = Callable[[nn.Module, Tensor, Tensor, TrainConfig, Attack], dict[str, Tensor]]


def step_size(config: TrainConfig, steps: int) -> float:
    """Returns the configured step size, or 2.5 ε / steps, which reaches every point of the ball."""
    return config.attack_step_size or 2.5 * config.epsilon / steps


def training_attack(config: TrainConfig, generator: torch.Generator) -> Attack:
    """Returns the attack that the training steps of `config` use."""
    return Attack(
        ThreatModel(config.threat, config.epsilon),
        config.attack_steps,
        step_size(config, config.attack_steps),
        generator,
    )


def trades(
    model: nn.Module, input: Tensor, target: Tensor, config: TrainConfig, attack: Attack
) -> dict[str, Tensor]:
    """Computes the TRADES loss; see `tscnc.attacks.trades_loss`."""
    return trades_loss(
        model,
        input,
        target,
        attack.threat,
        beta=config.beta,
        steps=attack.steps,
        step_size=attack.step_size,
        generator=attack.generator,
    )


def adversarial(
    model: nn.Module, input: Tensor, target: Tensor, config: TrainConfig, attack: Attack
) -> dict[str, Tensor]:
    """Computes the cross-entropy at PGD examples (Madry et al., arXiv 1706.06083)."""
    points = pgd(
        model,
        input,
        target,
        attack.threat,
        steps=attack.steps,
        step_size=attack.step_size,
        generator=attack.generator,
    )
    output = model(points)
    return {"loss": F.cross_entropy(output, target), "output": output}


def plain(
    model: nn.Module, input: Tensor, target: Tensor, config: TrainConfig, attack: Attack
) -> dict[str, Tensor]:
    """Computes the cross-entropy at the inputs as they are."""
    output = model(input)
    return {"loss": F.cross_entropy(output, target), "output": output}


TASKS: dict[str, Task] = {"trades": trades, "pgd": adversarial, "plain": plain}
