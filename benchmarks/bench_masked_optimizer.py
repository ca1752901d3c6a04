"""Benchmark of `masked_sgd_step` and `masked_adamw_step`, through the optimizers that call them.

One weight and its bias are stepped: of a dense Linear (sparsity 0), of a MaskedLinear with a dense
weight, and of one in values mode ("…_values"), where the peers step the same flat tensor. The
buffers exceed the last-level cache in turn, as after a forward and a backward pass.

Bytes counted per kept entry, with e the size of an element: 7 e for AdamW (parameter, gradient and
two moments in, all but the gradient out) and 5 e for SGD with momentum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import tscnc_kernels
from benchmarks import harness
from benchmarks.harness import Call, Case, Provider
from tscnc_kernels import SparsityPattern
from tscnc_kernels.nn import MaskedLinear
from tscnc_kernels.optim import MaskedAdamW, MaskedSGD

SHAPES = {"2048x2048": (2048, 2048), "512x4608": (512, 4608), "300x784": (300, 784)}
SPARSITIES = (0.0, 0.5, 0.9, 0.95, 0.99, 0.999)
ADAMW = {"lr": 1e-3, "weight_decay": 1e-2}
SGD = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 5e-4}
ELEMENTS_MOVED = {"adamw": 7, "sgd": 5}


def _inputs(
    shape: tuple[int, int], sparsity: float, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    weight, gradient = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    mask = (torch.rand(shape, generator=generator) >= sparsity).to(device)
    return weight * mask, gradient * mask, mask


def _layer(mode: str, weight: Tensor, mask: Tensor) -> nn.Module:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
    linear.weight = nn.Parameter(weight.clone())
    if bool(mask.all()):
        return linear
    values = mode.endswith("_values")
    return MaskedLinear.from_linear(linear, mask, "values" if values else "dense")


def _masked(mode: str, layer: nn.Module) -> torch.optim.Optimizer:
    if mode.startswith("adamw"):
        return MaskedAdamW(layer.parameters(), **ADAMW, model=layer)
    return MaskedSGD(layer.parameters(), **SGD, model=layer)


def _torch(options: dict[str, bool], mode: str, layer: nn.Module) -> torch.optim.Optimizer:
    if mode.startswith("adamw"):
        return torch.optim.AdamW(layer.parameters(), **ADAMW, **options)
    return torch.optim.SGD(layer.parameters(), **SGD, **options)


def _expected(mode: str, weight: Tensor, gradient: Tensor, mask: Tensor) -> list[Tensor]:
    layer = _layer("", weight.double(), torch.ones_like(mask))
    layer.weight.grad = gradient.double()
    _torch({}, mode, layer).step()
    dense = layer.weight.detach()
    return [dense[mask] if mode.endswith("_values") else dense]


def _prepare(
    make: Callable[[str, nn.Module], torch.optim.Optimizer],
    case: Case,
    weight: Tensor,
    gradient: Tensor,
    mask: Tensor,
) -> Call:
    layer = _layer(case.mode, weight, mask)
    values = layer.weight.dim() == 1
    pattern = SparsityPattern.from_mask(mask) if values else None
    layer.weight.grad = pattern.gather(gradient) if pattern else gradient.clone()
    layer.bias.grad = torch.ones_like(layer.bias)
    optimizer = make(case.mode, layer)

    def call() -> list[Tensor]:
        optimizer.step()
        return [layer.weight]

    return call


def _reference(case: Case, *arguments: Tensor) -> Call:
    native = _prepare(_masked, case, *arguments)

    def call() -> list[Tensor]:
        with tscnc_kernels.use_backend("reference"):
            return list(native())

    return call


def _compiled(mode: str, layer: nn.Module) -> torch.optim.Optimizer:
    optimizer = _torch({}, mode, layer)
    optimizer.step = torch.compile(optimizer.step)  # type: ignore[method-assign]
    return optimizer


def _case(shape: str, mode: str, sparsity: float) -> Case:
    dtype, (rows, width) = torch.float32, SHAPES[shape]
    entries = rows * width * (1 - sparsity)
    return Case(
        op="masked_optimizer",
        mode=mode,
        shape=shape,
        dtype=dtype,
        inputs=partial(_inputs, SHAPES[shape], sparsity),
        expected=partial(_expected, mode),
        work=ELEMENTS_MOVED[mode.removesuffix("_values")] * entries * dtype.itemsize,
        unit="GB/s",
        sparsity=sparsity,
        rotate=True,
    )


CASES = [
    _case(shape, mode + suffix, sparsity)
    for shape in SHAPES
    for mode in ELEMENTS_MOVED
    for sparsity in SPARSITIES
    for suffix in (("", "_values") if sparsity else ("",))
]
QUICK = [_case("2048x2048", "adamw", 0.99), _case("2048x2048", "adamw_values", 0.99)]
PROVIDERS = [
    Provider("native", partial(_prepare, _masked)),
    Provider("reference", _reference),
    Provider("torch foreach", partial(_prepare, partial(_torch, {"foreach": True}))),
    Provider("torch fused", partial(_prepare, partial(_torch, {"fused": True}))),
    Provider("torch.compile", partial(_prepare, _compiled)),
]


def run(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    harness.main(CASES, PROVIDERS, QUICK, argv)


if __name__ == "__main__":
    run()
