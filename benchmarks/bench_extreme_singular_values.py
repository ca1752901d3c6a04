"""Benchmark of `extreme_singular_values`: both ends of one layer's matrix, or of a network's list.

Flops counted: m n² for the Gram matrix of the small side n and n³/3 for its factor, dense whatever
the sparsity. Peers get their good, tall orientation. "warm" starts from the state of weights that
differ by a relative 1e-3. Every provider must agree to 1e-3, the error that the op promises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Call, Case, Provider, UnavailableError
from tscnc_kernels import SparsityPattern, extreme_singular_values

PROMISED_ERROR = 1e-3
WARM_STEP = 1e-3

# Convolution weights as (out, in · kh · kw), and the square layers of the multi-layer perceptrons.
LAYERS = [(64, 576), (128, 1152), (256, 2304), (512, 4608), (512, 512), (1024, 1024)]
RESNET_18 = [
    (64, 147),
    *[(64, 576)] * 4,
    *[(128, 576), (128, 64), *[(128, 1152)] * 3],
    *[(256, 1152), (256, 128), *[(256, 2304)] * 3],
    *[(512, 2304), (512, 256), *[(512, 4608)] * 3],
    (1000, 512),
]

Arguments = tuple[list[Tensor], list[SparsityPattern] | None, Tensor | None]


def _inputs(
    shapes: Sequence[tuple[int, int]],
    sparsity: float,
    warm: bool,
    generator: torch.Generator,
    device: torch.device,
) -> Arguments:
    def draw(shape: tuple[int, int]) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    weights, patterns = [draw(shape) for shape in shapes], None
    if sparsity:
        masks = [torch.rand(w.shape, generator=generator).to(device) >= sparsity for w in weights]
        weights = [w * mask for w, mask in zip(weights, masks, strict=True)]
        patterns = [SparsityPattern.from_mask(mask) for mask in masks]
    state = None
    if warm:
        state = extreme_singular_values(weights, patterns).state
        noises = [draw(shape) for shape in shapes]
        if sparsity:
            noises = [noise * mask for noise, mask in zip(noises, masks, strict=True)]
        weights = [
            w + noise * (WARM_STEP * w.norm() / noise.norm())
            for w, noise in zip(weights, noises, strict=True)
        ]
    return [w.requires_grad_() for w in weights], patterns, state


def _outputs(mode: str, largest: Tensor, smallest: Tensor, weights: Sequence[Tensor]) -> Any:
    if mode != "forward_backward":
        return [largest, smallest]
    loss = (largest.log() - smallest.log()).sum()
    torch.autograd.grad(loss, weights)
    return [largest.detach(), smallest.detach()]


def _ours(method: str, case: Case, weights: list[Tensor], patterns: Any, state: Any) -> Call:
    def call() -> Any:
        result = extreme_singular_values(inputs, patterns, state, method=method)
        return _outputs(case.mode, result.sigma_max, result.sigma_min, inputs)

    inputs = weights if case.mode == "forward_backward" else [w.detach() for w in weights]
    return call


def _peer(ends: Callable[[Tensor], tuple[Tensor, Tensor]], case: Case, *arguments: Any) -> Call:
    weights = arguments[0]
    if case.mode != "forward_backward":
        weights = [w.detach() for w in weights]

    def call() -> Any:
        tall = [w if w.shape[0] >= w.shape[1] else w.mT.contiguous() for w in weights]
        largest, smallest = zip(*(ends(w) for w in tall), strict=True)
        return _outputs(case.mode, torch.stack(largest), torch.stack(smallest), weights)

    return call


def _svdvals(tall: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.linalg.svdvals(tall)
    return values[0], values[-1]


def _gram_eigvalsh(dtype: torch.dtype, tall: Tensor) -> tuple[Tensor, Tensor]:
    wide = tall.to(dtype)
    values = torch.linalg.eigvalsh(wide.mT @ wide).clamp(min=0).sqrt().to(tall.dtype)
    return values[-1], values[0]


def _expected(weights: Sequence[Tensor], *_: Any) -> list[Tensor]:
    values = [torch.linalg.svdvals(w.detach().double()) for w in weights]
    return [torch.stack([s[0] for s in values]), torch.stack([s[-1] for s in values])]


def _prepare_power(case: Case, *arguments: Any) -> Call:
    if case.mode == "warm":
        raise UnavailableError("one baseline, cold")
    return _ours("power", case, *arguments)


def _case(shapes: Sequence[tuple[int, int]], name: str, mode: str, sparsity: float = 0.0) -> Case:
    sides = [(max(shape), min(shape)) for shape in shapes]
    return Case(
        op="extreme_singular_values",
        mode=mode,
        shape=name,
        dtype=torch.float32,
        inputs=partial(_inputs, shapes, sparsity, mode == "warm"),
        expected=_expected,
        work=sum(m * n**2 + n**3 / 3 for m, n in sides),
        unit="GF/s",
        sparsity=sparsity,
        tolerance=PROMISED_ERROR,
    )


def _layer_cases(shape: tuple[int, int]) -> list[Case]:
    name = f"{shape[0]}x{shape[1]}"
    return [
        _case([shape], name, mode, sparsity)
        for sparsity in (0.0, 0.95)
        for mode in ("forward", "warm")
    ]


CASES = [
    *[case for shape in LAYERS for case in _layer_cases(shape)],
    _case(RESNET_18, "resnet-18", "forward_backward"),
    _case(RESNET_18, "resnet-18", "forward_backward", 0.95),
]
QUICK = [*_layer_cases((64, 576)), *_layer_cases((512, 512))]
PROVIDERS = [
    Provider("native", partial(_ours, "auto")),
    Provider("power iteration", _prepare_power),
    Provider("torch svdvals", partial(_peer, _svdvals)),
    Provider("gram32 + eigvalsh", partial(_peer, partial(_gram_eigvalsh, torch.float32))),
    Provider("gram64 + eigvalsh", partial(_peer, partial(_gram_eigvalsh, torch.float64))),
]


def run(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    harness.main(CASES, PROVIDERS, QUICK, argv)


if __name__ == "__main__":
    run()
