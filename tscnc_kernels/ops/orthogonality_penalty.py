"""Orthogonality penalties SO and SRIP over a list of weight matrices.

Formulas, with G the Gram matrix of the small side and σ_1 ≥ … ≥ σ_r the singular values:

    so      ‖G − I‖_F² = Σ (σ_i² − 1)²
    srip    ‖G − I‖₂   = max(|σ_1² − 1|, |σ_r² − 1|)

Both are 0 exactly where the small side is orthonormal. The published code of SRIP takes one power
step from a random vector and penalises its squared length, which depends on the draw and reaches
neither end; here both ends come from `extreme_singular_values` and the value is exact.

With patterns W is W∘M; SRIP leaves dead rows and columns out and takes r as the structural rank. In
SO they add a constant, which no gradient sees.

Source: Bansal, Chen, Wang, arXiv 1810.09102.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from tscnc_kernels._checks import check_kernels, check_patterns
from tscnc_kernels.ops.extreme_singular_values import extreme_singular_values
from tscnc_kernels.sparsity import SparsityPattern

Form = Literal["so", "srip"]
Patterns = Sequence[SparsityPattern | None]


def _check(matrices: Sequence[Tensor], patterns: Patterns | None, form: str) -> None:
    check_kernels("matrices", matrices)
    if patterns is not None:
        check_patterns(patterns, matrices)
    if form not in get_args(Form):
        raise ValueError(f'expected form to be "so" or "srip", got {form!r}')


def _soft(matrix: Tensor, pattern: SparsityPattern | None) -> Tensor:
    if pattern is not None:
        matrix = torch.where(pattern.mask.reshape(matrix.shape), matrix, 0)
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT
    gram = tall.mT @ tall
    return (gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).square().sum()


def _spectral(matrices: list[Tensor], patterns: Patterns | None, state: Tensor | None) -> Tensor:
    rank: Literal["full", "structural"] = "full" if patterns is None else "structural"
    found = extreme_singular_values(matrices, patterns, state, rank=rank)
    ends = [(end.square() - 1).abs() for end in (found.sigma_max, found.sigma_min)]
    # A matrix that is pruned whole has no end.
    return torch.where(found.rank > 0, torch.maximum(*ends), 0).sum()


def orthogonality_penalty(
    matrices: Sequence[Tensor],
    patterns: Patterns | None = None,
    state: Tensor | None = None,
    *,
    form: Form = "srip",
) -> Tensor:
    """Sum of ‖G − I‖_F² (SO) or ‖G − I‖₂ (SRIP) over a list of matrices, G the smaller Gram matrix.

    Args:
        matrices: list of L (rows, cols) tensors of any shapes, float32, float64, bfloat16 or
            float16, on one device. An (out, in, …) convolution kernel counts as the matrix (out,
            in·…), not as the operator of `conv_singular_values`.
        patterns: one SparsityPattern or None per matrix: the penalty is that of W∘M.
        state: warm start of "srip", the `state` of an `extreme_singular_values` call on the same
            list (convolutions flattened); "so" ignores it.
        form: "so" or "srip".

    Returns:
        0-d tensor, float64 if any matrix is, else float32. NaN or infinite weights give NaN ("so"
        may be infinite).

    Raises:
        ValueError: empty list, shapes or devices that do not fit, unknown form.
        TypeError: not a list of floating tensors, or patterns that are not SparsityPatterns.

    Autograd: any order for "so", to second order for "srip". Autocast changes nothing.

    Source: arXiv 1810.09102.
    """
    _check(matrices, patterns, form)
    exact = any(matrix.dtype == torch.float64 for matrix in matrices)
    dtype = torch.float64 if exact else torch.float32
    flat = [matrix.flatten(1).to(dtype) for matrix in matrices]
    if form == "srip":
        return _spectral(flat, patterns, state)
    given = [None] * len(flat) if patterns is None else patterns
    with torch.autocast(flat[0].device.type, enabled=False):
        terms = [_soft(matrix, pattern) for matrix, pattern in zip(flat, given, strict=True)]
    return torch.stack(terms).sum()
