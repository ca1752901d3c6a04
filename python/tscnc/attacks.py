"""Adversarial examples: a threat model, one projected-gradient loop, and the TRADES loss.

Inputs are images with values in [0, 1]; every point an attack visits after its start stays there
and in the ball.

Source: Madry et al., arXiv 1706.06083 (PGD); Zhang et al., arXiv 1901.08573 (TRADES).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]

# TRADES starts its inner maximisation at a small Gaussian step, because the gradient of the
# divergence is 0 at the input.
_TRADES_START_SCALE = 1e-3


@dataclass(frozen=True)
class ThreatModel:
    """The perturbations an attacker may use: a ball of radius `epsilon` in norm `"Linf"` or `"L2"`.

    Raises:
        ValueError: another norm, or a radius that is negative or not finite.
    """

    norm: str
    epsilon: float

    def __post_init__(self) -> None:
        if self.norm not in ("Linf", "L2"):
            raise ValueError(f"expected the norm 'Linf' or 'L2', got {self.norm!r}")
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise ValueError(f"expected a finite epsilon >= 0, got {self.epsilon!r}")

    def project(self, adversarial: Tensor, input: Tensor) -> Tensor:
        """Returns the point of the ball around `input`, and of [0, 1], nearest to `adversarial`.

        For `"Linf"` this is exact. For `"L2"` the ball comes first and [0, 1]
        second: clamping towards an input that lies in [0, 1] never leaves the ball.
        """
        delta = adversarial - input
        if self.norm == "Linf":
            delta = delta.clamp(-self.epsilon, self.epsilon)
        else:
            delta = delta * (self.epsilon / _norm(delta).clamp_min(1e-12)).clamp_max(1.0)
        return (input + delta).clamp(0.0, 1.0)

    def step(self, adversarial: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """Returns `adversarial` moved by `step_size` along this norm's steepest ascent."""
        if self.norm == "Linf":
            return adversarial + step_size * gradient.sign()
        return adversarial + step_size * gradient / _norm(gradient).clamp_min(1e-12)

    def random_start(self, input: Tensor, generator: torch.Generator | None) -> Tensor:
        """Returns a point drawn uniformly from the ball around `input`, then clamped to [0, 1]."""
        if self.norm == "Linf":
            noise = 2 * _draw(torch.rand, input.shape, input, generator) - 1
            return self.project(input + self.epsilon * noise, input)
        direction = _draw(torch.randn, input.shape, input, generator)
        radius = _draw(torch.rand, input.shape[:1], input, generator)
        radius = radius ** (1 / max(1, input[0].numel())) if len(input) else radius
        radius = radius.reshape(-1, *[1] * (input.ndim - 1))
        delta = self.epsilon * radius * direction / _norm(direction).clamp_min(1e-12)
        return self.project(input + delta, input)


def pgd(
    model: nn.Module,
    input: Tensor,
    target: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    step_size: float,
    generator: torch.Generator | None,
    loss: Loss = F.cross_entropy,
    start: Tensor | None = None,
) -> Tensor:
    """Computes adversarial examples by projected gradient ascent.

    A step is x ← project(x + step_size · direction(∇ₓ loss)).

    Args:
        model: maps (N, …) images to (N, classes) logits; its parameters receive no gradient.
        input: (N, …) float tensor of images in [0, 1].
        target: what `loss` compares the logits with, e.g. (N,) int64 labels.
        threat: the allowed perturbations.
        steps: number of steps, >= 0.
        step_size: length of a step in the threat's norm, > 0.
        generator: source of the random start; torch's global one if None.
        loss: function of (logits, target) to increase.
        start: first point, projected before use; a random point of the ball if None.

    Returns:
        (N, …) tensor like `input`, in the ball and in [0, 1], detached.

    Raises:
        ValueError: negative steps, a step size that is not positive, or inputs outside [0, 1].
    """
    if steps < 0 or not step_size > 0:
        raise ValueError(f"expected steps >= 0 and step_size > 0, got {steps} and {step_size}")
    if input.numel() and not (input.min() >= 0 and input.max() <= 1):
        raise ValueError(
            f"expected inputs in [0, 1], got values from {input.min():.4g} to {input.max():.4g}"
        )
    if start is None:
        adversarial = threat.random_start(input, generator)
    else:
        adversarial = threat.project(start, input)
    with _frozen(model):
        for _ in range(steps):
            adversarial = adversarial.detach().requires_grad_(True)
            with torch.enable_grad():
                value = loss(model(adversarial), target)
            (gradient,) = torch.autograd.grad(value, adversarial)
            adversarial = threat.project(
                threat.step(adversarial.detach(), gradient, step_size), input
            )
    return adversarial.detach()


def trades_loss(
    model: nn.Module,
    input: Tensor,
    target: Tensor,
    threat: ThreatModel,
    *,
    beta: float,
    steps: int,
    step_size: float,
    generator: torch.Generator | None,
) -> dict[str, Tensor]:
    """Computes the TRADES loss CE(f(x), y) + β · KL(f(x) ‖ f(x')) / N.

    x' maximises the divergence within the threat model, from x plus a Gaussian step of scale 1e-3.

    Args:
        model: maps (N, …) images to (N, classes) logits.
        input: (N, …) float tensor of images in [0, 1].
        target: (N,) int64 labels.
        threat: the allowed perturbations.
        beta: weight of the divergence.
        steps: steps of the inner maximisation.
        step_size: length of such a step.
        generator: source of the Gaussian start; torch's global one if None.

    Returns:
        `loss` and its parts `natural` and `robust` (the divergence before β), scalars; `output`,
        the (N, classes) clean logits.

    Source: arXiv 1901.08573, eq. (5).
    """
    with torch.no_grad():
        clean = F.log_softmax(model(input), dim=1)
    noise = _draw(torch.randn, input.shape, input, generator)
    adversarial = pgd(
        model,
        input,
        clean,
        threat,
        steps=steps,
        step_size=step_size,
        generator=generator,
        loss=divergence,
        start=input + _TRADES_START_SCALE * noise,
    )
    output = model(input)
    natural = F.cross_entropy(output, target)
    robust = divergence(model(adversarial), F.log_softmax(output, dim=1))
    return {
        "loss": natural + beta * robust,
        "natural": natural,
        "robust": robust,
        "output": output,
    }


def divergence(logits: Tensor, log_target: Tensor) -> Tensor:
    """Computes KL(p ‖ softmax(logits)) averaged over the batch, for p given by its logarithm."""
    return F.kl_div(
        F.log_softmax(logits, dim=1), log_target, reduction="batchmean", log_target=True
    )


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Switches the parameters' gradients off: the attack's backward needs only the input's."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _draw(
    source: Callable[..., Tensor],
    shape: Sequence[int],
    like: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Draws on the generator's device, so that the same seed attacks the same way everywhere."""
    device = like.device if generator is None else generator.device
    return source(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def _norm(input: Tensor) -> Tensor:
    """Returns the Euclidean norm of every example, shaped to broadcast over it."""
    flat = input.flatten(1) if input.ndim > 1 else input.reshape(-1, 1)
    return flat.norm(dim=1).reshape(-1, *[1] * (input.ndim - 1))
