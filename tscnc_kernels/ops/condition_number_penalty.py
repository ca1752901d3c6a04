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

With `operator` "circular" or "zeros" a kernel counts as the operator that it applies to images, and
log_kappa is that of its extreme singular values (`conv_singular_values`): those of the kernel as a
matrix say nothing of σ_min.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from tscnc_kernels._checks import check_kernels, check_number, check_patterns
from tscnc_kernels.ops.conv_singular_values import conv_singular_values
from tscnc_kernels.ops.extreme_singular_values import extreme_singular_values
from tscnc_kernels.ops.logdet_gram import logdet_gram_float64
from tscnc_kernels.sparsity import SparsityPattern

Form = Literal["scale_invariant", "logdet", "log_kappa", "nenov"]
Operator = Literal["matrix", "circular", "zeros"]
Patterns = Sequence[SparsityPattern | None]
Size = int | Sequence[int]

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


def _check_operator(
    matrices: Sequence[Tensor],
    operator: str,
    form: str,
    state: object,
    lists: Mapping[str, Sequence[object] | None],
) -> None:
    """`lists` holds what goes with every entry of `matrices`: sizes, strides, groups."""
    if operator not in get_args(Operator):
        raise ValueError(f"expected operator to be one of {get_args(Operator)}, got {operator!r}")
    given = [name for name, values in lists.items() if values is not None]
    if operator == "matrix":
        if given:
            raise ValueError(f"{given[0]} belong to convolutions, got operator 'matrix'")
        if state is not None and not isinstance(state, Tensor):
            raise TypeError(f"expected state to be a float64 tensor, got {type(state).__name__}")
        return
    if form != "log_kappa":
        raise ValueError(f"operator {operator!r} has the form 'log_kappa' alone, got form {form!r}")
    if state is not None:
        lists = {**lists, "state": state if isinstance(state, Sequence) else [state]}
    for name, values in lists.items():
        if values is not None and len(values) != len(matrices):
            raise ValueError(
                f"expected {name} to have an entry per matrix, got {len(values)} for "
                f"{len(matrices)} matrices"
            )
    sizes = lists["input_sizes"]
    for index, matrix in enumerate(matrices):
        if matrix.dim() == 4 and (sizes is None or sizes[index] is None):
            raise ValueError(
                f"operator {operator!r} needs the size of the images that matrices[{index}] of "
                f"shape {tuple(matrix.shape)} sees: input_sizes[{index}] is missing"
            )


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


def _live_kernel(kernel: Tensor, pattern: SparsityPattern | None, groups: int) -> Tensor:
    """K∘M, without groups also without the channels that M prunes whole."""
    if pattern is None:
        return kernel
    mask = pattern.mask.reshape(kernel.shape)
    live = torch.where(mask, kernel, 0)
    if groups == 1:
        for dim, others in ((0, (1, 2, 3)), (1, (0, 2, 3))):
            live = live.index_select(dim, mask.sum(dim=others).nonzero().flatten())
    return live


def _log_kappas(
    matrices: Sequence[Tensor],
    patterns: Patterns,
    states: Sequence[Tensor | None],
    operator: Operator,
    tau: float,
    sizes: Sequence[Size | None],
    strides: Sequence[Size],
    groups: Sequence[int],
) -> Tensor:
    """Sum of log κ over operators; what is no (out, in, kh, kw) kernel is a matrix."""
    logs = []
    for index, (matrix, pattern) in enumerate(zip(matrices, patterns, strict=True)):
        state, size = states[index], sizes[index]
        if matrix.dim() != 4 or size is None:
            found = None if pattern is None else [pattern]
            logs.append(_from_singular_values([matrix.flatten(1)], found, state, "log_kappa", tau))
            continue
        kernel = _live_kernel(matrix, pattern, groups[index])
        if kernel.numel() == 0:
            logs.append(matrix[:0].sum().double())
            continue
        padding: Literal["circular", "zeros"] = "zeros" if operator == "zeros" else "circular"
        ends = conv_singular_values(kernel, size, padding, strides[index], groups[index], state)
        if operator == "zeros" and ends.state.dim() == 1:
            raise ValueError(
                f"sigma_min of the zero-padded matrices[{index}] of shape {tuple(matrix.shape)} on "
                f"images of size {size} has no bound, and its condition number none: take "
                f"operator 'circular'"
            )
        ratio = ends.sigma_min.double() / ends.sigma_max.double()
        logs.append(((1 + tau**2) / (ratio.square() + tau**2)).log() / 2)
    return torch.stack(logs).sum()


