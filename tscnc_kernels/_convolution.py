"""Convolution operators as small matrices: phases, symbols, and the kernel-Gram bound.

A stride-s convolution is a stride-1 convolution of the s² phases of its input, taken as channels.
On a torus the latter is block diagonal in the Fourier basis: its blocks, the symbols, are

    D(θ) = Σ_k K_k e^(−i k·θ),   θ on the grid of the phases' size,

and D(−θ) is the conjugate of D(θ), so half of the frequencies hold all singular values. Circular
shifts of the input, that is where the kernel is anchored, change no singular value.

Letters: G groups, O output and I input channels of a group, T taps, F frequencies.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

Pair = tuple[int, int]

UNIT = 2.0**-53
# What a complex operation loses, in units of a real one, with room to spare.
COMPLEX = 4
# An FFT of n points loses less than this, times log2 n, in units and relative to the l2 norm.
_FFT = 64
# Entries of the largest kernel that the bound may grow beyond its promised steps.
_GROWTH = 1 << 20
_PROMISED_STEPS, _MOST_STEPS = 3, 6


def split(kernel: Tensor, groups: int, stride: Pair) -> Tensor:
    """(G, O, I · sh · sw, ⌈kh / sh⌉, ⌈kw / sw⌉) stride-1 kernels of the input's phases."""
    out, inner, rows, cols = kernel.shape
    (down, right), (tall, wide) = stride, (-(-rows // stride[0]), -(-cols // stride[1]))
    padded = functional.pad(kernel, (0, wide * right - cols, 0, tall * down - rows))
    phases = padded.reshape(groups, out // groups, inner, tall, down, wide, right)
    return phases.permute(0, 1, 2, 4, 6, 3, 5).reshape(groups, out // groups, -1, tall, wide)


def half_spectrum(grid: Pair) -> Tensor:
    """(F, 2) frequencies, one of each conjugate pair."""
    h, w = grid
    inner = torch.cartesian_prod(torch.arange(h), torch.arange(1, -(-w // 2)))
    own = torch.tensor([0] if w % 2 else [0, w // 2])
    edges = torch.cartesian_prod(torch.arange(h // 2 + 1), own)
    return torch.cat([edges, inner])


def phases(frequencies: Tensor, places: Tensor, grid: Pair) -> Tensor:
    """(2, F, T) cosines and sines of k·θ for (T, 2) places k; those off the grid wrap around it."""
    # Whole turns are dropped in integers, where it costs no digits.
    turns = [
        (frequencies[:, side, None] * places[:, side] % grid[side]).double() / grid[side]
        for side in (0, 1)
    ]
    angle = 2 * math.pi * (turns[0] + turns[1])
    return torch.stack([angle.cos(), angle.sin()])


def tap_places(taps: Pair, device: torch.device) -> Tensor:
    """(T, 2) places of a kernel's taps."""
    return torch.cartesian_prod(torch.arange(taps[0]), torch.arange(taps[1])).to(device)


def tap_shifts(taps: Pair) -> list[Pair]:
    """What two taps can lie apart, one of each pair d, −d, zero first."""
    return [(0, right) for right in range(taps[1])] + [
        (down, right) for down in range(1, taps[0]) for right in range(1 - taps[1], taps[1])
    ]


def symbols(kernels: Tensor, waves: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary parts of D's conjugate, (…, F, O, I), for (…, O, I, kh, kw) kernels.

    The leading dimensions of the waves (2, …, F, T) broadcast with those of the kernels.
    """
    channels = kernels.shape[-4:-2]
    taps = kernels.flatten(-4, -3).flatten(-2).mT
    real, imaginary = (wave @ taps for wave in waves.unbind(0))
    return real.unflatten(-1, channels), imaginary.unflatten(-1, channels)


def gram(real: Tensor, imaginary: Tensor) -> Tensor:
    """Complex Gram matrices of the small side of blocks, in three real products."""
    if real.shape[-2] <= real.shape[-1]:
        real, imaginary = real.mT, imaginary.mT
        sign = -1
    else:
        sign = 1
    both = torch.cat([real, imaginary], dim=-2)
    crossed = real.mT @ imaginary
    return torch.complex(both.mT @ both, sign * (crossed - crossed.mT))


def extreme_squares(real: Tensor, imaginary: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and smallest σ² of complex blocks; the latter to float64's rounding of the former."""
    small = gram(real, imaginary)
    if small.shape[-1] == 1:
        only = small[..., 0, 0].real
        return only, only
    values = torch.linalg.eigvalsh(small)
    return values[..., -1], values[..., 0]


def real_form(real: Tensor, imaginary: Tensor) -> Tensor:
    """(2 O, 2 I) real matrix of a complex one; it has every singular value twice."""
    top, bottom = torch.cat([real, imaginary], -1), torch.cat([-imaginary, real], -1)
    return torch.cat([top, bottom], -2)


def bound_steps(kernels: Tensor) -> int:
    """The promised number of steps, and more as long as the kernels stay small."""
    groups, out, inner, rows, cols = kernels.shape
    steps = _PROMISED_STEPS
    while steps < _MOST_STEPS:
        area = math.prod((side - 1) * 2 ** (steps + 1) + 1 for side in (rows, cols))
        if area * groups * min(out, inner) ** 2 > _GROWTH:
            break
        steps += 1
    return steps


def kernel_gram_bound(kernels: Tensor, steps: int) -> Tensor:
    """(G,) bounds on the spectral norm for zero padding or circular, of inputs of any size.

    K_{t+1} = K_t ⋆ K_t, then max_i (Σ_{j,k} |K_T,ij,k|)^(2^−T). The correlations are products of
    symbols on a grid that holds the last kernel whole. ε follows what the symbols have lost, in
    the Frobenius norm, and is charged to the sum.

    Args:
        kernels: (G, O, I, kh, kw) float64 kernels of stride 1.
        steps: number T of correlations, at least 1.

    Returns:
        (G,) float64 bounds, differentiable to any order.
    """
    size = kernels.detach().abs().amax()
    size = torch.where(size == 0, 1.0, size)
    kernels = kernels / size
    grid = tuple((side - 1) * 2**steps + 1 for side in kernels.shape[-2:])
    points = math.prod(grid)
    fft_loss = _FFT * UNIT * math.log2(points + 1)
    block = torch.fft.rfft2(kernels, s=grid).permute(0, 3, 4, 1, 2)
    lost = torch.full_like(kernels[:, 0, 0, 0, 0].detach(), fft_loss * math.sqrt(points))
    scales = [_largest_norm(block)]
    # The FFT's loss is relative to the scale already.
    lost = lost * scales[0]
    for _ in range(steps):
        divisor = torch.where(scales[-1] == 0, 1.0, scales[-1])
        block = block / divisor[:, None, None, None, None]
        lost = lost / divisor
        charge = COMPLEX * (max(block.shape[-2:]) + 8) * UNIT
        block = gram(block.real, block.imag)
        lost = 2 * lost + lost.square() + charge
        scales.append(_largest_norm(block))
    last = torch.fft.irfft2(block.permute(0, 3, 4, 1, 2), s=grid)
    terms = points * last.shape[1]
    bound = last.abs().sum(dim=(2, 3, 4)).amax(dim=1) * (1 + (terms + 8) * UNIT)
    bound = bound + math.sqrt(terms) * (lost + fft_loss * scales[-1])
    for scale in reversed(scales[:-1]):
        bound = torch.where(scale == 0, 0.0, scale * bound.sqrt() * (1 + 4 * UNIT))
    return bound * size * (1 + 4 * UNIT)


def _largest_norm(block: Tensor) -> Tensor:
    """(G,) largest Frobenius norm over the frequencies, a constant."""
    return torch.linalg.matrix_norm(block.detach()).flatten(1).amax(dim=1)
