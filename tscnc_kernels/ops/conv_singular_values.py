"""Extreme singular values of a two-dimensional convolution as an operator, not as a matrix.

With K (out, in / groups, kh, kw) and x ↦ K ∗ x on images of a given size:

    circular   the operator is block diagonal, D(θ) = Σ_k K_k e^(−i k·θ):
               σ_max = max_θ σ_1(D(θ)),   σ_min = min_θ σ_n(D(θ)),   exact
    zeros      σ_max ≤ max_i (Σ_{j,k} |K_T,ij,k|)^(2^−T),   K_{t+1} = K_t ⋆ K_t,   for every size;
               small operators are written out as matrices instead, and both ends are exact
    ∂σ = Re(u* ∂D(θ) v) at the extreme θ, averaged over tied vectors

A stride is folded into the channels; groups are independent operators, so that σ_max is the largest
and σ_min the smallest of theirs. Every frequency is screened by the eigenvalues of its Gram matrix
in complex128; the extreme blocks then go through `extreme_singular_values` in their real form,
which gives values, gradients and certificates that do not rest on a Gram matrix.

A warm start holds the last kernel and an interval for every frequency. By Weyl's inequality a step
ΔK moves no singular value by more than ‖ΔD(θ)‖ ≤ ‖ΔD(θ)*ΔD(θ)‖_F^½: frequencies that cannot hold an
extreme are left out, and the result is as exact as a cold one.

Source: Sedghi, Gupta, Long, arXiv 1805.10408 (circular); Delattre et al., arXiv 2305.16173 and
2402.00240 (Gram iteration, zero padding); Senderovich et al., arXiv 2204.07741 (strides). The
smaller channel side and the charges for rounding are ours.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from tscnc_kernels._checks import check_floating
from tscnc_kernels._convolution import (
    UNIT,
    Pair,
    bound_steps,
    kernel_gram_bound,
    real_form,
    split,
)
from tscnc_kernels._spectral import CAP_REACHED, RANK_DEFICIENT, REFACTORED, SHIFTED, Bounds
from tscnc_kernels._symbol_search import (
    Intervals,
    Symbols,
    certify_symbols,
    extreme_places,
    frequencies_of,
    gram_symbols,
    intervals,
    screen_all,
    screen_warm,
    step_bounds,
)
from tscnc_kernels.ops.extreme_singular_values import extreme_singular_values
from tscnc_kernels.ops.gram_iteration import round_up

Padding = Literal["circular", "zeros"]

# Zero-padded operators of at most so many entries, and so small a side, are written out.
_DENSE_ENTRIES, _DENSE_SIDE = 1 << 21, 1024
# Beyond this ratio the screening may take one frequency for another.
_RESOLVED = 1e-7


class ConvSingularValues(NamedTuple):
    """What `conv_singular_values` returns."""

    sigma_max: Tensor
    sigma_min: Tensor
    flags: Tensor
    state: Tensor
    bounds: Bounds | None


def _check(
    kernel: Tensor, size: object, padding: str, stride: object, groups: int
) -> tuple[Pair, Pair]:
    check_floating("kernel", kernel)
    if kernel.dim() != 4 or kernel.numel() == 0:
        raise ValueError(
            f"expected kernel to be a non-empty (out, in / groups, kh, kw) tensor, "
            f"got shape {tuple(kernel.shape)}"
        )
    if padding not in get_args(Padding):
        raise ValueError(f'expected padding to be "circular" or "zeros", got {padding!r}')
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"expected groups to be an int, got {type(groups).__name__}")
    if groups < 1 or kernel.shape[0] % groups:
        raise ValueError(
            f"expected groups to divide the {kernel.shape[0]} output channels, got {groups}"
        )
    image, step = _pair("input_size", size), _pair("stride", stride)
    if padding == "circular" and (image[0] % step[0] or image[1] % step[1]):
        raise ValueError(
            f"expected a circular input_size that the stride divides, got {image} and {step}"
        )
    if padding == "zeros" and not (kernel.shape[2] % 2 and kernel.shape[3] % 2):
        raise ValueError(
            f"expected an odd kernel for zero padding, got shape {tuple(kernel.shape)}"
        )
    return image, step


def _pair(name: str, value: object) -> Pair:
    pair = (value, value) if isinstance(value, int) else value
    if not isinstance(pair, Sequence) or not all(
        isinstance(side, int) and not isinstance(side, bool) for side in pair
    ):
        raise TypeError(f"expected {name} to be an int or two of them, got {value!r}")
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"expected {name} to be an int or two of them, at least 1, got {value!r}")
    return pair[0], pair[1]


def _check_state(state: Tensor, length: int | tuple[int, ...], device: torch.device) -> None:
    shape = (length,) if isinstance(length, int) else length
    if not isinstance(state, Tensor) or state.dtype != torch.float64:
        raise TypeError(
            f"expected state to be a float64 tensor, got {getattr(state, 'dtype', type(state))}"
        )
    if tuple(state.shape) != shape or state.device != device:
        raise ValueError(
            f"expected state of shape {shape} on {device} for this operator, "
            f"got {tuple(state.shape)} on {state.device}"
        )


def _circular(
    kernel: Tensor, image: Pair, stride: Pair, groups: int, state: Tensor | None, certify: bool
) -> ConvSingularValues:
    grid = image[0] // stride[0], image[1] // stride[1]
    size = kernel.detach().abs().amax()
    size = torch.where(size == 0, 1.0, size)
    kernel = kernel / size
    kernels = split(kernel, groups, stride)
    blocks = Symbols(kernels, frequencies_of(grid, kernel.device), grid)
    still = blocks._replace(kernels=kernels.detach())
    grams = gram_symbols(still)
    places = blocks.shape[0] * blocks.shape[1]
    if state is not None:
        _check_state(state, 3 * places + kernel.numel(), kernel.device)
    if state is None or certify:
        known = screen_all(still, grams)
        high, low, _ = known
    else:
        old = state.detach() / size
        step = split(kernel.detach() - old[3 * places :].reshape(kernel.shape), groups, stride)
        bound = step_bounds(step, grams, blocks.shape[1])
        before = Intervals(*old[: 3 * places].chunk(3))
        known, exact = screen_warm(still, grams, before, bound)
        high = torch.where(exact, known.upper, -torch.inf)
        low = torch.where(exact, known.lower, torch.inf)
    chosen = extreme_places(still, high, low)
    if certify or (torch.is_grad_enabled() and kernel.requires_grad):
        pair = [*real_form(*blocks.at(chosen))[:, 0]]
        found = extreme_singular_values(pair, certify=certify)
        largest, smallest, ends = found.sigma_max[0], found.sigma_min[1], found.bounds
        flags = _any_flag(found.flags)
    else:
        largest, ends = high.amax(), None
        smallest, flags = _smallest(*still.at(chosen[1:]))
    unsure = (smallest > 0) & (smallest < _RESOLVED * largest)
    flags = flags | torch.where(unsure, CAP_REACHED, 0)
    bounds = None
    if ends is not None:
        certified = certify_symbols(still, ends, largest.detach(), smallest.detach())
        bounds = certified._replace(
            sigma_max=certified.sigma_max * size, sigma_min=certified.sigma_min * size
        )
    saved = torch.cat([*known, kernel.detach().flatten()]) * size
    return ConvSingularValues(largest * size, smallest * size, flags, saved, bounds)


def _smallest(real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
    """σ_min of a block and its flags: what rounding hides is 0."""
    values = torch.linalg.svdvals(torch.complex(real, imaginary)[0, 0])
    deficient = values[-1] <= 4 * max(real.shape) * UNIT * values[0]
    return torch.where(deficient, 0.0, values[-1]), torch.where(deficient, RANK_DEFICIENT, 0)


def _any_flag(flags: Tensor) -> Tensor:
    """The bits that any of (L,) flags has."""
    bits = flags.new_tensor([RANK_DEFICIENT, SHIFTED, CAP_REACHED, REFACTORED])
    return (flags[:, None] & bits).amax(dim=0).sum()


def _written_out(kernel: Tensor, image: Pair, stride: Pair, groups: int) -> list[Tensor]:
    """The zero-padded operator of every group as an (inputs, outputs) matrix."""
    inner = kernel.shape[1]
    inputs = inner * image[0] * image[1]
    eye = torch.eye(inputs, dtype=kernel.dtype, device=kernel.device)
    padding = (kernel.shape[2] // 2, kernel.shape[3] // 2)
    units = eye.reshape(inputs, inner, *image)
    return [
        functional.conv2d(units, part, stride=stride, padding=padding).flatten(1)
        for part in kernel.chunk(groups)
    ]


def _zeros(
    kernel: Tensor, image: Pair, stride: Pair, groups: int, state: Tensor | None, certify: bool
) -> ConvSingularValues:
    steps = [(side - 1) // step + 1 for side, step in zip(image, stride, strict=True)]
    rows, cols = (
        kernel.shape[0] // groups * steps[0] * steps[1],
        kernel.shape[1] * image[0] * image[1],
    )
    if groups * rows * cols <= _DENSE_ENTRIES and min(rows, cols) <= _DENSE_SIDE:
        if state is not None:
            _check_state(state, (4, groups * min(rows, cols)), kernel.device)
        matrices = _written_out(kernel, image, stride, groups)
        found = extreme_singular_values(matrices, state=state, certify=certify)
        bounds = None
        if found.bounds is not None:
            largest, smallest = found.bounds.sigma_max.amax(0), found.bounds.sigma_min.amin(0)
            bounds = intervals(largest, smallest)
        ends = found.sigma_max.amax(), found.sigma_min.amin()
        return ConvSingularValues(*ends, _any_flag(found.flags), found.state, bounds)
    if state is not None:
        _check_state(state, 0, kernel.device)
    kernels = split(kernel, groups, stride)
    bound = kernel_gram_bound(kernels, bound_steps(kernels)).amax()
    bounds = None
    if certify:
        interval = torch.stack([torch.zeros_like(bound), bound]).detach()
        bounds = intervals(interval, interval)
    flags = torch.full((), CAP_REACHED, dtype=torch.int64, device=kernel.device)
    unknown = torch.full_like(bound.detach(), torch.nan)
    return ConvSingularValues(bound, unknown, flags, kernel.new_empty(0), bounds)


def conv_singular_values(
    kernel: Tensor,
    input_size: int | Sequence[int],
    padding: Padding = "circular",
    stride: int | Sequence[int] = 1,
    groups: int = 1,
    state: Tensor | None = None,
    certify: bool = False,
) -> ConvSingularValues:
    """Largest and smallest singular value of the operator that a convolution applies to images.

    Both are exact for circular padding, to 1e-3 at worst up to κ = 1e6, and for zero-padded
    operators of up to 2²¹ entries. For larger ones σ_max is an upper bound that holds for images of
    any size and σ_min is NaN.

    Args:
        kernel: (out, in / groups, kh, kw) tensor of float32, float64, bfloat16 or float16, on the
            device of `state`.
        input_size: height and width of the images, or one number for both.
        padding: "circular", any kernel, sizes that the stride divides; or "zeros", odd kernels,
            kh // 2 and kw // 2 zeros on every side.
        stride: step of the output, or one number for both directions.
        groups: number of groups, as of torch.nn.Conv2d.
        state: the `state` of an earlier call for an operator of these shapes, a warm start. It is
            not changed.
        certify: also compute `bounds`; the warm start saves nothing then.

    Returns:
        NamedTuple of
        sigma_max, sigma_min: 0-d, float64 if the kernel is, else float32. NaN where the kernel
            holds NaN or infinite entries; sigma_min is NaN where it is not known.
        flags: 0-d int64 bits, as those of `extreme_singular_values`; CAP_REACHED = 4: σ_min may be
            off or unknown, and for zero padding σ_max is a bound.
        state: start for the next call, 1-d or 2-d float64, new.
        bounds: None, or certified intervals of sigma_max, sigma_min and kappa, each (2,) float64;
            0 or inf where nothing better is proven.

    Raises:
        ValueError: not 4 dimensions, no elements, sizes, groups or a state that do not fit, an even
            kernel with zeros, unknown padding.
        TypeError: not a tensor, a dtype that is not supported, sizes that are not integers.

    Autograd: sigma_max and sigma_min to second order. With a warm start the number of frequencies
        to look at is read back from the device.

    Source: arXiv 1805.10408, 2305.16173, 2402.00240; see this module's docstring.
    """
    image, step = _check(kernel, input_size, padding, stride, groups)
    exact = kernel.double()
    finite = torch.isfinite(exact.detach()).all()
    safe = torch.where(finite, exact, 0.0)
    find = _circular if padding == "circular" else _zeros
    found = find(safe, image, step, groups, state, certify)
    # Adds 0, or NaN to the values and to the gradient.
    blank = (exact * torch.where(finite, 0.0, torch.nan)).sum()
    dtype = torch.float64 if kernel.dtype == torch.float64 else torch.float32
    largest = found.sigma_max + blank
    is_bound = padding == "zeros" and found.state.dim() == 1
    bounds = None if found.bounds is None else Bounds(*(b + blank.detach() for b in found.bounds))
    return found._replace(
        sigma_max=round_up(largest, dtype) if is_bound else largest.to(dtype),
        sigma_min=(found.sigma_min + blank).to(dtype),
        bounds=bounds,
    )
