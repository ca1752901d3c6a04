"""Matrices (B, N) of samples whose features lie B apart, with strides (1, B)."""

import torch
from torch import Tensor


def is_feature_major(matrix: Tensor) -> bool:
    """Whether the samples (rows) of a feature lie next to each other, and not its features."""
    return not matrix.is_contiguous() and matrix.stride(0) == 1


def new_matrix(like: Tensor, shape: tuple[int, int], feature_major: bool) -> Tensor:
    """An uninitialised matrix of `like`'s dtype and device."""
    return like.new_empty(shape[::-1]).t() if feature_major else like.new_empty(shape)


def in_layout(matrix: Tensor, feature_major: bool) -> Tensor:
    """A row-major matrix, or its feature-major copy."""
    return matrix.t().contiguous().t() if feature_major else matrix


def feature_major_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of a matrix, with a feature-major result."""
    if bias is None:
        return (weight @ input.t()).t()
    return torch.addmm(bias[:, None], weight, input.t()).t()
