"""Bound the condition numbers of weights after a step of the optimizer."""

from collections.abc import Iterable

import torch
from torch import Tensor

from tscnc_kernels._checks import check_kernels, check_number


@torch.no_grad()
def clamp_condition_number_(weights: Tensor | Iterable[Tensor], tau: float = 1.5) -> None:
    """Clamp singular values into a band around their mean, in place, so that κ ≤ τ.

    W = U Σ Vᵀ becomes U Σ' Vᵀ with σ' = σ clamped to [m (1 − d), m (1 + d)], m the mean of the σ
    and d = (τ − 1) / (τ + 1). Call it after `optimizer.step()`, as `clip_grad_norm_` before it. A
    pruned weight loses its zeros; `condition_number_penalty` keeps them.

    Args:
        weights: a tensor or several, each (rows, cols) or an (out, in, …) convolution kernel that
            counts as (out, in·…), float32, float64, bfloat16 or float16.
        tau: the largest condition number, in [1, 1e15]; 1 makes all singular values equal.

    Raises:
        ValueError: no weights, fewer than two dimensions, tau out of range, or a weight with NaN or
            infinite entries. No weight is changed then.
        TypeError: not tensors, or a dtype that is not supported.

    Source: Savostianova, Zangrando, Ceruti, Tudisco, arXiv 2306.01485 (CondLR).
    """
    tensors = [weights] if isinstance(weights, Tensor) else list(weights)
    check_kernels("weights", tensors)
    check_number("tau", tau, 1)
    for index, weight in enumerate(tensors):
        if not weight.isfinite().all():
            raise ValueError(f"expected finite weights, got NaN or infinity in weights[{index}]")
    width = (tau - 1) / (tau + 1)
    for weight in tensors:
        matrix = weight.flatten(1).double()
        tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
        u, s, vh = torch.linalg.svd(tall, full_matrices=False)
        mean = s.mean()
        clamped = (u * s.clamp(mean * (1 - width), mean * (1 + width))) @ vh
        clamped = clamped if matrix.shape[0] >= matrix.shape[1] else clamped.mT
        weight.copy_(clamped.reshape(weight.shape))
