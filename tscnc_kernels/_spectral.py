"""What `extreme_singular_values` returns, what it reads of a pattern, its reference's packing."""

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tscnc_kernels.sparsity import SparsityPattern

# Bits of `flags`. CAP_REACHED: the promised error may be missed. SHIFTED and REFACTORED tell how
# the smallest singular value was found: the factor was shifted, or taken from A instead of AᵀA.
RANK_DEFICIENT, SHIFTED, CAP_REACHED, REFACTORED = 1, 2, 4, 8

# Tied singular vectors kept per end.
MAX_TIES = 16
_UNIT = 2.0**-53

# The raw op's outputs: (2, L) sigma, (2, Σ rows) left, (2, Σ cols) right, of `output_dtype`; (2
# MAX_TIES, Σ smaller) block of tied vectors, (4, Σ smaller) state, (L,) rank, (L, 2) residual, (L,)
# flags, (L, 2) ties, (L, 3, 2) bounds, float64 or int64.
Raw = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Bounds(NamedTuple):
    """Certified [lower, upper], each (L, 2) float64; 0 or inf where float64 cannot prove more."""

    sigma_max: Tensor
    sigma_min: Tensor
    kappa: Tensor


class ExtremeSingularValues(NamedTuple):
    """What `extreme_singular_values` returns."""

    sigma_max: Tensor
    sigma_min: Tensor
    u_max: tuple[Tensor, ...]
    v_max: tuple[Tensor, ...]
    u_min: tuple[Tensor, ...]
    v_min: tuple[Tensor, ...]
    rank: Tensor
    residual: Tensor
    flags: Tensor
    state: Tensor
    bounds: Bounds | None


def output_dtype(matrices: Sequence[Tensor]) -> torch.dtype:
    """Of the singular values and vectors of a list."""
    wide = any(matrix.dtype == torch.float64 for matrix in matrices)
    return torch.float64 if wide else torch.float32


def check_state(state: Tensor, matrices: Sequence[Tensor]) -> None:
    """A warm start belongs to matrices of these shapes."""
    shape = (4, sum(min(matrix.shape) for matrix in matrices))
    if not isinstance(state, Tensor) or state.dtype != torch.float64:
        raise TypeError(
            f"expected state to be a float64 tensor, got {getattr(state, 'dtype', type(state))}"
        )
    if tuple(state.shape) != shape or state.device != matrices[0].device:
        raise ValueError(
            f"expected state of shape {shape} on {matrices[0].device} for these matrices, "
            f"got {tuple(state.shape)} on {state.device}"
        )


class PatternIndex(NamedTuple):
    """What the kernels read of a pattern; empty tensors where a matrix has none.

    mask: (rows, cols) bool. structure: structural rank and the flags of live rows and columns, as
    the op `structural_rank` returns them. row_pointers, columns: as `SparsityPattern` has them.
    """

    mask: Tensor
    structure: Tensor
    row_pointers: Tensor
    columns: Tensor


class RawLists(NamedTuple):
    """The raw op's lists, one tensor per matrix each; all but `matrices` empty without patterns."""

    matrices: list[Tensor]
    masks: list[Tensor]
    structures: list[Tensor]
    row_pointers: list[Tensor]
    columns: list[Tensor]


def split_lists(tensors: Sequence[Tensor], count: int) -> RawLists:
    """The lists of a call on `count` matrices, which travel through autograd side by side."""
    starts = range(0, 5 * count, count)
    return RawLists(*(list(tensors[first : first + count]) for first in starts))


_indices: WeakKeyDictionary[SparsityPattern, tuple[Tensor, Tensor]] = WeakKeyDictionary()


def index_of(pattern: SparsityPattern | None, matrix: Tensor) -> PatternIndex:
    """The pattern's index, its mask unpacked and its structure found once per pattern.

    Inside a compiled graph there is nothing to remember them in, and they are found on every call.
    """
    if pattern is None:
        nothing = matrix.new_empty(0, dtype=torch.int32)
        return PatternIndex(nothing.bool(), nothing.long(), nothing, nothing)
    found = None if torch.compiler.is_compiling() else _indices.get(pattern)
    if found is None:
        mask = pattern.mask.reshape(matrix.shape)
        found = mask, _find_structure(mask)
        if not torch.compiler.is_compiling():
            _indices[pattern] = found
    # Patterns of equal masks are equal, on whatever devices they are and of whatever dimensions.
    mask, structure = (part.to(matrix.device) for part in found)
    return PatternIndex(
        mask.reshape(matrix.shape), structure, pattern.row_pointers, pattern.columns
    )