def condition_number_penalty(
    matrices: Sequence[Tensor],
    patterns: Patterns | None = None,
    state: Tensor | Sequence[Tensor | None] | None = None,
    *,
    form: Form = "scale_invariant",
    ridge: float = 1e-6,
    tau: float = 1e-6,
    repo_compat: bool = False,
    operator: Operator = "matrix",
    input_sizes: Sequence[Size | None] | None = None,
    strides: Sequence[Size] | None = None,
    groups: Sequence[int] | None = None,
) -> Tensor:
    """Sum of a condition-number penalty over a list of matrices.

    scale_invariant: n log(‖W‖_F²/n) − logdet G + n log(1 + ridge); logdet: (logdet(G/n))²;
    log_kappa: log(σ₁/σ_r), floored at tau; nenov: ½ σ₁² − ‖W‖_F²/(2n). All but logdet are 0 where
    all singular values are equal.

    Args:
        matrices: list of L (rows, cols) tensors of any shapes, float32, float64, bfloat16 or
            float16, on one device. An (out, in, …) convolution kernel counts as the matrix (out,
            in·…), unless `operator` says otherwise.
        patterns: one SparsityPattern or None per matrix: the penalty is that of W∘M without dead
            rows and columns. A matrix that is pruned whole adds 0.
        state: warm start for the forms that need singular values, the `state` of an
            `extreme_singular_values` call on the same list (convolutions flattened); the other
            forms ignore it. Operators take a list with the state of each, or None: of a
            `conv_singular_values` call on the kernel without its dead channels, or of
            `extreme_singular_values` of the matrix alone.
        form: which penalty.
        ridge: relative ridge of the Gram matrix in scale_invariant and logdet, in [0, 1e15]. With
            0 a singular matrix costs inf, without a gradient.
        tau: relative floor under σ_r in log_kappa, in [0, 1e15].
        repo_compat: the published (log(1e-5 + det(WᵀW/n)))² in float32 instead of form "logdet".
        operator: "matrix"; or, for form "log_kappa", "circular" or "zeros": every (out, in /
            groups, kh, kw) kernel is the convolution with that padding on images of its input size,
            see `conv_singular_values`. Channels that a pattern prunes whole are left out where
            there is one group. "zeros" is for operators small enough to have a known σ_min.
        input_sizes: for each entry of `matrices` height and width of the images, or one number for
            both; None for one that is no kernel.
        strides: steps of the convolutions, 1 without.
        groups: their numbers of groups, 1 without.

    Returns:
        0-d tensor, float64 if any matrix is, else float32. NaN or infinite weights and, but for
        form "logdet", a matrix of zeros that no pattern prunes give NaN.

    Raises:
        ValueError: empty list, shapes or devices that do not fit, unknown form or operator,
            constants out of range, a kernel's input size that is missing, a zero-padded operator
            whose σ_min is not known, or what `conv_singular_values` raises.
        TypeError: not a list of floating tensors, or patterns that are not SparsityPatterns.

    Autograd: any order for the Gram forms; to second order for the others. Autocast does not change
        the dtype.

    Source: arXiv 2503.20454, 2410.00169; the forms' own notes are in this module's docstring.
    """
    _check(matrices, patterns, form, ridge, tau, repo_compat)
    lists = {"input_sizes": input_sizes, "strides": strides, "groups": groups}
    _check_operator(matrices, operator, form, state, lists)
    exact = any(matrix.dtype == torch.float64 for matrix in matrices)
    dtype = torch.float64 if exact else torch.float32
    if operator != "matrix":
        count = len(matrices)
        return _log_kappas(
            matrices,
            patterns or [None] * count,
            [None] * count if state is None else [*state],
            operator,
            tau,
            input_sizes or [None] * count,
            strides or [1] * count,
            groups or [1] * count,
        ).to(dtype)
    assert state is None or isinstance(state, Tensor)
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
