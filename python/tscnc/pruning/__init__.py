"""Unstructured pruning: scores, layer-wise quotas, masks, and what they are worth in effect."""

from tscnc.pruning import quotas, scores
from tscnc.pruning.layers import prunable
from tscnc.pruning.masks import hydra_scores, masks_from_scores

__all__ = ["hydra_scores", "masks_from_scores", "prunable", "quotas", "scores"]