def _find_structure(mask: Tensor) -> Tensor:
    found: Tensor = torch.ops.tscnc_kernels.structural_rank(mask.cpu())
    return found.to(mask.device)


def certified_bounds(w: Tensor, sigma: Tensor, last: Tensor) -> Tensor:
    """(3, 2) bounds of σ_max, σ_min, κ by Cholesky factorisations with rounding charged."""
    tall = w if w.shape[0] >= w.shape[1] else w.mT
    m, n = tall.shape
    gram = tall.mT @ tall
    eye = torch.eye(n, dtype=gram.dtype, device=gram.device)
    squares = gram.trace()
    charge = (m + n + 32) * _UNIT * squares
    off = (m + n + 32) * _UNIT * squares.sqrt()

    def proves(matrix: Tensor) -> Tensor:
        return torch.linalg.cholesky_ex(matrix).info == 0

    zero = torch.zeros_like(squares)
    upper, lower = 1.01 * squares.sqrt(), zero
    for slack in (1e-1, 1e-2, 1e-4, 1e-6):
        trial = sigma[0] * (1 + slack)
        spent = charge + (n + 32) * n * _UNIT * trial**2
        upper = torch.where(proves((trial**2 - spent) * eye - gram), trial.minimum(upper), upper)
    least = torch.maximum(2 * charge, 2e-6 * sigma[1] ** 2)
    for slack in (900.0, 30.0, 1.0):
        square = (sigma[1] ** 2 - slack * least).clamp(min=0)
        proven = (square > 0) & proves(gram - (square + charge) * eye)
        lower = torch.where(proven, square.sqrt(), lower)
    largest = torch.stack([(sigma[0] - off).clamp(min=0), upper * (1 + 4 * _UNIT)])
    # Beside a null space one vector bounds nothing from above.
    above = torch.where(last[0] < n - 1, largest[1], sigma[1] + off)
    smallest = torch.stack([lower * (1 - 4 * _UNIT), above])
    return torch.stack([largest, smallest, (largest / smallest.flip(0)).clamp(min=1)])


def mean_outer_product(tall: Tensor, value: Tensor, svd: Any, tie_tol: float) -> Tensor:
    """Mean of u vᵀ over the values tied with `value`; its derivative is perturbation theory's.

    V is the SVD's V plus its first-order change with A, so that no derivative divides by the
    difference of tied values, which is where differentiating an SVD gives NaN.
    """
    s, v = svd.S, svd.Vh.mT
    tied = (s - value).abs() <= tie_tol * value
    gram = tall.mT @ tall
    gaps = s[None, :] ** 2 - s[:, None] ** 2
    separate = tied[None, :] & ~tied[:, None]
    inverse_gaps = torch.where(separate, 1 / torch.where(separate, gaps, 1.0), 0.0)
    moved = v + v @ ((v.mT @ (gram - gram.detach()) @ v) * inverse_gaps)
    u = tall @ moved
    lengths = torch.where(tied, torch.linalg.vector_norm(u, dim=0), 1.0)
    weights = torch.where(tied & (value > 0), 1 / torch.where(value > 0, lengths, 1.0), 0.0)
    return (u * weights) @ moved.mT / tied.sum().clamp(min=1)


