"""Benchmark of `conv_singular_values`: both ends of a convolution's operator on images.

Flops counted for circular padding, whatever a provider does: per frequency of the half spectrum
8 m n² for the Gram matrix of the complex m × n symbol and 16 n³ / 3 for its eigenvalues, n ≤ m, the
stride's phases counted as channels. For zero padding, three squarings of symbols that hold the
last kernel. Every provider must agree to 1e-3, the error that the op promises.

In "warm" every call is a step of a walk: the kernel differs by a relative 1e-3 from the one whose
call returned its state, and that one's call was warm as well, so that what a start knows after many
steps is measured. "max" is of sigma_max alone, which ours computes with the other end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import harness
from benchmarks.harness import Call, Case, Provider, UnavailableError
from tscnc_kernels import conv_singular_values

PROMISED_ERROR = 1e-3
WARM_STEP = 1e-3
# Warm calls before those that are timed, and kernels of the walk that are.
WARM_UP, WALK = 6, 4
GRAM_STEPS, POWER_STEPS = 6, 50
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
) -> tuple[Layer, list[Tensor], list[Tensor | None]]:
    """Kernels, and for each the state of the call before it on a walk."""
    shape = (layer.out, layer.inner, layer.side, layer.side)
    kernel = torch.randn(shape, generator=generator).to(device)
    kernels, states = [kernel], [None]
    for _ in range(WARM_UP + WALK if warm else 0):
        found = conv_singular_values(
            kernels[-1], layer.image, stride=layer.stride, state=states[-1]
        )
        noise = torch.randn(shape, generator=generator).to(device)
        step = noise * (WARM_STEP * kernel.norm() / noise.norm())
        kernels, states = [*kernels, kernels[-1] + step], [*states, found.state]
    return layer, [k.requires_grad_() for k in kernels[-WALK:]], states[-WALK:]


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


def _expected(mode: str, layer: Layer, kernels: list[Tensor], *_: Any) -> list[Tensor]:
    exact = kernels[0].detach().double()
    if mode == "zeros":
        return [_kernel_gram(exact)]
    ends = _svdvals(_symbols(layer, exact, half=True))
    return [ends[0]] if mode == "max" else list(ends)


def _finish(mode: str, ends: Sequence[Tensor], kernel: Tensor) -> list[Tensor]:
    if mode == "forward_backward":
        torch.autograd.grad(ends[0].log() - ends[1].log(), kernel)
    return [end.detach() for end in ends]


def _turns(case: Case, kernels: list[Tensor], call: Callable[[int, Tensor], Any]) -> Call:
    """A call that takes the kernels in turn, with their gradients where the mode wants some."""
    wanted = case.mode == "forward_backward"
    weights = [kernel if wanted else kernel.detach() for kernel in kernels]
    turn = itertools.cycle(range(len(weights)))

    def one() -> Any:
        index = next(turn)
        return call(index, weights[index])

    return one


def _ours(case: Case, layer: Layer, kernels: list[Tensor], states: list[Tensor | None]) -> Call:
    def call(index: int, kernel: Tensor) -> list[Tensor]:
        if case.mode == "zeros":
            return [conv_singular_values(kernel, layer.image, "zeros", layer.stride).sigma_max]
        found = conv_singular_values(kernel, layer.image, stride=layer.stride, state=states[index])
        ends = (found.sigma_max, found.sigma_min)
        return _finish(case.mode, ends[:1] if case.mode == "max" else ends, kernel)

    return _turns(case, kernels, call)


def _peer(ends: Ends, half: bool, case: Case, layer: Layer, kernels: list[Tensor], *_: Any) -> Call:
    if case.mode in ("zeros", "max"):
        raise UnavailableError("both ends of circular padding only")
    return _turns(case, kernels, lambda _, k: _finish(case.mode, ends(_symbols(layer, k, half)), k))


def _circular_gram(blocks: Tensor) -> Tensor:
    """Gram iteration on the symbols, as published: one block's scale each, then their maximum."""
    power, logs = blocks, torch.zeros(len(blocks))
    for _ in range(GRAM_STEPS):
        scale = torch.linalg.matrix_norm(power)
        power, logs = power / scale[:, None, None], 2 * (logs + scale.log())
        power = power.mH @ power
    return ((torch.linalg.matrix_norm(power).log() + logs) / 2**GRAM_STEPS).amax().exp()


def _prepare_gram(case: Case, layer: Layer, kernels: list[Tensor], *_: Any) -> Call:
    if case.mode == "max":
        return _turns(case, kernels, lambda _, k: [_circular_gram(_symbols(layer, k, True))])
    if case.mode == "zeros":
        return _turns(case, kernels, lambda _, k: [_kernel_gram(k)])
    raise UnavailableError("sigma_max only")


def _prepare_power(case: Case, layer: Layer, kernels: list[Tensor], *_: Any) -> Call:
    """Fifty steps on the images, the usual way to regularise a convolution."""
    if case.mode != "max" or layer.stride > 1:
        raise UnavailableError("sigma_max of stride 1 only")
    border = layer.side - 1

    def call(_: int, kernel: Tensor) -> list[Tensor]:
        image = torch.ones(1, layer.inner, layer.image, layer.image)
        image[0, 0, 0, 0] += layer.image
        adjoint = kernel.transpose(0, 1).flip(2, 3)
        for _ in range(POWER_STEPS):
            image = image / image.norm()
            out = functional.conv2d(functional.pad(image, (0, border) * 2, "circular"), kernel)
            image = functional.conv2d(functional.pad(out, (border, 0) * 2, "circular"), adjoint)
        return [image.norm().sqrt()]

    return _turns(case, kernels, call)


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
        expected=partial(_expected, mode),
        work=work,
        unit="GF/s",
        tolerance=PROMISED_ERROR,
    )


CASES = [
    *[_case(layer, mode) for layer in LAYERS for mode in CIRCULAR_MODES],
    _case(LAYERS[0], "max"),
    _case(LAYERS[0], "zeros"),
    _case(LAYERS[2], "zeros"),
]
QUICK = [_case(Layer(16, 16, 3, 32), mode) for mode in CIRCULAR_MODES]
PROVIDERS = [
    Provider("conv_singular_values", _ours),
    Provider("full fft + svdvals", partial(_peer, _svdvals, False)),
    Provider("half spectrum + svdvals", partial(_peer, _svdvals, True)),
    Provider("half, gram64 + eigvalsh", partial(_peer, _gram_eigvalsh, True)),
    Provider("gram iteration", _prepare_gram),
    Provider(f"power iteration {POWER_STEPS}", _prepare_power),
]


def essential(case: Case, provider: Provider) -> bool:
    """The layer with targets."""
    return case.shape in (LAYERS[0].name, QUICK[0].shape)


def run(argv: Sequence[str] | None = None) -> list[harness.results.Row]:
    """Measure and print; see `--help`."""
    return harness.main(CASES, PROVIDERS, QUICK, argv, essential)


if __name__ == "__main__":
    run()
