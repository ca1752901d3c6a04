"""Benchmark of `batch_norm_relu` in training mode, in the layouts that layers leave behind.

Bytes counted per entry, with e the size of an element: 3 e for the forward pass (x twice, for the
statistics and for the output, and y) and 5 e more for the backward pass (x and the gradient twice,
and the gradient of x).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Call, Case, Provider
from tscnc_kernels import batch_norm_relu

ELEMENTS_MOVED = {"forward": 3, "forward_backward": 8}
SHAPES = {
    "16x64x32x32": (16, 64, 32, 32),
    "128x64x32x32": (128, 64, 32, 32),
    "128x256x8x8": (128, 256, 8, 8),
    "128x512x4x4": (128, 512, 4, 4),
    "128x2048": (128, 2048),
}
# What NCHW is to images, row-major is to features.
LAYOUTS = {4: ("", "-channels_last"), 2: ("", "-feature_major")}
# torch sums channels_last inputs in float32, and loses digits that NCHW keeps.
TOLERANCE = 1e-3


def _torch(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.batch_norm(input, None, None, weight, bias, True))


def _ours(backend: str, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return batch_norm_relu(input, None, None, weight, bias, True, backend=backend)


def _arranged(tensor: Tensor, layout: str) -> Tensor:
    if layout == "-channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.t().contiguous().t() if layout == "-feature_major" else tensor


def _inputs(
    shape: tuple[int, ...], layout: str, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, ...]:
    input = torch.randn(shape, generator=generator).to(device)
    weight = (torch.rand(shape[1], generator=generator) + 0.5).to(device)
    bias = torch.randn(shape[1], generator=generator).to(device)
    grad_output = torch.randn(shape, generator=generator).to(device)
    # No gradient where rounding decides on which side of the ReLU's kink an entry is.
    exact = F.batch_norm(input.double(), None, None, weight.double(), bias.double(), True)
    grad_output.masked_fill_(exact.abs() < TOLERANCE, 0)
    leaves = [_arranged(input, layout), weight, bias]
    return *(leaf.requires_grad_() for leaf in leaves), _arranged(grad_output, layout)


def _outputs(
    mode: str,
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    grad_output: Tensor,
) -> list[Tensor]:
    if mode == "forward":
        with torch.no_grad():
            return [function(input, weight, bias)]
    output = function(input, weight, bias)
    return [
        output.detach(),
        *torch.autograd.grad(output, (input, weight, bias), grad_output),
    ]


def _expected(mode: str, *arguments: Tensor) -> list[Tensor]:
    *leaves, grad_output = (tensor.detach().double() for tensor in arguments)
    return _outputs(mode, _torch, *(leaf.requires_grad_() for leaf in leaves), grad_output)


def _prepare(function: Callable[..., Tensor], case: Case, *arguments: Tensor) -> Call:
    return lambda: _outputs(case.mode, function, *arguments)


def _case(name: str, layout: str, mode: str) -> Case:
    dtype = torch.float32
    return Case(
        op="batch_norm_relu",
        mode=mode,
        shape=name + layout,
        dtype=dtype,
        inputs=partial(_inputs, SHAPES[name], layout),
        expected=partial(_expected, mode),
        work=ELEMENTS_MOVED[mode] * math.prod(SHAPES[name]) * dtype.itemsize,
        unit="GB/s",
        tolerance=TOLERANCE,
    )


CASES = [
    _case(name, layout, mode)
    for name, shape in SHAPES.items()
    for layout in LAYOUTS[len(shape)]
    for mode in ELEMENTS_MOVED
]
QUICK = [_case("16x64x32x32", layout, "forward_backward") for layout in LAYOUTS[4]]
PROVIDERS = [
    Provider("native", partial(_prepare, partial(_ours, "native"))),
    Provider("reference", partial(_prepare, partial(_ours, "reference"))),
    Provider("F.batch_norm", partial(_prepare, _torch)),
    Provider("torch.compile", partial(_prepare, torch.compile(_torch))),
]


def run(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    harness.main(CASES, PROVIDERS, QUICK, argv)


if __name__ == "__main__":
    run()
