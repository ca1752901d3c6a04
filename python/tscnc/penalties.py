"""The penalties of the training loss, as one weighted sum.

TSC is the transformed l1 norm Σ (a+1)|w| / (a+|w|) of the weights, CNC the condition number penalty
of their matrices, and weight decay half their sum of squares. Pruned layers contribute through
their kept entries; dead rows and columns are left out of CNC.

Source: TSCNC, arXiv 2503.20454; the forms are documented with
`tscnc_kernels.condition_number_penalty`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tscnc.config import TrainConfig
from tscnc.layers import dense_weight, pattern_of, prunable_layers, stored_weight
from tscnc_kernels import condition_number_penalty, transformed_l1


def penalty_terms(model: nn.Module, config: TrainConfig, step: int) -> dict[str, Tensor]:
    """Computes the weighted penalties of a model's prunable weights.

    Args:
        model: a network whose linear layers are dense or masked.
        config: the weights `tsc`, `cnc`, `weight_decay` and their options; a weight of 0 omits its
            term.
        step: number of the training step; CNC is evaluated where `cnc_every` divides it,
            `cnc_every`-fold, so that its mean over the steps does not depend on how often it is
            evaluated.

    Returns:
        Scalars by name (`tsc`, `cnc`, `weight_decay`), to be added to the loss.
    """
    layers = list(prunable_layers(model).values())
    stored = [stored_weight(layer) for layer in layers]
    terms: dict[str, Tensor] = {}
    if config.weight_decay:
        squares = torch.stack([weight.square().sum() for weight in stored])
        terms["weight_decay"] = 0.5 * config.weight_decay * squares.sum()
    if config.tsc:
        terms["tsc"] = config.tsc * transformed_l1(stored, a=config.tsc_a)
    if config.cnc and step % config.cnc_every == 0:
        matrices = [dense_weight(layer) for layer in layers]
        patterns = [pattern_of(layer) for layer in layers]
        penalty = condition_number_penalty(matrices, patterns, form=config.cnc_form)
        terms["cnc"] = config.cnc * config.cnc_every * penalty
    return terms
