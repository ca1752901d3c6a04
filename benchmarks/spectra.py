"""Matrices of known spectra, and those that make trouble, for tests, benchmarks and the judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor


def gaussian(rows: int, cols: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Independent normal entries."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator, dtype=torch.float64).to(dtype)


def with_spectrum(
    rows: int,
    cols: int,
    sigma: Sequence[float] | Tensor,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Random singular vectors for the given singular values, before storage rounds the matrix."""
    left, _ = torch.linalg.qr(gaussian(rows, len(sigma), seed, torch.float64))
    right, _ = torch.linalg.qr(gaussian(cols, len(sigma), seed + 1, torch.float64))
    return ((left * torch.as_tensor(sigma)) @ right.mT).to(dtype)


def exact(matrix: Tensor, mask: Tensor | None = None) -> Tensor:
    """Singular values in float64."""
    return torch.linalg.svdvals(matrix.double() if mask is None else matrix.double() * mask)


def geometric(count: int, kappa: float) -> Tensor:
    """From 1 down to 1 / kappa with equal ratios."""
    return torch.logspace(0, -math.log10(kappa), count, dtype=torch.float64)


def clustered(count: int, kappa: float, size: int = 8) -> Tensor:
    """Two clusters, `size` values within 1e-3 of the smallest, the others within 1e-3 of 1."""
    spread = 1 - 1e-3 * torch.linspace(0, 1, count, dtype=torch.float64)
    small = torch.arange(count) >= count - min(size, count - 1)
    return torch.where(small, spread / kappa, spread)


def one_small(count: int, kappa: float) -> Tensor:
    """Ones and one small value."""
    values = torch.ones(count, dtype=torch.float64)
    values[-1] = 1 / kappa
    return values


def flat_with_tail(count: int, kappa: float, tail: int = 20) -> Tensor:
    """Values between 1 and 1/2, then a geometric tail."""
    tail = min(tail, count - 1)
    flat = torch.linspace(1, 0.5, count - tail, dtype=torch.float64)
    return torch.cat([flat, 0.5 * geometric(tail + 1, kappa / 2)[1:]])


def rank_deficient(rows: int, cols: int, rank: int, seed: int = 0) -> Tensor:
    """A product of two integer matrices, which storage does not round."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(-8, 9, (rows, rank), generator=generator)
    right = torch.randint(-8, 9, (rank, cols), generator=generator)
    return (left @ right).float()


Make = Callable[[int, int, torch.Generator], Tensor]


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(1 << 40, (), generator=generator))


def _decades(generator: torch.Generator, most: float) -> float:
    """10 to a power from 0 to `most`."""
    return float(10 ** (most * torch.rand((), generator=generator, dtype=torch.float64)))


def _spectral(sigma: Callable[[int, float], Tensor], most: float) -> Make:
    def make(rows: int, cols: int, generator: torch.Generator) -> Tensor:
        values = sigma(min(rows, cols), max(2.0, _decades(generator, most)))
        return with_spectrum(rows, cols, values, _seed(generator), torch.float64)

    return make


def _gaussian(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    return gaussian(rows, cols, _seed(generator), torch.float64)


def _deficient(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    least = min(rows, cols)
    rank = int(torch.randint(0, least, (), generator=generator))
    return rank_deficient(rows, cols, max(rank, min(1, least - 1)), _seed(generator)).double()


def _nearly_equal_lines(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Two lines that differ in one unit of the last place of one entry of float32."""
    matrix = _gaussian(rows, cols, generator).float()
    lines = matrix if rows <= cols else matrix.mT
    if len(lines) > 1:
        lines[1] = lines[0]
        lines[1, 0] = torch.nextafter(lines[1, 0], torch.tensor(torch.inf))
    return matrix.double()


def _graded(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Rows and columns of very different sizes."""
    matrix = _gaussian(rows, cols, generator)
    for side, count in ((0, rows), (1, cols)):
        exponents = 8 * torch.rand(count, generator=generator, dtype=torch.float64)
        matrix = matrix * (10**-exponents).unsqueeze(1 - side)
    return matrix


def _scaled(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Close to the ends of float32's range."""
    exponent = -34 if torch.rand((), generator=generator) < 0.5 else 34
    return _gaussian(rows, cols, generator) * 10.0**exponent


def _equal_values(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """A permutation with signs and one scale: all singular values are equal, and exactly so."""
    least = min(rows, cols)
    matrix = torch.zeros(rows, cols, dtype=torch.float64)
    place = torch.randperm(rows, generator=generator)[:least]
    signs = torch.randint(0, 2, (least,), generator=generator).double() * 2 - 1
    matrix[place, torch.randperm(cols, generator=generator)[:least]] = signs
    return matrix * _decades(generator, 3)


def _blocks(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Block diagonal, the blocks of different sizes."""
    matrix = _gaussian(rows, cols, generator)
    row_block = torch.arange(rows) * 3 // rows
    col_block = torch.arange(cols) * 3 // cols
    sizes = torch.tensor([1.0, _decades(generator, 4), 1 / _decades(generator, 4)])
    return matrix * (row_block[:, None] == col_block) * sizes[row_block][:, None].double()


def _constant(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Zero but for one entry, constant, or zero."""
    kind = int(torch.randint(0, 4, (), generator=generator))
    matrix = torch.zeros(rows, cols, dtype=torch.float64)
    if kind == 1:
        matrix[rows // 2, cols // 2] = 0.3
    if kind == 2:
        matrix += 0.7
    if kind == 3:
        matrix += torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    return matrix


def _classic(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Hilbert's, Kahan's, Läuchli's, Vandermonde's, Pascal's matrices, a triangle of ones."""
    i = torch.arange(rows, dtype=torch.float64)[:, None]
    j = torch.arange(cols, dtype=torch.float64)[None, :]
    kind = int(torch.randint(0, 6, (), generator=generator))
    if kind == 0:
        return 1 / (i + j + 1)
    if kind == 1:
        sine, cosine = math.sin(1.2), math.cos(1.2)
        upper = torch.where(i == j, 1.0, torch.where(i < j, -cosine, 0.0))
        return upper * sine**i
    if kind == 2:
        return torch.where(i == 0, 1.0, torch.where(i == j + 1, 1e-4, 0.0)).double()
    if kind == 3:
        return ((i + 1) / rows) ** j.clamp(max=40)
    if kind == 4:
        terms = torch.lgamma(i + j + 1) - torch.lgamma(i + 1) - torch.lgamma(j + 1)
        return terms.clamp(max=60).exp().round()
    return (i <= j).double() * (1 - 2 * (i < j).double())


# Random and adversarial matrices by family: (rows, cols, generator) -> float64, rounded when it is
# stored.
FAMILIES: dict[str, Make] = {
    "gaussian": _gaussian,
    "geometric": _spectral(geometric, 9),
    "clustered": _spectral(partial(clustered, size=4), 8),
    "one small": _spectral(one_small, 9),
    "flat with tail": _spectral(partial(flat_with_tail, tail=5), 8),
    "rank deficient": _deficient,
    "nearly equal lines": _nearly_equal_lines,
    "graded": _graded,
    "scaled": _scaled,
    "equal values": _equal_values,
    "block diagonal": _blocks,
    "constant": _constant,
    "classic": _classic,
}
