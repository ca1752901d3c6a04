"""From scores to masks: keep the best-scored weights, an exact number of them."""

import itertools
import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from tscnc.pruning import quotas

Quota = Literal["igq", "erk", "uniform", "uniform_plus", "global"]

_QUOTAS: dict[str, quotas.Quota] = {
    "igq": quotas.igq,
    "erk": quotas.erk,
    "uniform": quotas.uniform,
    "uniform_plus": quotas.uniform_plus,
}


def masks_from_scores(
    scores: Mapping[str, Tensor], sparsity: float, *, quota: Quota = "igq"
) -> dict[str, Tensor]:
    """Masks that keep the weights of highest score.

    Of P weights exactly ceil((1 - sparsity) P) are kept, never fewer, at least one. ``"global"``
    ranks all weights together; the other quotas give each layer its share, rounded down or up so
    that the total is exact (largest remainders first). Of equal scores the earlier weight is kept.

    Args:
        scores: score tensors of the weights' shapes, by name; -inf marks weights that are already
            pruned and must stay so.
        sparsity: fraction of all weights to remove, in [0, 1).
        quota: how the kept weights are divided among the layers.

    Returns:
        A bool mask per name, on its score's device. Deterministic.

    Raises:
        ValueError: no scores, an empty score, NaN, an unknown quota, a sparsity outside [0, 1), or
            a layer that has to keep more weights than are left of it.
        TypeError: a score is not a floating-point tensor.
    """
    _check(scores, sparsity, quota)
    total = sum(score.numel() for score in scores.values())
    # With a little slack: (1 - 0.99) * 100 is 1.0000000000000009, which must not become 2.
    kept = max(1, math.ceil((1 - sparsity) * total - 1e-6))
    if quota == "global":
        return _keep_globally(scores, kept)
    densities = _QUOTAS[quota]([tuple(score.shape) for score in scores.values()], sparsity)
    sizes = [score.numel() for score in scores.values()]
    counts = _apportion([d * n for d, n in zip(densities, sizes, strict=True)], sizes, kept)
    return {
        name: _keep_best(score.detach().flatten(), count, name).view(score.shape)
        for (name, score), count in zip(scores.items(), counts, strict=True)
    }


def hydra_scores(weight: Tensor) -> Tensor:
    """The initial importance scores of HYDRA, sqrt(6 / fan_in) · W / max|W|.

    Args:
        weight: (out, in, ...) float tensor; fan_in is the product of all dimensions but the first.

    Returns:
        Scores of the weight's shape and dtype, detached; zeros for a weight that is all zero.

    Raises:
        ValueError: fewer than two dimensions, an empty weight, or a weight that is not finite.

    Source: Sehwag et al., "HYDRA: Pruning Adversarially Robust Neural Networks" (NeurIPS 2020).
    """
    if weight.dim() < 2 or weight.numel() == 0:
        raise ValueError(
            f"expected a non-empty weight of shape (out, in, ...), got {tuple(weight.shape)}"
        )
    largest = weight.detach().abs().max()
    if not torch.isfinite(largest):
        raise ValueError(f"expected a finite weight, got a largest magnitude of {largest.item()}")
    scale = math.sqrt(6 / weight[0].numel())
    return scale * weight.detach() / largest.where(largest > 0, torch.ones_like(largest))


def _check(scores: Mapping[str, Tensor], sparsity: float, quota: str) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"expected a sparsity in [0, 1), got {sparsity}")
    if quota != "global" and quota not in _QUOTAS:
        raise ValueError(f"unknown quota {quota!r}, expected one of {', '.join(_QUOTAS)}, global")
    if not scores:
        raise ValueError("expected the scores of at least one layer, got none")
    for name, score in scores.items():
        if not score.is_floating_point():
            raise TypeError(f"expected floating-point scores for {name!r}, got {score.dtype}")
        if score.numel() == 0:
            raise ValueError(f"expected scores for {name!r}, got shape {tuple(score.shape)}")
        if score.isnan().any():
            raise ValueError(f"expected scores without NaN for {name!r}")


def _apportion(targets: list[float], sizes: list[int], total: int) -> list[int]:
    """Whole numbers next to the targets, at most the sizes, that add up to the total."""
    counts = [min(int(target + 1e-9), size) for target, size in zip(targets, sizes, strict=True)]
    remainders = [target - count for target, count in zip(targets, counts, strict=True)]
    by_remainder = sorted(range(len(targets)), key=lambda layer: -remainders[layer])
    missing = total - sum(counts)
    for layer in itertools.cycle(by_remainder):
        if missing == 0:
            break
        if counts[layer] < sizes[layer]:
            counts[layer] += 1
            missing -= 1
    return counts


def _keep_best(scores: Tensor, count: int, name: str) -> Tensor:
    """A flat mask of the `count` highest scores; the stable sort prefers the earlier of equals."""
    available = int((scores > -math.inf).sum())
    if count > available:
        raise ValueError(
            f"the sparsity asked for keeps {count} weights of {name}, but only {available} of "
            f"{scores.numel()} are not pruned yet"
        )
    best = torch.sort(scores, descending=True, stable=True).indices[:count]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[best] = True
    return mask


def _keep_globally(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    device = next(iter(scores.values())).device
    ranked = torch.cat([s.detach().flatten().to(device, torch.float64) for s in scores.values()])
    mask = _keep_best(ranked, count, "all layers")
    parts = torch.split(mask, [score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape).to(score.device)
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }
