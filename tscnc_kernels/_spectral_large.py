"""Extreme singular values of one matrix too large for a block of a CUDA kernel, by torch's own ops.

Two Krylov spaces are built by products with the float64 Gram matrix G = AᵀA and by solves with its
Cholesky factor; the singular values, vectors and ties of A on orthonormal bases Q of them (A Q has
few columns) come from the kernel for small matrices:

    σ_max(A) ≥ σ_max(A Q)        σ_min(A) ≤ σ_min(A Q)        v = Q v_Q

Nothing here waits for the GPU, except that the structural rank of a pattern is read once per
pattern. The factor is that of G + 16 u tr(G): a shift changes no eigenvector.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from tscnc_kernels._spectral import (
    CAP_REACHED,
    MAX_TIES,
    RANK_DEFICIENT,
    SHIFTED,
    Raw,
    certified_bounds,
    without_smallest,
)
from tscnc_kernels._spectral_kernels import Settings, solve_by_kernels

_UNIT = 2.0**-53
_PROMISED_ERROR = 1e-3
# Vectors of a block, and blocks of the Krylov spaces of the largest and of the smallest end.
_BLOCK = 4
_STEPS = (20, 12)
_POWER_STEPS = 160
_NULL_STEPS = 3

Operator = Callable[[Tensor], Tensor]

_ranks: Any = WeakIdKeyDictionary()


def host_rank(structure: Tensor) -> int:
    """The structural rank as a number, read from the device once per pattern."""
    if structure not in _ranks:
        _ranks[structure] = int(structure[0])
    rank: int = _ranks[structure]
    return rank


def _scattered(n: int, first: int, count: int, like: Tensor) -> Tensor:
    """(n, count) numbers in [-1, 1] that only depend on their place."""
    rows = torch.arange(1, n + 1, dtype=torch.float64, device=like.device)
    cols = torch.arange(first + 1, first + count + 1, dtype=torch.float64, device=like.device)
    return 2 * torch.frac(torch.sin(rows[:, None] * 12.9898 + cols * 78.233).abs() * 43758.5453) - 1


class _Tall(NamedTuple):
    """One matrix seen tall, scaled by a power of two so that no square leaves the range.

    gram, factor: of the Gram matrix, empty where the smallest end is not wanted.
    missing: orthonormal columns of the null space that its pattern makes.
    """

    matrix: Tensor
    scale: Tensor
    gram: Tensor
    factor: Tensor
    missing: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """G times x."""
        return self.gram @ x if self.gram.numel() else self.matrix.mT @ (self.matrix @ x)

    def solve(self, x: Tensor) -> Tensor:
        """The inverse of G times x, on the complement of the missing space."""
        x = x - self.missing @ (self.missing.mT @ x)
        x = torch.cholesky_solve(x, self.factor)
        return x - self.missing @ (self.missing.mT @ x)


def _make_tall(w: Tensor, deficiency: int, wants_factor: bool) -> _Tall:
    tall = w if w.shape[0] >= w.shape[1] else w.mT
    scale = torch.exp2(-torch.frexp(tall.abs().amax()).exponent.double())
    matrix = tall * scale
    if not wants_factor:
        nothing = matrix.new_empty(0, 0)
        return _Tall(matrix, scale, nothing, nothing, matrix.new_empty(matrix.shape[1], 0))
    gram = matrix.mT @ matrix
    trace = gram.diagonal().sum()
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(gram + 16 * _UNIT * trace * identity)
    # What could not be factored stays finite, and its residual says that it is wrong.
    factor = torch.where(info == 0, factor, identity)
    missing = _scattered(gram.shape[0], 64, deficiency, gram)
    for _ in range(_NULL_STEPS if deficiency else 0):
        missing = torch.linalg.qr(torch.cholesky_solve(missing, factor)).Q
    return _Tall(matrix, scale, gram, factor, missing)


def _krylov_space(apply: Operator, start: Tensor, steps: int, missing: Tensor) -> Tensor:
    """Orthonormal columns that span start, apply(start), …, orthogonal to the missing space."""
    n, absent = missing.shape
    block = torch.linalg.qr(start - missing @ (missing.mT @ start)).Q
    space = block
    for _ in range(steps - 1):
        block = apply(block)
        for _ in range(2):
            block = block - space @ (space.mT @ block)
        block = torch.linalg.qr(block).Q
        space = torch.cat([space, block], dim=1)
    # Where the space was exhausted, what a QR factorisation made up is orthogonal to the rest only
    # now.
    whole = torch.linalg.qr(torch.cat([missing, space], dim=1)[:, :n]).Q
    return whole[:, absent:]


def _power_space(apply: Operator, start: Tensor, missing: Tensor) -> Tensor:
    """The power method's vector beside a fixed one."""
    x = start[:, :1]
    for _ in range(_POWER_STEPS):
        x = apply(x)
        x = x / torch.linalg.vector_norm(x).clamp(min=1e-300)
    both = torch.cat([missing, x, start[:, 1:2]], dim=1)
    return torch.linalg.qr(both).Q[:, missing.shape[1] :]


def _space(a: _Tall, end: int, warm: Tensor | None, power: bool) -> Tensor:
    n = a.matrix.shape[1]
    start = _scattered(n, 16 * end, _BLOCK, a.matrix)
    if warm is not None:
        # A state of zeros is no start.
        known = warm[2 * end : 2 * end + 2].mT
        start = torch.cat([torch.where(known.any(), known, start[:, :2]), start[:, 2:]], dim=1)
    apply = a.solve if end == 1 else a.apply
    missing = a.missing if end == 1 else a.missing[:, :0]
    if power:
        return _power_space(apply, start, missing)
    return _krylov_space(apply, start, _STEPS[end], missing)


class _End(NamedTuple):
    """One end of one matrix: σ, u, v, tied rows of the small side, their number, and errors."""

    sigma: Tensor
    long: Tensor
    short: Tensor
    rows: Tensor
    ties: Tensor
    residual: Tensor
    error: Tensor


def _read_end(a: _Tall, end: int, space: Tensor, raw: Raw, tie_tol: float) -> _End:
    """From the raw result of the one matrix A Q."""
    sigma, left, right, block, _, _, _, _, ties, _ = raw
    rows = block[end * MAX_TIES : (end + 1) * MAX_TIES] @ space.mT
    value, u, v = sigma[end, 0], left[end], space @ right[end]
    image = a.matrix @ v
    value = torch.linalg.vector_norm(image)
    u = image / torch.where(value > 0, value, 1.0)
    rest = a.matrix.mT @ u - value * v
    residual = torch.linalg.vector_norm(rest)
    second = torch.linalg.vector_norm(a.matrix @ rows[1])
    if end == 0:
        ratio, square = second / value, (residual / value) ** 2
    else:
        ratio, square = value / second, rest @ a.solve(rest[:, None])[:, 0]
    close = 1 + tie_tol
    gap = (1 - ratio**2).clamp(min=1 - 1 / close**2)
    error = torch.minimum(square / gap, square.clamp(min=0).sqrt()) / 2
    return _End(value, u, v, rows, ties[0, end], residual, error)


def _end_by_passes(a: _Tall, raw: Raw) -> _End:
    """The largest end from the raw result of the one matrix."""
    sigma, left, right, block, _, _, residual, flags, ties, _ = raw
    n = a.matrix.shape[1]
    # Of a square matrix, either: it is tall.
    long, short = (left, right) if right.shape[1] == n else (right, left)
    error = torch.where(flags[0] & CAP_REACHED == 0, 0.0, torch.inf)
    value, rest = sigma[0, 0].double() * a.scale, residual[0, 0] * a.scale
    rows = block[:MAX_TIES]
    return _End(value, long[0].double(), short[0].double(), rows, ties[0, 0], rest, error)


