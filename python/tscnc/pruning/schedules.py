"""Pruning in more than one step: iteratively, or until an effective sparsity is met."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from tscnc.pruning.effective import Mode, effective_masks
from tscnc.pruning.layers import complete_masks
from tscnc.pruning.masks import Quota, masks_from_scores


class Score(Protocol):
    """The signature that all functions of `tscnc.pruning.scores` share."""

    def __call__(
        self,
        model: nn.Module,
        *,
        masks: Mapping[str, Tensor] | None = None,
        batches: Iterable[tuple[Tensor, Tensor]] | None = None,
        example_input: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]: ...


def iterative_masks(
    score: Score,
    model: nn.Module,
    sparsity: float,
    *,
    steps: int = 100,
    quota: Quota = "global",
    masks: Mapping[str, Tensor] | None = None,
    batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    example_input: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Score and prune in steps; after step i of n the fraction (1 - sparsity)^(i / n) is kept.

    Args:
        score: one of `tscnc.pruning.scores`.
        model: the model; it is not changed.
        sparsity: fraction of all weights removed in the end, in [0, 1).
        steps: the number n of steps; SynFlow's authors use 100.
        quota: as in `masks_from_scores`.
        masks: bool masks by name of what is pruned before the first step.
        batches: as the score needs it.
        example_input: as the score needs it.
        generator: as the score needs it.

    Returns:
        A bool mask for every prunable layer, by parameter name.

    Raises:
        TypeError: as raised by the score.
        ValueError: steps below 1, or as raised by the score and `masks_from_scores`.

    Source: Tanaka et al. (arXiv 2006.05467), algorithm 1.
    """
    if steps < 1:
        raise ValueError(f"expected steps >= 1, got {steps}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"expected a sparsity in [0, 1), got {sparsity}")
    data = None if batches is None else list(batches)
    current = complete_masks(model, masks)
    kept = sum(int(mask.sum()) for mask in current.values())
    total = sum(mask.numel() for mask in current.values())
    for step in range(1, steps + 1):
        step_sparsity = sparsity if step == steps else 1 - (1 - sparsity) ** (step / steps)
        if 1 - kept / total > step_sparsity:
            continue  # the given masks are sparser than this step asks for
        scores = score(
            model, masks=current, batches=data, example_input=example_input, generator=generator
        )
        current = masks_from_scores(scores, step_sparsity, quota=quota)
    return current


def masks_for_effective_sparsity(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    sparsity: float,
    example_input: Tensor | None = None,
    *,
    quota: Quota = "global",
    mode: Mode = "exact",
) -> dict[str, Tensor]:
    """Prune as much as an effective sparsity allows.

    The ranking by scores stays fixed and the number of kept weights is bisected, in about log2 P
    evaluations of the effective masks.

    Args:
        model: the model; it is not changed.
        scores: scores of every prunable layer by name, as for `masks_from_scores`.
        sparsity: the effective sparsity that must not be exceeded, in [0, 1).
        example_input: as in `effective_masks`.
        quota: as in `masks_from_scores`.
        mode: as in `effective_masks`.

    Returns:
        The (direct) masks of the fewest kept weights found whose effective sparsity is at most
        `sparsity`.

    Raises:
        TypeError: as in `masks_from_scores` and `effective_masks`.
        ValueError: as in `masks_from_scores` and `effective_masks`; or even the unpruned model
            exceeds the effective sparsity.

    Source: Vysogorets and Kempe (arXiv 2107.02306), section 4.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"expected a sparsity in [0, 1), got {sparsity}")
    total = sum(score.numel() for score in scores.values())

    def masks_keeping(count: int) -> dict[str, Tensor]:
        return masks_from_scores(scores, 1 - count / total, quota=quota)

    def suffices(count: int) -> bool:
        effective = effective_masks(model, masks_keeping(count), example_input, mode)
        active = sum(int(mask.sum()) for mask in effective.values())
        size = sum(mask.numel() for mask in effective.values())
        return active >= (1 - sparsity) * size - 1e-6  # the slack that masks_from_scores allows

    too_few, enough = 0, total
    if not suffices(enough):
        raise ValueError(f"the unpruned model is effectively sparser than {sparsity} already")
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if suffices(middle) else (middle, enough)
    return masks_keeping(enough)
