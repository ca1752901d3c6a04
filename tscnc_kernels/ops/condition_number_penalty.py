"""Condition-number penalties over a list of weight matrices: the CNC term of the training loss.

Formulas, with n = min(rows, columns), σ₁ ≥ … ≥ σ_n the singular values, G the Gram matrix of the
small side plus the ridge ε · (tr G / n) · I (see `logdet_gram`), and t = τ σ₁:

    scale_invariant   n log(‖W‖_F² / n) − logdet G + n log(1 + ε)     ≥ 0, 0 where all σ are equal
    logdet            (logdet(G / n))²
    log_kappa         ½ log((σ₁² + t²) / (σ_r² + t²))                 log κ, floored at κ = 1/τ
    nenov             ½ σ₁² − ‖W‖_F² / (2 n)                          ≥ 0, 0 where all σ are equal

With patterns W is W∘M without its dead rows and columns, n the smaller side of what is left, and r
the structural rank of the mask; without, r = n. The floor is differentiated through: ∂σ₁ = σ_r² /
(σ₁ (σ_r² + t²)), ∂σ_r = −σ_r / (σ_r² + t²).

Source: arXiv 2503.20454: `logdet` with repo_compat is the code published with it, log(1e-5 +
det(WᵀW/n))², whose float32 determinant vanishes, and the gradient with it, from about 100 classes
on. `scale_invariant` bounds log κ by half of itself plus log 2 (Guggenheimer, Edelman, Johnson
1995). `nenov`: arXiv 2410.00169.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from tscnc_kernels._checks import check_kernels, check_number, check_patterns
from tscnc_kernels.ops.extreme_singular_values import extreme_singular_values
from tscnc_kernels.ops.logdet_gram import logdet_gram_float64
from tscnc_kernels.sparsity import SparsityPattern

Form = Literal["scale_invariant", "logdet", "log_kappa", "nenov"]
Patterns = Sequence[SparsityPattern | None]

# The constant inside the logarithm of the published code.
_PUBLISHED_OFFSET = 1e-5


def _check(
    matrices: Sequence[Tensor],
    patterns: Patterns | None,
    form: str,
    ridge: float,
    tau: float,
    repo_compat: bool,
) -> None:
    check_kernels("matrices", matrices)
    if patterns is not None:
        check_patterns(patterns, matrices)
    if form not in get_args(Form):
        raise ValueError(f"expected form to be one of {', '.join(get_args(Form))}, got {form!r}")
    if repo_compat and form != "logdet":
        raise ValueError(f"repo_compat is the published 'logdet' form, got form {form!r}")
    check_number("ridge", ridge, 0)
    check_number("tau", tau, 0)


@torch.compiler.assume_constant_result
def _live_lines(pattern: SparsityPattern) -> tuple[Tensor | None, Tensor | None]:
    """Indices of the rows and columns with kept entries, None for all. A pattern never changes."""
    found: list[Tensor | None] = []
    for pointers in (pattern.row_pointers, pattern.column_pointers):
        counts = pointers.diff()
        found.append(counts.nonzero().flatten() if (counts == 0).any() else None)
    return found[0], found[1]


def _live_part(matrix: Tensor, pattern: SparsityPattern | None) -> Tensor:
    """W∘M without the rows and columns that M prunes whole."""
    if pattern is None:
        return matrix
    live = torch.where(pattern.mask.reshape(matrix.shape), matrix, 0)
    for dim, lines in enumerate(_live_lines(pattern)):
        if lines is not None:
            live = live.index_select(dim, lines)
    return live


def _squared_norms(matrices: list[Tensor]) -> Tensor:
    return torch.stack([matrix.double().square().sum() for matrix in matrices])


def _small_sides(matrices: list[Tensor]) -> Tensor:
    sides = [float(min(matrix.shape)) for matrix in matrices]
    return torch.tensor(sides, dtype=torch.float64, device=matrices[0].device)


def _published(matrix: Tensor) -> Tensor:
    tall = matrix.float() if matrix.shape[0] >= matrix.shape[1] else matrix.float().mT
    with torch.autocast(matrix.device.type, enabled=False):
        gram = tall.mT @ tall / tall.shape[1]
    return (_PUBLISHED_OFFSET + torch.linalg.det(gram)).log().square()


def _from_gram(matrices: list[Tensor], form: Form, ridge: float, repo_compat: bool) -> Tensor:
    if repo_compat:
        return torch.stack([_published(matrix) for matrix in matrices]).sum()
    values = logdet_gram_float64(matrices, ridge)
    if form == "logdet":
        return values.square().sum()
    n = _small_sides(matrices)
    # logdet G = values + n log n; both logarithms of n stay with the norm, where they cancel its
    # size.
    return (n * ((_squared_norms(matrices) / n**2).log() + math.log1p(ridge)) - values).sum()


def _from_singular_values(
    matrices: list[Tensor],
    patterns: Patterns | None,
    state: Tensor | None,
    form: Form,
    tau: float,
) -> Tensor:
    found = extreme_singular_values(
        matrices,
        patterns,
        state,
        rank="full" if patterns is None else "structural",
        ends="max" if form == "nenov" else "both",
    )
    largest, smallest = found.sigma_max.double(), found.sigma_min.double()
    live = matrices
    if patterns is not None:
        live = [_live_part(m, p) for m, p in zip(matrices, patterns, strict=True)]
    if form == "nenov":
        return (largest.square() - _squared_norms(live) / _small_sides(live).clamp(min=1)).sum() / 2
    kept = _small_sides(live) > 0
    # The ratio first: squares would overflow or vanish.
    ratio = torch.where(kept, smallest, 1.0) / torch.where(kept, largest, 1.0)
    return ((1 + tau**2) / (ratio.square() + tau**2)).log().sum() / 2


def condition_number_penalty(
    matrices: Sequence[Tensor],
    patterns: Patterns | None = None,
    state: Tensor | None = None,
    *,
    form: Form = "scale_invariant",
    ridge: float = 1e-6,
    tau: float = 1e-6,
    repo_compat: bool = False,
) -> Tensor:
    """Sum of a condition-number penalty over a list of matrices.

    scale_invariant: n log(‖W‖_F²/n) − logdet G + n log(1 + ridge); logdet: (logdet(G/n))²;
    log_kappa: log(σ₁/σ_r), floored at tau; nenov: ½ σ₁² − ‖W‖_F²/(2n). All but logdet are 0 where
    all singular values are equal.

    Args:
        matrices: list of L (rows, cols) tensors of any shapes, float32, float64, bfloat16 or
            float16, on one device. An (out, in, …) convolution kernel counts as the matrix (out,
            in·…), not as the operator of `conv_singular_values`.
        patterns: one SparsityPattern or None per matrix: the penalty is that of W∘M without dead
            rows and columns. A matrix that is pruned whole adds 0.
        state: warm start for the forms that need singular values, the `state` of an
            `extreme_singular_values` call on the same list (convolutions flattened); the other
            forms ignore it.
        form: which penalty.
        ridge: relative ridge of the Gram matrix in scale_invariant and logdet, in [0, 1e15]. With
            0 a singular matrix costs inf, without a gradient.
        tau: relative floor under σ_r in log_kappa, in [0, 1e15].
        repo_compat: the published (log(1e-5 + det(WᵀW/n)))² in float32 instead of form "logdet".

    Returns:
        0-d tensor, float64 if any matrix is, else float32. NaN or infinite weights and, but for
        form "logdet", a matrix of zeros that no pattern prunes give NaN.

    Raises:
        ValueError: empty list, shapes or devices that do not fit, unknown form, constants out of
            range.
        TypeError: not a list of floating tensors, or patterns that are not SparsityPatterns.

    Autograd: any order for the Gram forms; to second order for the others. Autocast does not change
        the dtype.

    Source: arXiv 2503.20454, 2410.00169; the forms' own notes are in this module's docstring.
    """
    _check(matrices, patterns, form, ridge, tau, repo_compat)
    exact = any(matrix.dtype == torch.float64 for matrix in matrices)
    dtype = torch.float64 if exact else torch.float32
    flat = [matrix.flatten(1).to(dtype) for matrix in matrices]
    if form in ("log_kappa", "nenov"):
        return _from_singular_values(flat, patterns, state, form, tau).to(dtype)
    if patterns is not None:
        flat = [_live_part(m, p) for m, p in zip(flat, patterns, strict=True)]
    kept = [matrix for matrix in flat if matrix.numel() > 0]
    # The sum of what has no elements is 0, and keeps a list that is pruned whole differentiable.
    total = torch.stack([matrix[:0].sum() for matrix in flat]).sum()
    if kept:
        total = total + _from_gram(kept, form, ridge, repo_compat)
    return total.to(dtype)
