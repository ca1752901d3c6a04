"""Unstructured pruning: scores, layer-wise quotas, masks, and what they are worth in effect."""

from tscnc.pruning import quotas, scores
from tscnc.pruning.effective import effective_masks, sparsity_report
from tscnc.pruning.layers import prunable
from tscnc.pruning.masks import hydra_scores, masks_from_scores
from tscnc.pruning.schedules import iterative_masks, masks_for_effective_sparsity

__all__ = [
    "effective_masks",
    "hydra_scores",
    "iterative_masks",
    "masks_for_effective_sparsity",
    "masks_from_scores",
    "prunable",
    "quotas",
    "scores",
    "sparsity_report",
]
