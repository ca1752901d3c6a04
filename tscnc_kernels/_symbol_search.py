"""The search for the extreme symbols of a circular convolution, and the proof of their extremes.

Every symbol is screened by the eigenvalues of its Gram matrix in complex128. On a warm start each
has an interval that its extreme singular values cannot have left, and only those are screened that
may hold an extreme.

Letters as in `_convolution`: G groups, O output and I input channels, F frequencies.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tscnc_kernels._convolution import COMPLEX, UNIT, extreme_squares, gram, symbols
from tscnc_kernels._spectral import Bounds

# Bytes of symbols computed at a time: what the caches hold, which is faster than all at once.
_CHUNK = 4 << 20
# Frequencies that may be smallest after the screening, and those tried first on a warm start.
_CANDIDATES, _FIRST = 4, 8
# A frequency that cannot change the result by more than this is left out on a warm start.
_WARM_ERROR = 1e-5


class Symbols(NamedTuple):
    """The kernels (G, O, I, kh, kw) of stride 1 and the waves (2, F, T) of the half spectrum."""

    kernels: Tensor
    waves: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.kernels.shape[0], self.waves.shape[1]

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks (k, 1, O, I) at (k,) flat places among groups × frequencies."""
        group, frequency = places // self.shape[1], places % self.shape[1]
        waves = self.waves.index_select(1, frequency)[:, :, None, :]
        return symbols(self.kernels.index_select(0, group), waves)

    def chunk(self, entries: int) -> int:
        out, inner = self.kernels.shape[1:3]
        return max(1, _CHUNK // (16 * entries * out * inner))


def _signed_root(square: Tensor) -> Tensor:
    return square.sign() * square.abs().sqrt()


def screen_all(blocks: Symbols) -> tuple[Tensor, Tensor]:
    """Flat (G · F,) largest and smallest singular values of all blocks."""
    found = []
    for waves in blocks.waves.split(blocks.chunk(blocks.shape[0]), dim=1):
        found.append(torch.stack(extreme_squares(*symbols(blocks.kernels, waves[:, None]))))
    largest, smallest = _signed_root(torch.cat(found, dim=2)).flatten(1)
    return largest, smallest


def _screen(blocks: Symbols, places: Tensor) -> Tensor:
    """(2, k) largest and smallest singular values of the blocks at these places."""
    found = []
    for some in places.split(blocks.chunk(blocks.kernels[0, 0, 0].numel())):
        real, imaginary = blocks.at(some)
        found.append(torch.stack(extreme_squares(real[:, 0], imaginary[:, 0])))
    return _signed_root(torch.cat(found, dim=1)) if found else places.new_empty(2, 0).double()


def screen_warm(blocks: Symbols, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bounds, exact where they matter, and which of them are exact."""
    known = torch.zeros_like(upper, dtype=torch.bool)
    # What is not known may be anything.
    upper = torch.where(upper.isnan(), torch.inf, upper)
    lower = torch.where(lower.isnan(), -torch.inf, lower)
    count = min(_FIRST, upper.numel())
    places = torch.cat([upper.topk(count).indices, lower.topk(count, largest=False).indices])
    for _ in range(2):
        exact = _screen(blocks, places)
        upper, lower = upper.scatter(0, places, exact[0]), lower.scatter(0, places, exact[1])
        known = known.scatter(0, places, True)
        best = torch.where(known, upper, -torch.inf).amax()
        least = torch.where(known, lower, torch.inf).amin()
        open_ = (upper > best * (1 + _WARM_ERROR)) | (lower < least * (1 - _WARM_ERROR))
        places = (open_ & ~known).nonzero().flatten()
    return upper, lower, known


def extreme_places(blocks: Symbols, upper: Tensor, lower: Tensor) -> Tensor:
    """(2,) places of the largest and the smallest singular value."""
    candidates = lower.topk(min(_CANDIDATES, lower.numel()), largest=False).indices
    real, imaginary = blocks.at(candidates)
    values = torch.linalg.svdvals(torch.complex(real, imaginary)[:, 0])[:, -1]
    return torch.stack([upper.argmax(), candidates.index_select(0, values.argmin()[None])[0]])


def intervals(largest: Tensor, smallest: Tensor) -> Bounds:
    ratio = largest / smallest.flip(0)
    return Bounds(largest, smallest, torch.where(ratio.isnan(), torch.inf, ratio).clamp(min=1))


def certify_symbols(blocks: Symbols, ends: Bounds, largest: Tensor, smallest: Tensor) -> Bounds:
    """Intervals by Cholesky factorisations of every block, with rounding charged."""
    out, inner, *taps = blocks.kernels.shape[1:]
    n, unit = min(out, inner), COMPLEX * UNIT
    norms = torch.linalg.vector_norm(blocks.kernels, dim=(1, 2)).flatten(1).sum(dim=1).amax()
    # What the symbols have lost: their waves are good to 16 units.
    off = 2 * (taps[0] * taps[1] + 20) * UNIT * norms
    eye = torch.eye(n, dtype=torch.complex128, device=blocks.waves.device)
    above = [largest * (1 + slack) for slack in (1e-1, 1e-2, 1e-4, 1e-6)]
    slacks = (900.0, 30.0, 1.0)
    holds_above, holds_below = [largest > 0 for _ in above], [smallest > 0 for _ in slacks]
    below = [smallest for _ in slacks]
    trace = torch.zeros_like(largest)
    for waves in blocks.waves.split(blocks.chunk(blocks.shape[0]), dim=1):
        small = gram(*symbols(blocks.kernels, waves[:, None]))
        squares = small.diagonal(dim1=-2, dim2=-1).real.sum(dim=-1)
        trace = torch.maximum(trace, squares.amax())
        charge = (out + inner + 32) * unit * squares
        for index, trial in enumerate(above):
            spent = charge + (n + 32) * n * unit * trial**2
            proven = _positive((trial**2 - spent)[..., None, None] * eye - small)
            holds_above[index] = holds_above[index] & proven
        for index, slack in enumerate(slacks):
            least = torch.maximum(2 * charge.amax(), 2e-6 * smallest**2)
            square = (smallest**2 - slack * least).clamp(min=0)
            below[index] = torch.minimum(below[index], square.sqrt())
            proven = _positive(small - (square + charge)[..., None, None] * eye)
            holds_below[index] = holds_below[index] & (square > 0) & proven
    upper, lower = trace.sqrt() * 1.01, torch.zeros_like(largest)
    for trial, holds in zip(above, holds_above, strict=True):
        upper = torch.where(holds, torch.minimum(trial, upper), upper)
    for value, holds in zip(below, holds_below, strict=True):
        lower = torch.where(holds, torch.maximum(value, lower), lower)
    high = torch.stack([(ends.sigma_max[0, 0] - off).clamp(min=0), upper + off])
    low = torch.stack([(lower - off).clamp(min=0), ends.sigma_min[1, 1] + off])
    outward = high.new_tensor([1 - 8 * UNIT, 1 + 8 * UNIT])
    return intervals(high * outward, low * outward)


def _positive(matrices: Tensor) -> Tensor:
    return (torch.linalg.cholesky_ex(matrices).info == 0).all()
