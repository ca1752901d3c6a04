"""Benchmark of `transformed_l1`: the penalty of a whole network's parameters in one call.

The op is bound by memory. Bytes counted per element: 4 to read the parameter, 4 more to write its
gradient; `value_and_gradient` is counted once for the read because one pass can serve both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Call, Case, Provider
from tscnc_kernels import transformed_l1
from tscnc_kernels.ops.transformed_l1 import reference

A = 1.0
BYTES_PER_ELEMENT = {"value": 4, "gradient": 8, "value_and_gradient": 8}


def wide_resnet_28_10() -> list[tuple[int, ...]]:
    """Return the parameter shapes of WRN-28-10 for 10 classes (36.5 M elements)."""
    shapes: list[tuple[int, ...]] = [(16, 3, 3, 3)]
    width = 16
    for stage_width in (160, 320, 640):
        for block in range(4):
            shapes += [(width,), (width,), (stage_width, width, 3, 3)]
            shapes += [(stage_width,), (stage_width,), (stage_width, stage_width, 3, 3)]
            if block == 0:
                shapes.append((stage_width, width, 1, 1))
            width = stage_width
    return [*shapes, (width,), (width,), (10, width), (10,)]


def vgg_16() -> list[tuple[int, ...]]:
    """Return the parameter shapes of VGG-16-BN in its CIFAR form (14.7 M elements)."""
    shapes: list[tuple[int, ...]] = []
    width = 3
    for out in (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512):
        shapes += [(out, width, 3, 3), (out,), (out,), (out,)]
        width = out
    return [*shapes, (10, width), (10,)]


NETWORKS = {"vgg-16": vgg_16, "wrn-28-10": wide_resnet_28_10}


def _inputs(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
) -> tuple[list[Tensor]]:
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return ([tensor.to(device, dtype).requires_grad_() for tensor in tensors],)


def _penalty(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([((A + 1) * t.abs() / (A + t.abs())).sum() for t in tensors]).sum()


def _outputs(mode: str, value: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    if mode == "value":
        return [value.detach()]
    gradients = list(torch.autograd.grad(value, tensors, retain_graph=mode == "gradient"))
    return gradients if mode == "gradient" else [value.detach(), *gradients]


def _expected(mode: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    return _outputs(mode, _penalty(wide), wide)


def _prepare(
    function: Callable[[Sequence[Tensor]], Tensor], case: Case, tensors: Sequence[Tensor]
) -> Call:
    if case.mode == "gradient":
        value = function(tensors)
        return lambda: _outputs(case.mode, value, tensors)
    if case.mode == "value":
        frozen = [tensor.detach() for tensor in tensors]
        return lambda: [function(frozen)]
    return lambda: _outputs(case.mode, function(tensors), tensors)


def _case(network: str, mode: str, dtype: torch.dtype) -> Case:
    shapes = NETWORKS[network]()
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    return Case(
        op="transformed_l1",
        mode=mode,
        shape=network,
        dtype=dtype,
        inputs=partial(_inputs, shapes, dtype),
        expected=partial(_expected, mode),
        work=BYTES_PER_ELEMENT[mode] * elements * dtype.itemsize / 4,
        unit="GB/s",
        rotate=True,
    )


CASES = [_case(network, mode, torch.float32) for network in NETWORKS for mode in BYTES_PER_ELEMENT]
QUICK = [_case("vgg-16", mode, torch.float32) for mode in BYTES_PER_ELEMENT]
PROVIDERS = [
    Provider("native", partial(_prepare, partial(transformed_l1, a=A, backend="native"))),
    Provider("reference", partial(_prepare, partial(transformed_l1, a=A, backend="reference"))),
    Provider("torch.compile", partial(_prepare, torch.compile(partial(reference, a=A)))),
]


def run(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    harness.main(CASES, PROVIDERS, QUICK, argv)


if __name__ == "__main__":
    run()
