"""Benchmark of `masked_conv2d` beside dense convolutions and SparseProp's, random masks.

Work is counted on the kept entries alone, for every provider: 2·B·OH·OW·nnz flops forward, three
times that with the gradients of the input and of the weight. All columns include bias, autograd and
layout conversions; the dense layer's weight gradient is masked, as ours is. SparseProp has two
convolutions, vectorised over the batch and over the output's width: both are measured, and the
better one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import harness, ours, peers
from benchmarks.harness import Call, Case, Provider, Timed, UnavailableError
from benchmarks.peers import Layer, Problem
from tscnc_kernels import masked_conv2d
from tscnc_kernels._autotune import DENSE
from tscnc_kernels._masked_cuda import CONV_SPARSE
from tscnc_kernels.ops.masked_conv2d import ALGORITHMS


@dataclass(frozen=True)
class Shape:
    """A square convolution that keeps the size at stride 1."""

    batch: int
    channels: int
    size: int
    outputs: int = 0
    kernel: int = 3
    stride: int = 1

    @property
    def padding(self) -> int:
        """What keeps the size at stride 1."""
        return self.kernel // 2

    @property
    def weight(self) -> tuple[int, int, int, int]:
        """(out, in, kh, kw)."""
        return (self.outputs or self.channels, self.channels, self.kernel, self.kernel)

    @property
    def output_size(self) -> int:
        """Height and width of the output."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def name(self) -> str:
        """Batch, channels and size, such as "16x64c56-3x3" or "16x64c56-128c-3x3s2"."""
        outputs = f"-{self.outputs}c" if self.outputs else ""
        stride = f"s{self.stride}" if self.stride > 1 else ""
        kernel = f"{self.kernel}x{self.kernel}{stride}"
        return f"{self.batch}x{self.channels}c{self.size}{outputs}-{kernel}"


# ResNet-18's stages on 224² images, then the layers of the CIFAR networks.
STAGES = [Shape(16, 64, 56), Shape(16, 128, 28), Shape(16, 256, 14), Shape(16, 512, 7)]
SHAPES = [*STAGES, Shape(16, 64, 32)]
DEEP_SHAPES = [Shape(batch, *layer) for layer in ((256, 8), (512, 4)) for batch in (16, 64)]
OTHER_SHAPES = [
    Shape(16, 256, 14, kernel=1),
    Shape(16, 64, 56, 128, stride=2),
    Shape(16, 64, 56, 128, kernel=1, stride=2),
]
SPARSITIES = [0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999]
MODES = ["forward", "forward_backward"]
# torch's own weight gradient sums 50 000 products of a 56² layer one after the other in fp32.
TOLERANCE = 5e-5


def inputs(
    shape: Shape, sparsity: float, generator: torch.Generator, device: torch.device
) -> tuple[Problem]:
    """Draw a layer whose outputs have unit size at any sparsity."""
    mask = torch.rand(shape.weight, generator=generator) >= sparsity
    rows, channels = shape.weight[:2]
    scale = max(1.0, (1 - sparsity) * channels * shape.kernel**2) ** -0.5
    weight = torch.randn(shape.weight, generator=generator) * scale * mask
    draw = [
        (shape.batch, channels, shape.size, shape.size),
        (rows,),
        (shape.batch, rows, shape.output_size, shape.output_size),
    ]
    input, bias, gradient = (torch.randn(size, generator=generator) for size in draw)
    tensors = (t.to(device) for t in (input, weight, mask, bias, gradient))
    return (Problem(*tensors, stride=shape.stride, padding=shape.padding),)


def case(shape: Shape, sparsity: float, mode: str) -> Case:
    """One cell of the table."""
    pixels = shape.batch * shape.output_size**2
    dense_work = 2.0 * pixels * torch.Size(shape.weight).numel() * (1 if mode == "forward" else 3)
    return Case(
        op="masked_conv2d",
        mode=mode,
        shape=shape.name,
        dtype=torch.float32,
        inputs=partial(inputs, shape, sparsity),
        expected=partial(peers.expected, mode),
        work=(1 - sparsity) * dense_work,
        dense_work=dense_work,
        unit="GF/s",
        sparsity=sparsity,
        tolerance=TOLERANCE,
    )


def _peer(adapter: Callable[[Problem], Layer], case: Case, problem: Problem) -> Timed:
    return ours.timed(case.mode, problem, adapter(problem))


def _ours(values: bool, algorithm: str | None, case: Case, problem: Problem) -> Timed:
    if problem.input.is_cuda and algorithm not in (None, DENSE, *CONV_SPARSE):
        raise UnavailableError("not on CUDA")
    layer = ours.layer(masked_conv2d, values, algorithm, problem)
    return ours.timed(case.mode, problem, layer)


def _raw(case: Case, problem: Problem) -> Call:
    return ours.raw_ops(case.mode, problem, ours.layer(masked_conv2d, True, None, problem))


def _fill(case: Case, problem: Problem) -> Callable[[], Tensor]:
    if case.mode == "forward":
        raise UnavailableError("the forward product has no gradient")
    return lambda: torch.empty_like(problem.weight).zero_()


CASES = [
    case(shape, s, mode)
    for mode in reversed(MODES)
    for shape in (*SHAPES, *DEEP_SHAPES, *OTHER_SHAPES)
    for s in SPARSITIES
]
QUICK = [case(STAGES[2], s, "forward_backward") for s in (0.8, 0.9, 0.99)]
SPARSEPROP = ("SparseProp over batch", "SparseProp over width")
PROVIDERS = [
    Provider("ours, values", partial(_ours, True, None)),
    Provider("ours, dense weight", partial(_ours, False, None)),
    *[Provider(f"ours, {name}", partial(_ours, True, name)) for name in ALGORITHMS],
    Provider("ours, raw ops", _raw, gated=False),
    Provider("weight gradient fill", _fill, gated=False),
    Provider("F.conv2d", partial(_peer, peers.dense)),
    Provider("F.conv2d(W * mask)", partial(_peer, peers.multiplied)),
    Provider(SPARSEPROP[0], partial(_peer, partial(peers.sparseprop_conv, False))),
    Provider(SPARSEPROP[1], partial(_peer, partial(peers.sparseprop_conv, True))),
]
TABLE = {shape.name for shape in (*SHAPES, *DEEP_SHAPES)}
TRAINING = {
    *("ours, values", "ours, dense weight", "weight gradient fill", "F.conv2d"),
    *SPARSEPROP,
}


def essential(case: Case, provider: Provider) -> bool:
    """What the table of targets needs."""
    in_table = case.mode == "forward_backward" and case.shape in TABLE
    return in_table and provider.name in TRAINING


def run(argv: Sequence[str] | None = None) -> list[harness.results.Row]:
    """Measure and print; see `--help`."""
    return harness.main(CASES, PROVIDERS, QUICK, argv, essential)


if __name__ == "__main__":
    run()