def solve_large(
    w: Tensor,
    structure: Tensor | None,
    warm: Tensor | None,
    top: Raw | None,
    settings: Settings,
) -> Raw:
    """The raw result of one matrix, without its smallest end if that is not wanted.

    top: what is known of the largest end.
    """
    n = min(w.shape)
    rank = n
    if settings.structural and structure is not None:
        rank = host_rank(structure)
    finite = torch.isfinite(w).all()
    wants_both = not settings.largest_only
    a = _make_tall(torch.where(finite, w, 0.0), n - max(rank, 1), wants_both)
    ends = [] if top is None else [_end_by_passes(a, top)]
    for end in range(len(ends), 1 + wants_both):
        space = _space(a, end, warm, settings.power)
        plain = Settings(False, settings.tie_tol, False, False, end == 0)
        raw = solve_by_kernels([(a.matrix @ space).contiguous()], [], [], None, plain)
        ends.append(_read_end(a, end, space, raw, settings.tie_tol))
    if not wants_both:
        ends.append(_End(*(torch.zeros_like(part) for part in ends[0])))
    return _pack(w, a, ends, rank, _is_deficient(w, structure, settings), finite, settings)


def _is_deficient(w: Tensor, structure: Tensor | None, settings: Settings) -> Tensor:
    """Whether the pattern forbids the rank that the matrix, or what is live of it, could have."""
    if structure is None:
        return torch.zeros((), dtype=torch.bool, device=w.device)
    if not settings.structural:
        return structure[0] < min(w.shape)
    rows, cols = structure[1:].split(list(w.shape))
    return structure[0] < torch.minimum(rows.sum(), cols.sum())


def _pack(
    w: Tensor,
    a: _Tall,
    ends: list[_End],
    rank: int,
    forbidden: Tensor,
    finite: Tensor,
    settings: Settings,
) -> Raw:
    top, bottom = ends
    # What the pattern, or rounding, does not let be told from zero.
    absent = bottom.sigma <= 2 * max(w.shape) * _UNIT * top.sigma
    if not settings.structural:
        absent = absent | forbidden
    least = torch.where(absent, 0.0, bottom.sigma)
    error = torch.stack([top.error, torch.where(absent, 0.0, bottom.error)])
    capped = ~(error <= _PROMISED_ERROR) & (top.sigma > 0)
    wants_both = not settings.largest_only
    deficient = forbidden | absent if wants_both else top.sigma == 0
    shifted = deficient & wants_both
    flags = deficient * RANK_DEFICIENT + shifted * SHIFTED
    flags = torch.where(finite, flags + capped[: 1 + wants_both].any() * CAP_REACHED, 0)
    sigma = torch.stack([top.sigma, least])
    blank = torch.where(finite, 0.0, torch.nan)
    is_wide = w.shape[0] < w.shape[1]
    shown = sigma[:, None] > 0
    long = torch.where(shown, torch.stack([top.long, bottom.long]), 0.0) + blank
    short = torch.stack([top.short, bottom.short])
    short = torch.where(shown | (not is_wide), short, 0.0) + blank
    left, right = (short, long) if is_wide else (long, short)
    residual = torch.stack([top.residual, torch.where(absent, 0.0, bottom.residual)])
    block = torch.where(finite, torch.cat([top.rows, bottom.rows]), 0.0)
    last = torch.full((1,), rank - 1, device=w.device)
    bounds = sigma.new_empty(0, 3, 2)
    if settings.certify:
        safe = torch.where(finite, w, 0.0)
        bounds = certified_bounds(safe, sigma / a.scale, last)[None] + blank
    raw: Raw = (
        (sigma / a.scale + blank)[:, None],
        left,
        right,
        block,
        torch.cat([block[:2], block[MAX_TIES : MAX_TIES + 2]]),
        last + 1,
        (residual / a.scale + blank)[None],
        flags[None],
        torch.where(finite, torch.stack([top.ties, bottom.ties]), 1).clamp(min=1)[None],
        bounds,
    )
    if wants_both:
        return raw
    kept = without_smallest(raw)
    return (*kept[:7], flags[None], *kept[8:])
