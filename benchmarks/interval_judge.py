"""Whether certified intervals of singular values are right, decided without trusting a rounding.

Every claim is one on definiteness, of the matrix exactly as it is stored, with A seen tall:

    σ_max ≤ t   if  t² I − AᵀA  is positive definite,   σ_max ≥ t   unless it is
    σ_min ≥ t   if  AᵀA − t² I  is positive definite,   σ_min ≤ t   unless it is

A matrix of integers is positive definite if and only if its leading minors are positive
(Sylvester), which fraction-free elimination (Bareiss 1968) finds exactly: floating-point numbers
are integers times a power of two. Above `EXACT_SIDE` the same claims are proved by Cholesky
factorisations and norms ‖A v‖ in the 64-bit significand of x86's extended precision, with their own
rounding charged as by Rump (2006): its unit is 2048 times smaller than the one charged by what is
judged, so the proof nearly always succeeds. Where it does not, the exact test decides.

κ follows from the other two by exact division.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

# Smaller sides up to which integers are cheaper than a second opinion.
EXACT_SIDE = 12
_SIGNIFICAND_BITS = 64
_UNIT = 2.0**-_SIGNIFICAND_BITS

Matrix = npt.NDArray[np.float64]
Interval = Sequence[float]
HAS_EXTENDED = np.finfo(np.longdouble).nmant + 1 == _SIGNIFICAND_BITS


@dataclass(frozen=True)
class Verdict:
    """Which claims are wrong, none if all intervals are right; and whether integers decided."""

    wrong: tuple[str, ...]
    is_exact: bool


def judge(matrix: Matrix, largest: Interval, smallest: Interval, kappa: Interval) -> Verdict:
    """Judge the [lower, upper] of σ_max, σ_min and κ of a float64 matrix."""
    if any(math.isnan(bound) for bound in (*largest, *smallest, *kappa)):
        return Verdict(("not a number",), is_exact=True)
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    wrong = [] if _ratio_follows(largest, smallest, kappa) else ["kappa"]
    if HAS_EXTENDED and tall.shape[1] > EXACT_SIDE and _Extended(tall).proves(largest, smallest):
        return Verdict(tuple(wrong), is_exact=False)
    integers = _Integers(tall)
    claims = {
        "sigma_max lower": not integers.is_below(largest[0]),
        "sigma_max upper": largest[1] == math.inf
        or integers.is_below(largest[1])
        or (largest[1] == 0 and not tall.any()),
        "sigma_min lower": smallest[0] == 0 or integers.is_above(smallest[0]),
        "sigma_min upper": smallest[1] >= largest[1] or not integers.is_above(smallest[1]),
    }
    return Verdict((*wrong, *(name for name, holds in claims.items() if not holds)), is_exact=True)


def _ratio_follows(largest: Interval, smallest: Interval, kappa: Interval) -> bool:
    """Whether κ's interval holds every quotient of the others; κ of a singular matrix is ∞."""
    lower, upper = kappa
    if lower == math.inf:
        below = smallest[1] == 0
    elif smallest[1] == math.inf:
        below = lower <= 1
    else:
        below = lower <= 1 or Fraction(lower) * Fraction(smallest[1]) <= Fraction(largest[0])
    if upper == math.inf or largest[1] == math.inf:
        return below and upper == math.inf
    return below and Fraction(upper) * Fraction(smallest[0]) >= Fraction(largest[1])


class _Integers:
    """AᵀA in integers."""

    def __init__(self, tall: Matrix) -> None:
        ratios = [[float(x).as_integer_ratio() for x in column] for column in tall.T]
        self.shift = max(bottom.bit_length() for column in ratios for _, bottom in column) - 1
        columns = [[top * ((1 << self.shift) // bottom) for top, bottom in c] for c in ratios]
        self.gram = [
            [sum(map(int.__mul__, a, b)) for b in columns[: index + 1]]
            for index, a in enumerate(columns)
        ]

    def is_below(self, bound: float) -> bool:
        """σ_max < bound."""
        return self._is_definite(-1, bound)

    def is_above(self, bound: float) -> bool:
        """σ_min > bound."""
        return self._is_definite(1, bound)

    def _is_definite(self, sign: int, bound: float) -> bool:
        top, bottom = bound.as_integer_ratio()
        exponent = bottom.bit_length() - 1
        common = max(self.shift, exponent)
        stretch, square = 1 << 2 * (common - self.shift), top**2 << 2 * (common - exponent)
        rows = [[sign * stretch * x for x in row] for row in self.gram]
        for index, row in enumerate(rows):
            row[index] -= sign * square
        return _has_positive_minors(rows)


def _has_positive_minors(rows: list[list[int]]) -> bool:
    """Fraction-free elimination of a symmetric matrix of which the lower rows are given."""
    previous = 1
    for k in range(len(rows)):
        pivot = rows[k][k]
        if pivot <= 0:
            return False
        for i in range(k + 1, len(rows)):
            row, factor = rows[i], rows[i][k]
            for j in range(k + 1, i + 1):
                row[j] = (pivot * row[j] - factor * rows[j][k]) // previous
        previous = pivot
    return True


class _Extended:
    """Proofs in extended precision; a failure proves nothing."""

    def __init__(self, tall: Matrix) -> None:
        self.matrix = tall.astype(np.longdouble)
        self.gram = self.matrix.T @ self.matrix
        self.square_norm = (self.matrix**2).sum()
        self.terms = 1.01 * (sum(tall.shape) + 64)
        scale = float(np.abs(tall).max()) or 1.0
        _, _, right = np.linalg.svd(tall / scale, full_matrices=False)
        self.first, self.last = right[0], right[-1]

    def proves(self, largest: Interval, smallest: Interval) -> bool:
        """All four claims."""
        return (
            self._length(self.first, -1) >= largest[0]
            and self._length(self.last, 1) <= smallest[1]
            and (largest[1] == math.inf or self._is_definite(-1, largest[1]))
            and (smallest[0] == 0 or self._is_definite(1, smallest[0]))
        )

    def _length(self, vector: Any, sign: int) -> Any:
        """‖A v‖ / ‖v‖ with its rounding added or taken off."""
        v = vector.astype(np.longdouble)
        length = np.sqrt(((self.matrix @ v) ** 2).sum() / (v**2).sum())
        return length + sign * self.terms * _UNIT * np.sqrt(self.square_norm)

    def _is_definite(self, sign: int, bound: float) -> bool:
        square = np.longdouble(bound) ** 2
        size = len(self.gram)
        charge = self.terms * _UNIT * (self.square_norm + size * square)
        work = sign * self.gram
        work[np.diag_indices(size)] -= sign * square + charge
        for k in range(size):
            if not work[k, k] > 0:
                return False
            column = work[k + 1 :, k] / np.sqrt(work[k, k])
            work[k + 1 :, k + 1 :] -= np.outer(column, column)
        return True
