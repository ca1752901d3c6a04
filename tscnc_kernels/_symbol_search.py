"""The search for the extreme symbols of a circular convolution, and the proof of their extremes.

Every symbol is screened by the extreme eigenvalues of its Gram matrix in complex128; the native
kernel takes one symbol per vector lane. On a warm start each symbol has an interval that its
extreme singular values cannot have left, and only those are screened that may hold an extreme.

Letters as in `_convolution`: G groups, O output and I input channels, F frequencies, D shifts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tscnc_kernels import _backend
from tscnc_kernels._convolution import (
    COMPLEX,
    UNIT,
    Pair,
    extreme_squares,
    gram,
    half_spectrum,
    kernel_gram_bound,
    phases,
    symbols,
    tap_places,
    tap_shifts,
)
from tscnc_kernels._spectral import Bounds
from tscnc_kernels._vmap import register_loop_vmap

# Bytes of symbols computed at a time: what the caches hold, which is faster than all at once.
_CHUNK = 4 << 20
# Frequencies that may be smallest after the screening, and those tried first on a warm start.
_CANDIDATES, _FIRST = 8, 4
# A frequency that cannot change the result by more than this is left out on a warm start.
_WARM_ERROR = 1e-5
_FLOAT_UNIT = 2.0**-24
# Of the bound on a step, what σ_min is expected to move by at most.
_DRIFT = 0.35
# Below this ratio of the ends the screening takes all smallest singular values for zero.
_ZERO = 1e-8
# Pairs of taps per frequency from which the Gram matrices cost less by way of the symbols.
_MOST_PAIRS = 8


class Symbols(NamedTuple):
    """The kernels (G, O, I, kh, kw) of stride 1 and the (F, 2) frequencies of the half spectrum."""

    kernels: Tensor
    frequencies: Tensor
    grid: Pair

    @property
    def shape(self) -> tuple[int, int]:
        return self.kernels.shape[0], self.frequencies.shape[0]

    @property
    def taps(self) -> Pair:
        return self.kernels.shape[3], self.kernels.shape[4]

    def waves(self, frequencies: Tensor) -> Tensor:
        return phases(frequencies, tap_places(self.taps, frequencies.device), self.grid)

    def at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks (k, 1, O, I) at (k,) flat places among groups × frequencies."""
        group, frequency = places // self.shape[1], places % self.shape[1]
        waves = self.waves(self.frequencies.index_select(0, frequency))[:, :, None, :]
        alone = self.shape[0] == 1
        return symbols(self.kernels if alone else self.kernels.index_select(0, group), waves)

    def chunks(self) -> tuple[Tensor, ...]:
        """The waves of all frequencies, in pieces whose blocks the caches hold."""
        return self.waves(self.frequencies).split(self.chunk(self.shape[0]), dim=1)

    def chunk(self, entries: int) -> int:
        out, inner = self.kernels.shape[1:3]
        return max(1, _CHUNK // (16 * entries * out * inner))


class GramSymbols(NamedTuple):
    """What the native screening makes the symbols' Gram matrices of.

    With C_d = Σ_k K_kᵀ K_{k+d} of the small side n, d in `tap_shifts`,

        D(θ)*D(θ) = C_0 + Σ_{d≠0} e^(−i d·θ) C_d + e^(i d·θ) C_dᵀ
                  = Σ_d cos(d·θ) S_d + i sin(d·θ) A_d,

    which costs less than a product of symbols at every frequency.
    """

    # (G, blocks, D, 2, 4): S_d and A_d in blocks of 4 elements of their lower triangle by rows.
    terms: Tensor
    waves: Tensor  # (2, F, D)
    n: int


class Intervals(NamedTuple):
    """What is known of the blocks, flat (G · F,).

    upper: at least σ_max. lower: at most σ_min. center: σ_min when it was last computed; a step
    moves it by far less than ‖ΔD‖, as a rule.
    """

    upper: Tensor
    lower: Tensor
    center: Tensor

    def moved(self, bound: Tensor) -> "Intervals":
        """After a step of the blocks by at most `bound`. What was not known may be anything."""
        upper, lower = self.upper + bound, self.lower - bound
        return Intervals(
            torch.where(upper.isnan(), torch.inf, upper),
            torch.where(lower.isnan(), -torch.inf, lower),
            torch.where(self.center.isnan(), -torch.inf, self.center),
        )


def gram_symbols(blocks: Symbols) -> GramSymbols | None:
    """What the native screening takes; None where it does not run or would not pay."""
    count = blocks.taps[0] * blocks.taps[1]
    device = blocks.kernels.device
    if count * (count + 1) > _MOST_PAIRS * blocks.shape[1] or device.type != "cpu":
        return None
    if _backend.select("extreme_singular_values", device) != "native":
        return None
    n = min(blocks.kernels.shape[1:3])
    terms = _native.gram_terms(blocks.kernels.contiguous())
    return GramSymbols(terms, _keep((blocks.taps, blocks.grid), _find_waves), n)


_kept: dict[tuple[Pair, ...], Tensor] = {}
_MOST_KEPT = 128


def _keep(key: tuple[Pair, ...], find: Callable[..., Tensor]) -> Tensor:
    """find(*key), a constant of a layer that is kept between calls."""
    if torch.compiler.is_compiling():
        return find(*key)
    found = _kept.get(key)
    if found is None:
        found = find(*key)
        # Tensors that trace a call are of other types, and not for keeping.
        if type(found) is Tensor and len(_kept) < _MOST_KEPT:
            _kept[key] = found
    return found


def frequencies_of(grid: Pair, device: torch.device) -> Tensor:
    """(F, 2) frequencies of the half spectrum."""
    return _keep((grid,), half_spectrum).to(device)


def _find_waves(taps: Pair, grid: Pair) -> Tensor:
    shifts = torch.tensor(tap_shifts(taps))
    return phases(half_spectrum(grid), shifts, grid)


def _term_blocks(n: int) -> int:
    return -(-n * (n + 1) // 8)


@torch.library.register_fake("tscnc_kernels::gram_terms")
def _(kernels: Tensor) -> Tensor:
    n, shifts = min(kernels.shape[1:3]), len(tap_shifts((kernels.shape[3], kernels.shape[4])))
    return kernels.new_empty(kernels.shape[0], _term_blocks(n), shifts, 2, 4)


@torch.library.register_fake("tscnc_kernels::term_products")
def _(terms: Tensor, n: int) -> Tensor:
    return terms.new_empty(terms.shape[0], 2, *[terms.shape[2]] * 2, dtype=torch.float64)


@torch.library.register_fake("tscnc_kernels::symbol_extremes")
def _(terms: Tensor, waves: Tensor, places: Tensor, n: int) -> Tensor:
    return terms.new_empty(2, places.shape[0])


@torch.library.register_fake("tscnc_kernels::symbol_step")
def _(
    terms: Tensor, waves: Tensor, before: Tensor, bound: Tensor, n: int, *_constants: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(before), torch.empty_like(bound, dtype=torch.bool)


_native = torch.ops.tscnc_kernels
for _name in ("gram_terms", "term_products", "symbol_extremes", "symbol_step"):
    register_loop_vmap(_name, getattr(_native, _name))


def _signed_root(square: Tensor) -> Tensor:
    return square.sign() * square.abs().sqrt()


def screen_all(blocks: Symbols, grams: GramSymbols | None) -> Intervals:
    """Largest and smallest singular values of all blocks."""
    if grams is not None:
        places = torch.arange(blocks.shape[0] * blocks.shape[1])
        largest, smallest = _native.symbol_extremes(grams.terms, grams.waves, places, grams.n)
        return Intervals(largest, smallest, smallest)
    found = []
    for waves in blocks.chunks():
        found.append(torch.stack(extreme_squares(*symbols(blocks.kernels, waves[:, None]))))
    largest, smallest = _signed_root(torch.cat(found, dim=2)).flatten(1)
    return Intervals(largest, smallest, smallest)


def _screen(blocks: Symbols, places: Tensor) -> Tensor:
    """(2, k) largest and smallest singular values of the blocks at these places."""
    found = []
    for some in places.split(blocks.chunk(blocks.kernels[0, 0, 0].numel())):
        real, imaginary = blocks.at(some)
        found.append(torch.stack(extreme_squares(real[:, 0], imaginary[:, 0])))
    return _signed_root(torch.cat(found, dim=1)) if found else places.new_empty(2, 0).double()


def step_bounds(step: Tensor, grams: GramSymbols | None, frequencies: int) -> Tensor:
    """Flat (G · F,) bounds on ‖ΔD(θ)‖ for steps ΔK of the kernels.

    From the terms of ΔD*ΔD it is the Schatten norm ‖ΔD*ΔD‖_F^½ at every frequency, at the price of
    the terms in float32; else the kernel-Gram bound, the same for all frequencies.
    """
    if grams is None:
        return kernel_gram_bound(step, 2).repeat_interleave(frequencies)
    size = step.abs().amax()
    size = torch.where(size == 0, 1.0, size)
    step = step / size
    n = grams.n
    terms = _native.gram_terms(step.float().contiguous())
    waves = grams.waves.unsqueeze(0)
    squares = (
        ((waves @ _native.term_products(terms, n)) * waves).sum(dim=-1).clamp(min=0).sum(dim=1)
    )
    # Sums of so many products, each within as many units of ‖ΔK_k‖ ‖ΔK_l‖: the terms in float32,
    # the squares in float64.
    longest = step[0, 0, 0].numel() * max(step.shape[1:3])
    norms = step.square().sum(dim=(1, 2)).flatten(1).sqrt().sum(dim=1).square()
    lost = ((longest + 4) * _FLOAT_UNIT + 2 * n * UNIT**0.5) * norms
    return (size * (1 + 1e-9)) * (squares.sqrt() + lost[:, None]).flatten().sqrt()


def screen_warm(
    blocks: Symbols, grams: GramSymbols | None, before: Intervals, bound: Tensor
) -> tuple[Intervals, Tensor]:
    """The intervals after a step of the blocks by at most `bound`, and which of them are exact.

    First the most promising blocks are computed, then all that may hold an extreme still. The
    native kernel first tries to prove, by a Cholesky factorisation, that a block does not hold the
    smallest: that costs a quarter and gives a new lower bound.
    """
    if grams is not None:
        constants = grams.n, _FIRST, _WARM_ERROR, _ZERO, _DRIFT
        after, exact = _native.symbol_step(
            grams.terms, grams.waves, torch.stack(before), bound, *constants
        )
        return Intervals(*after), exact
    upper, lower, center = before.moved(bound)
    exact = torch.zeros_like(upper, dtype=torch.bool)
    count = min(_FIRST, upper.numel())
    places = torch.cat([upper.topk(count).indices, lower.topk(count, largest=False).indices])
    for _ in range(2):
        found = _screen(blocks, places)
        upper, lower = upper.scatter(0, places, found[0]), lower.scatter(0, places, found[1])
        center, exact = center.scatter(0, places, found[1]), exact.scatter(0, places, True)
        best, least = upper[exact].amax(), lower[exact].amin()
        above = upper > best * (1 + _WARM_ERROR)
        # Nothing is below zero.
        below = (lower < least * (1 - _WARM_ERROR)) & (least > _ZERO * best)
        places = ((above | below) & ~exact).nonzero().flatten()
    return Intervals(upper, lower, center), exact


@torch.library.custom_op("tscnc_kernels::smallest_symbol", mutates_args=())
def _smallest_symbol(
    kernels: Tensor, frequencies: Tensor, grid: list[int], upper: Tensor, lower: Tensor
) -> Tensor:
    """(1,) place of the smallest singular value; places that rounding cannot tell apart by SVD."""
    blocks = Symbols(kernels, frequencies, (grid[0], grid[1]))
    values, places = lower.topk(min(_CANDIDATES, lower.numel()), largest=False)
    squares = values.square() * values.sign()
    lost = 16 * max(kernels.shape[1:3]) * UNIT * upper.amax().square()
    close = places[squares <= squares[0] + 2 * lost]
    if close.numel() == 1:
        return close
    real, imaginary = blocks.at(close)
    exact = torch.linalg.svdvals(torch.complex(real, imaginary)[:, 0])[:, -1]
    return close[exact.argmin()[None]]


@_smallest_symbol.register_fake
def _(
    kernels: Tensor, frequencies: Tensor, grid: list[int], upper: Tensor, lower: Tensor
) -> Tensor:
    return frequencies.new_empty(1)


register_loop_vmap("smallest_symbol", _native.smallest_symbol)


def extreme_places(blocks: Symbols, upper: Tensor, lower: Tensor) -> Tensor:
    """(2,) places of the largest and the smallest singular value."""
    smallest = _native.smallest_symbol(
        blocks.kernels, blocks.frequencies, blocks.grid, upper, lower
    )
    return torch.cat([upper.argmax()[None], smallest])


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
    eye = torch.eye(n, dtype=torch.complex128, device=blocks.kernels.device)
    above = [largest * (1 + slack) for slack in (1e-1, 1e-2, 1e-4, 1e-6)]
    slacks = (900.0, 30.0, 1.0)
    holds_above, holds_below = [largest > 0 for _ in above], [smallest > 0 for _ in slacks]
    below = [smallest for _ in slacks]
    trace = torch.zeros_like(largest)
    for waves in blocks.chunks():
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