def pack_reference(
    matrices: list[Tensor],
    sigma: Tensor,
    lasts: list[Tensor],
    tie_tol: float,
    certify: bool,
    dtype: torch.dtype,
) -> Raw:
    """The raw op's outputs by float64 SVDs of the masked matrices with the given values."""
    lefts, rights, blocks, residuals, flags, ties, bounds = [], [], [], [], [], [], []
    for index, (w, last) in enumerate(zip(matrices, lasts, strict=True)):
        finite = torch.isfinite(w).all()
        safe = torch.where(finite, w, 0.0)
        u, s, vh = torch.linalg.svd(safe, full_matrices=False)
        ends = sigma[:, index]
        places = torch.cat([torch.zeros_like(last), last.clamp(min=0)])
        left = torch.where(ends[:, None] == 0, 0.0, u.mT.index_select(0, places))
        right = vh.index_select(0, places)
        blank = torch.where(finite, 0.0, torch.nan)
        lefts.append(left + blank)
        rights.append(right + blank)
        residuals.append(
            torch.linalg.vector_norm(left @ safe - ends[:, None] * right, dim=1) + blank
        )
        tied = (s - ends[:, None]).abs() <= tie_tol * ends[:, None]
        ties.append(tied.sum(dim=1).clamp(1, MAX_TIES))
        small = vh if w.shape[0] >= w.shape[1] else u.mT
        blocks.append(torch.cat([_padded(small, 0, 1), _padded(small, last, -1)]))
        flags.append((ends[1] == 0).long() * RANK_DEFICIENT)
        bounds.append(
            certified_bounds(safe, ends, last) + blank if certify else s.new_empty(0, 3, 2)
        )
    block = torch.cat(blocks, dim=1)
    return (
        sigma.to(dtype),
        torch.cat(lefts, dim=1).to(dtype),
        torch.cat(rights, dim=1).to(dtype),
        block,
        torch.cat([block[:2], block[MAX_TIES : MAX_TIES + 2]]),
        torch.cat(lasts) + 1,
        torch.stack(residuals),
        torch.stack(flags),
        torch.stack(ties),
        torch.stack(bounds) if certify else sigma.new_empty(0, 3, 2),
    )


def _padded(rows: Tensor, start: Tensor | int, step: int) -> Tensor:
    """MAX_TIES rows from `start` on in the direction of `step`, zero behind the last one."""
    places = start + step * torch.arange(MAX_TIES, device=rows.device)
    inside = (places >= 0) & (places < rows.shape[0])
    return torch.where(
        inside[:, None], rows.index_select(0, places.clamp(0, rows.shape[0] - 1)), 0.0
    )


def without_smallest(raw: Raw) -> Raw:
    """A raw result in which nothing is told of sigma_min."""
    sigma, left, right, block, state, rank, residual, flags, ties, bounds = raw
    first = torch.tensor([[1.0], [0.0]], dtype=sigma.dtype, device=sigma.device)

    def kept(rows: Tensor, count: int) -> Tensor:
        return torch.cat([rows[:count], torch.zeros_like(rows[count:])])

    return (
        torch.where(first > 0, sigma, 0.0),
        kept(left, 1),
        kept(right, 1),
        kept(block, MAX_TIES),
        kept(state, 2),
        rank,
        torch.where(first.mT > 0, residual, 0.0),
        torch.where(sigma[0] == 0, flags, 0),
        torch.where(first.mT > 0, ties, 1),
        bounds,
    )


def unpack(raw: Raw, matrices: Sequence[Tensor], largest_only: bool) -> ExtremeSingularValues:
    """The public result of a raw one."""
    sigma, left, right, _, state, rank, residual, flags, _, bounds = raw
    rows, cols = zip(*[matrix.shape for matrix in matrices], strict=True)
    largest, smallest = sigma.unbind()
    u_max, u_min = _pieces(left, rows)
    v_max, v_min = _pieces(right, cols)
    if largest_only:
        u_min, v_min = (), ()
        smallest = torch.full_like(smallest, torch.nan)
        residual = torch.stack([residual[:, 0], smallest.to(residual.dtype)], dim=1)
    return ExtremeSingularValues(
        sigma_max=largest,
        sigma_min=smallest,
        u_max=u_max,
        v_max=v_max,
        u_min=u_min,
        v_min=v_min,
        rank=rank,
        residual=residual,
        flags=flags,
        state=state,
        bounds=Bounds(*bounds.unbind(1)) if bounds.shape[0] else None,
    )


def _pieces(vectors: Tensor, sizes: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
    """Both rows, each cut into the matrices' vectors."""
    ends = vectors.unbind()
    return [(end,) for end in ends] if len(sizes) == 1 else [end.split(sizes) for end in ends]
