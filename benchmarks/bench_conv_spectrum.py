"""Benchmark of `conv_singular_values`: both ends of a convolution's operator on images.

Flops counted for circular padding, whatever a provider does: per frequency of the half spectrum
8 m n² for the Gram matrix of the complex m × n symbol and 16 n³ / 3 for its eigenvalues, n ≤ m, the
stride's phases counted as channels. For zero padding, three squarings of symbols that hold the
last kernel. "warm" starts from the state of weights that differ by a relative 1e-3. Every provider
must agree to 1e-3, the error that the op promises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import harness
from benchmarks.harness import Call, Case, Provider, UnavailableError
from tscnc_kernels import conv_singular_values

PROMISED_ERROR = 1e-3
WARM_STEP = 1e-3
KERNEL_GRAM_STEPS = 3


@dataclass(frozen=True)
class Layer:
    """A convolution on square images."""

    out: int
    inner: int
    side: int
    image: int
    stride: int = 1

    @property
    def name(self) -> str:
        step = f"-s{self.stride}" if self.stride > 1 else ""
        return f"{self.inner}-{self.out}-{self.side}x{self.side}{step}-on-{self.image}"

    @property
    def channels(self) -> tuple[int, int]:
        """Larger and smaller side of the symbols."""
        sides = (self.out, self.inner * self.stride**2)
        return max(sides), min(sides)


# Of ResNet-18 on 32 x 32 images, VGG-16, and a stem.
LAYERS = [
    Layer(64, 64, 3, 32),
    Layer(128, 64, 3, 32, 2),
    Layer(128, 128, 3, 16),
    Layer(256, 256, 3, 8),
    Layer(64, 3, 3, 32),
    Layer(16, 16, 7, 56),
]
CIRCULAR_MODES = ("forward", "warm", "forward_backward")
Ends = Callable[[Tensor], tuple[Tensor, Tensor]]


def _inputs(
    layer: Layer, warm: bool, generator: torch.Generator, device: torch.device
) -> tuple[Layer, Tensor, Tensor | None]:
    shape = (layer.out, layer.inner, layer.side, layer.side)
    kernel, state = torch.randn(shape, generator=generator).to(device), None
    if warm:
        state = conv_singular_values(kernel, layer.image, stride=layer.stride).state
        noise = torch.randn(shape, generator=generator).to(device)
        kernel = kernel + noise * (WARM_STEP * kernel.norm() / noise.norm())
    return layer, kernel.requires_grad_(), state


def _symbols(layer: Layer, kernel: Tensor, half: bool) -> Tensor:
    """(frequencies, O, I) symbols by an FFT, the stride's phases as channels."""
    grid, step = layer.image // layer.stride, layer.stride
    size = -(-layer.side // step) * step
    padded = functional.pad(kernel, (0, size - layer.side) * 2)
    folded = padded.reshape(layer.out, layer.inner, size // step, step, size // step, step)
    folded = folded.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
    fft = torch.fft.rfft2 if half else torch.fft.fft2
    blocks = fft(folded, s=(grid, grid)).permute(2, 3, 0, 1).flatten(0, 1)
    return blocks if blocks.shape[1] >= blocks.shape[2] else blocks.mH.contiguous()


def _svdvals(blocks: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.linalg.svdvals(blocks)
    return values[:, 0].amax(), values[:, -1].amin()


def _gram_eigvalsh(blocks: Tensor) -> tuple[Tensor, Tensor]:
    wide = blocks.to(torch.complex128)
    values = torch.linalg.eigvalsh(wide.mH @ wide).clamp(min=0).sqrt().float()
    return values[:, -1].amax(), values[:, 0].amin()


def _kernel_gram(kernel: Tensor) -> Tensor:
    """The bound for zero padding by convolving the kernel with itself, as published."""
    if kernel.shape[0] > kernel.shape[1]:
        kernel = kernel.transpose(0, 1).flip(2, 3)
    logs = torch.zeros((), dtype=kernel.dtype, device=kernel.device)
    for _ in range(KERNEL_GRAM_STEPS):
        scale = kernel.norm()
        kernel, logs = kernel / scale, 2 * (logs + scale.log())
        kernel = functional.conv2d(kernel, kernel, padding=kernel.shape[-1] - 1)
    rows = kernel.abs().sum(dim=(1, 2, 3)).amax()
    return ((rows.log() + logs) / 2**KERNEL_GRAM_STEPS).exp()


def _expected(padding: str, layer: Layer, kernel: Tensor, state: Tensor | None) -> list[Tensor]:
    exact = kernel.detach().double()
    if padding == "zeros":
        return [_kernel_gram(exact)]
    return list(_svdvals(_symbols(layer, exact, half=True)))


def _finish(mode: str, ends: Sequence[Tensor], kernel: Tensor) -> list[Tensor]:
    if mode == "forward_backward":
        torch.autograd.grad(ends[0].log() - ends[1].log(), kernel)
    return [end.detach() for end in ends]


def _ours(case: Case, layer: Layer, kernel: Tensor, state: Tensor | None) -> Call:
    weight = kernel if case.mode == "forward_backward" else kernel.detach()

    def call() -> list[Tensor]:
        if case.mode == "zeros":
            return [conv_singular_values(weight, layer.image, "zeros", layer.stride).sigma_max]
        found = conv_singular_values(weight, layer.image, stride=layer.stride, state=state)
        return _finish(case.mode, (found.sigma_max, found.sigma_min), weight)

    return call


def _peer(
    ends: Ends, half: bool, case: Case, layer: Layer, kernel: Tensor, state: Tensor | None
) -> Call:
    if case.mode == "zeros":
        raise UnavailableError("circular padding only")
    weight = kernel if case.mode == "forward_backward" else kernel.detach()
    return lambda: _finish(case.mode, ends(_symbols(layer, weight, half)), weight)


def _prepare_kernel_gram(case: Case, layer: Layer, kernel: Tensor, state: Tensor | None) -> Call:
    if case.mode != "zeros":
        raise UnavailableError("zero padding only")
    weight = kernel.detach()
    return lambda: [_kernel_gram(weight)]


def _case(layer: Layer, mode: str) -> Case:
    m, n = layer.channels
    grid = layer.image // layer.stride
    work = (grid * grid // 2 + 2) * (8 * m * n**2 + 16 * n**3 / 3)
    if mode == "zeros":
        side = (layer.side - 1) * 2**KERNEL_GRAM_STEPS + 1
        work = math.ceil(side * side / 2) * (8 * m * n**2 + 2 * 8 * n**3)
    return Case(
        op="conv_spectrum",
        mode=mode,
        shape=layer.name,
        dtype=torch.float32,
        inputs=partial(_inputs, layer, mode == "warm"),
        expected=partial(_expected, "zeros" if mode == "zeros" else "circular"),
        work=work,
        unit="GF/s",
        tolerance=PROMISED_ERROR,
    )


CASES = [
    *[_case(layer, mode) for layer in LAYERS for mode in CIRCULAR_MODES],
    _case(LAYERS[0], "zeros"),
    _case(LAYERS[2], "zeros"),
]
QUICK = [_case(Layer(16, 16, 3, 32), mode) for mode in CIRCULAR_MODES]
PROVIDERS = [
    Provider("conv_singular_values", _ours),
    Provider("full fft + svdvals", partial(_peer, _svdvals, False)),
    Provider("half spectrum + svdvals", partial(_peer, _svdvals, True)),
    Provider("half, gram64 + eigvalsh", partial(_peer, _gram_eigvalsh, True)),
    Provider("direct kernel-gram", _prepare_kernel_gram),
]


def run(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    harness.main(CASES, PROVIDERS, QUICK, argv)


if __name__ == "__main__":
    run()
