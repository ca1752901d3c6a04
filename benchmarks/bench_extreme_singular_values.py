"""Benchmark of `extreme_singular_values`: both ends of one layer's matrix, or of a network's list.

Flops counted: m n² for the Gram matrix of the small side n and n³/3 for its factor, dense whatever
the sparsity. Peers get their good, tall orientation. Every provider must agree to 1e-3, the error
that the op promises.

In the "warm" modes the weights move by a relative 1e-3 before every call, outside of the timing,
and nothing is remembered but the `state` of the call before. On CUDA "passes alone" are measured
too, one launch for the whole list. "max" and "warm_max" want σ_max alone; "spectral_norm" times the
parametrized weight W / σ_max(W) of a training step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as torch_parametrizations

from benchmarks import harness
from benchmarks.harness import Call, Case, Provider, Stepped, Timed, UnavailableError
from tscnc_kernels import SparsityPattern, extreme_singular_values
from tscnc_kernels.nn.utils import parametrizations

PROMISED_ERROR = 1e-3
WARM_STEP = 1e-3

# Convolution weights as (out, in · kh · kw), and the square layers of the multi-layer perceptrons.
SQUARES = [(512, 512), (2048, 2048)]
LAYERS = [(64, 576), (128, 1152), (256, 2304), (512, 4608), (512, 512), (1024, 1024)]
# Many small matrices of one side: how many, and the side.
BATCHES = [(256, 32), (64, 64), (64, 128)]
RESNET_18 = [
    (64, 147),
    *[(64, 576)] * 4,
    *[(128, 576), (128, 64), *[(128, 1152)] * 3],
    *[(256, 1152), (256, 128), *[(256, 2304)] * 3],
    *[(512, 2304), (512, 256), *[(512, 4608)] * 3],
    (1000, 512),
]

POWER_STEPS = 5


class Walk:
    """Steps of a relative 1e-3 along two directions and back again, in place."""

    def __init__(self, weights: Sequence[Tensor], noises: Sequence[list[Tensor]]) -> None:
        self.weights = weights
        self.noises = noises
        self.taken = 0

    def step(self) -> None:
        """Move all weights."""
        direction, sign = self.taken % 2, 1 - 2 * (self.taken // 2 % 2)
        self.taken += 1
        with torch.no_grad():
            for weight, noise in zip(self.weights, self.noises[direction], strict=True):
                weight.add_(noise, alpha=sign)


Arguments = tuple[list[Tensor], list[SparsityPattern] | None, Walk]


def _is_warm(case: Case) -> bool:
    return case.mode in ("warm", "warm_max", "warm_forward_backward", "spectral_norm")


def _wants(case: Case) -> str:
    return "max" if case.mode in ("max", "warm_max") else "both"


def _inputs(
    shapes: Sequence[tuple[int, int]],
    sparsity: float,
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
) -> Arguments:
    def draw(shape: tuple[int, int]) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    weights, patterns = [draw(shape) for shape in shapes], None
    masks = [torch.ones_like(weight) for weight in weights]
    if sparsity:
        kept = [torch.rand(w.shape, generator=generator).to(device) >= sparsity for w in weights]
        masks = [keep.to(dtype) for keep in kept]
        patterns = [SparsityPattern.from_mask(keep) for keep in kept]
        weights = [weight * mask for weight, mask in zip(weights, masks, strict=True)]
    noises: list[list[Tensor]] = [[], []]
    for direction in noises:
        for weight, mask in zip(weights, masks, strict=True):
            noise = draw((weight.shape[0], weight.shape[1])) * mask
            direction.append(noise * (WARM_STEP * weight.norm() / noise.norm()))
    weights = [weight.requires_grad_() for weight in weights]
    return weights, patterns, Walk(weights, noises)


def _outputs(case: Case, largest: Tensor, smallest: Tensor, weights: Sequence[Tensor]) -> Any:
    if _wants(case) == "max":
        return [largest.detach()]
    if "backward" in case.mode:
        loss = (largest.log() - smallest.log()).sum()
        torch.autograd.grad(loss, weights)
    return [largest.detach(), smallest.detach()]


def _moving(case: Case, walk: Walk, call: Call, remembers: bool = False) -> Call:
    if not _is_warm(case):
        return call
    # Once round for what remembers, so that the gate already looks at a warm call.
    for _ in range(4 if remembers else 0):
        walk.step()
        call()
    return Stepped(call, walk.step)


def _ours(
    method: Any, case: Case, weights: list[Tensor], patterns: Any, walk: Walk
) -> Call | Timed:
    if case.mode == "spectral_norm":
        return _parametrized(parametrizations.spectral_norm, case, weights, patterns, walk)
    inputs = weights if "backward" in case.mode else [w.detach() for w in weights]
    ends: Any = _wants(case)
    state: Tensor | None = None

    def call() -> Any:
        nonlocal state
        result = extreme_singular_values(inputs, patterns, state, method=method, ends=ends)
        if _is_warm(case):
            state = result.state
        return _outputs(case, result.sigma_max, result.sigma_min, inputs)

    return _moving(case, walk, call, remembers=True)


def _parametrized(
    spectral_norm: Callable[[nn.Module], nn.Module],
    case: Case,
    weights: list[Tensor],
    _: Any,
    walk: Walk,
) -> Timed:
    (weight,) = weights
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.detach())
    spectral_norm(layer)

    def call() -> Tensor:
        with torch.no_grad():
            normalized: Tensor = layer.weight
        return normalized

    def sigma(normalized: Tensor) -> list[Tensor]:
        return [(weight.detach().norm() / normalized.norm())[None]]

    return Timed(_moving(case, walk, call, remembers=True), sigma)


def _torch_spectral_norm(case: Case, *arguments: Any) -> Timed:
    if case.mode != "spectral_norm":
        raise UnavailableError("times the parametrized weight")
    return _parametrized(torch_parametrizations.spectral_norm, case, *arguments)


def _peer(
    ends: Callable[[Tensor], tuple[Tensor, Tensor]],
    case: Case,
    weights: list[Tensor],
    _: Any,
    walk: Walk,
) -> Call:
    inputs = weights if "backward" in case.mode else [w.detach() for w in weights]

    def call() -> Any:
        tall = [w if w.shape[0] >= w.shape[1] else w.mT.contiguous() for w in inputs]
        largest, smallest = zip(*(ends(w) for w in tall), strict=True)
        if case.mode == "spectral_norm":
            return [torch.stack(largest)]
        return _outputs(case, torch.stack(largest), torch.stack(smallest), weights)

    return _moving(case, walk, call)


def _power_steps(case: Case, weights: list[Tensor], _: Any, walk: Walk) -> Call:
    """Power iteration from the vectors of the call before."""
    if case.mode != "warm_max":
        raise UnavailableError("for sigma_max alone, warm")
    inputs = [w.detach() for w in weights]
    vectors = [torch.linalg.svd(w).Vh[0] for w in inputs]

    def call() -> list[Tensor]:
        sigmas = []
        for index, w in enumerate(inputs):
            for _ in range(POWER_STEPS):
                v = w.mT @ (w @ vectors[index])
                vectors[index] = v / v.norm()
            sigmas.append((w @ vectors[index]).norm())
        return [torch.stack(sigmas)]

    return _moving(case, walk, call, remembers=True)


def _svdvals(tall: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.linalg.svdvals(tall)
    return values[0], values[-1]


def _gram_eigvalsh(dtype: torch.dtype, tall: Tensor) -> tuple[Tensor, Tensor]:
    wide = tall.to(dtype)
    values = torch.linalg.eigvalsh(wide.mT @ wide).clamp(min=0).sqrt().to(tall.dtype)
    return values[-1], values[0]


def _expected(mode: str, weights: Sequence[Tensor], *_: Any) -> list[Tensor]:
    values = [torch.linalg.svdvals(w.detach().double()) for w in weights]
    largest = torch.stack([s[0] for s in values])
    if mode in ("max", "warm_max", "spectral_norm"):
        return [largest]
    return [largest, torch.stack([s[-1] for s in values])]


def _prepare_power(case: Case, *arguments: Any) -> Call | Timed:
    if case.mode not in ("forward", "forward_backward"):
        raise UnavailableError("one baseline, cold")
    return _ours("power", case, *arguments)


def _prepare_passes(case: Case, weights: list[Tensor], *rest: Any) -> Call | Timed:
    if not _is_warm(case) or case.mode == "spectral_norm" or not weights[0].is_cuda:
        raise UnavailableError("a choice for CUDA, warm")
    return _ours("passes", case, weights, *rest)


def _prepare_gram32(case: Case, *arguments: Any) -> Call:
    if case.dtype == torch.float64:
        raise UnavailableError("not in the precision asked for")
    return _peer(partial(_gram_eigvalsh, torch.float32), case, *arguments)


def _case(
    shapes: Sequence[tuple[int, int]],
    name: str,
    mode: str,
    sparsity: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Case:
    sides = [(max(shape), min(shape)) for shape in shapes]
    return Case(
        op="extreme_singular_values",
        mode=mode,
        shape=name,
        dtype=dtype,
        inputs=partial(_inputs, shapes, sparsity, dtype),
        expected=partial(_expected, mode),
        work=sum(m * n**2 + n**3 / 3 for m, n in sides),
        unit="GF/s",
        sparsity=sparsity,
        tolerance=PROMISED_ERROR,
    )


def _batch_cases(count: int, side: int) -> list[Case]:
    shapes, name = [(side, side)] * count, f"{count}x{side}x{side}"
    return [_case(shapes, name, mode) for mode in ("forward", "warm")]


def _layer_cases(shape: tuple[int, int]) -> list[Case]:
    name = f"{shape[0]}x{shape[1]}"
    return [
        _case([shape], name, mode, sparsity)
        for sparsity in (0.0, 0.95)
        for mode in ("forward", "warm")
    ]


CASES = [
    *[case for shape in LAYERS for case in _layer_cases(shape)],
    *[
        _case([shape], f"{shape[0]}x{shape[1]}", "forward", dtype=torch.float64)
        for shape in ((256, 2304), (512, 4608))
    ],
    *[_case([(2048, 2048)], "2048x2048", "forward", sparsity) for sparsity in (0.0, 0.95)],
    *[case for batch in BATCHES for case in _batch_cases(*batch)],
    *[_case([(4096, 4096)], "4096x4096", mode) for mode in ("forward", "warm_max")],
    *[
        _case([shape], f"{shape[0]}x{shape[1]}", mode)
        for shape in SQUARES
        for mode in ("max", "warm_max", "spectral_norm")
    ],
    _case(RESNET_18, "resnet-18", "forward_backward"),
    _case(RESNET_18, "resnet-18", "forward_backward", 0.95),
    _case(RESNET_18, "resnet-18", "warm_forward_backward"),
]
QUICK = [*_layer_cases((64, 576)), *_layer_cases((512, 512))]
PROVIDERS = [
    Provider("native", partial(_ours, "auto")),
    Provider("native, passes alone", _prepare_passes),
    Provider("power iteration", _prepare_power),
    Provider("torch svdvals", partial(_peer, _svdvals)),
    Provider("gram32 + eigvalsh", _prepare_gram32),
    Provider("gram64 + eigvalsh", partial(_peer, partial(_gram_eigvalsh, torch.float64))),
    Provider(f"power iteration, {POWER_STEPS} warm steps", _power_steps),
    Provider("torch spectral_norm", _torch_spectral_norm),
]


def run(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    harness.main(CASES, PROVIDERS, QUICK, argv)


if __name__ == "__main__":
    run()
