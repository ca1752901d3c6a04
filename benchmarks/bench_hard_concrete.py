"""Benchmark of `hard_concrete`: a sample of gates, and its gradient.

Bytes counted per gate, with e the size of an element: 3 e for the sample (log_alpha and noise in,
the gate out) and 4 e more for the gradient (both again and the gate's gradient in, one out).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Call, Case, Provider
from tscnc_kernels import hard_concrete
from tscnc_kernels.ops.hard_concrete import reference

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
ELEMENTS_MOVED = {"sample": 3, "sample_and_gradient": 7}
# One gate per channel of a wide layer, one per unit of a fully connected one, one per weight.
SIZES = {"channels-640": 640, "units-4096": 4096, "weights-512x512": 512 * 512}


def _inputs(
    size: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    log_alpha = torch.randn(size, generator=generator).to(device, dtype).requires_grad_()
    uniform = torch.rand(size, generator=generator).to(device, dtype)
    return log_alpha, uniform, torch.randn(size, generator=generator).to(device, dtype)


def _outputs(mode: str, gates: Tensor, log_alpha: Tensor, grad_output: Tensor) -> list[Tensor]:
    if mode == "sample":
        return [gates.detach()]
    return [gates.detach(), *torch.autograd.grad(gates, log_alpha, grad_output)]


def _expected(mode: str, log_alpha: Tensor, uniform: Tensor, grad_output: Tensor) -> list[Tensor]:
    wide = log_alpha.detach().double().requires_grad_()
    s = torch.sigmoid((torch.logit(uniform.double()) + wide) / BETA)
    gates = (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
    return _outputs(mode, gates, wide, grad_output.double())


def _prepare(
    function: Callable[[Tensor, Tensor], Tensor],
    case: Case,
    log_alpha: Tensor,
    uniform: Tensor,
    grad_output: Tensor,
) -> Call:
    if case.mode == "sample":
        frozen = log_alpha.detach()
        return lambda: [function(frozen, uniform)]
    return lambda: _outputs(case.mode, function(log_alpha, uniform), log_alpha, grad_output)


def _case(shape: str, mode: str) -> Case:
    dtype = torch.float32
    return Case(
        op="hard_concrete",
        mode=mode,
        shape=shape,
        dtype=dtype,
        inputs=partial(_inputs, SIZES[shape], dtype),
        expected=partial(_expected, mode),
        work=ELEMENTS_MOVED[mode] * SIZES[shape] * dtype.itemsize,
        unit="GB/s",
    )


CASES = [_case(shape, mode) for shape in SIZES for mode in ELEMENTS_MOVED]
QUICK = [_case("units-4096", mode) for mode in ELEMENTS_MOVED]
PROVIDERS = [
    Provider(name, partial(_prepare, partial(hard_concrete, backend=name)))
    for name in ("native", "reference")
]
PROVIDERS.append(Provider("torch.compile", partial(_prepare, torch.compile(reference))))


def run(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    harness.main(CASES, PROVIDERS, QUICK, argv)


if __name__ == "__main__":
    run()
