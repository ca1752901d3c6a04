"""Benchmark of `logdet_gram`: the log-determinants of a network's weights in one call.

The op is bound by arithmetic, in float64. Flops counted for an m x n weight, n <= m: m n^2 for half
of the Gram matrix and n^3 / 3 for its Cholesky factor; with the gradient 2 n^3 / 3 more for the
inverse and 2 m n^2 for the product with the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Call, Case, Provider
from tscnc_kernels import logdet_gram

RIDGE = 1e-6

NETWORKS = {
    "mlp-64-1024-1024-10": [(1024, 64), (1024, 1024), (10, 1024)],
    "lenet-300-100": [(300, 784), (100, 300), (10, 100)],
    "vgg-16-conv-to-256": [(64, 27), (64, 576), (128, 576), (128, 1152), (256, 1152), (256, 2304)],
    "wrn-28-10-head": [(10, 640)],
}


def _inputs(
    shapes: Sequence[tuple[int, int]], generator: torch.Generator, device: torch.device
) -> tuple[list[Tensor]]:
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    return ([weight.to(device).requires_grad_() for weight in weights],)


def _outputs(mode: str, values: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    if mode == "value":
        return [values.detach()]
    return [values.detach(), *torch.autograd.grad(values.sum(), weights)]


def _expected(mode: str, weights: Sequence[Tensor]) -> list[Tensor]:
    """From the singular values: log((sigma^2 + ridge * mean of sigma^2) / n), summed."""
    wide = [weight.detach().double().requires_grad_() for weight in weights]
    squares = [torch.linalg.svdvals(weight).square() for weight in wide]
    values = [((s + RIDGE * s.mean()) / s.numel()).log().sum() for s in squares]
    return _outputs(mode, torch.stack(values), wide)


def _slogdet(weights: Sequence[Tensor]) -> Tensor:
    """What one writes without this package, in the precision it needs."""
    values = []
    for weight in weights:
        wide = weight.double()
        gram = wide.mT @ wide if wide.shape[0] >= wide.shape[1] else wide @ wide.mT
        n = gram.shape[0]
        shift = RIDGE * gram.trace() / n
        values.append(torch.linalg.slogdet((gram + shift * torch.eye(n)) / n).logabsdet)
    return torch.stack(values)


def _prepare(
    function: Callable[[Sequence[Tensor]], Tensor], case: Case, weights: Sequence[Tensor]
) -> Call:
    if case.mode == "value":
        frozen = [weight.detach() for weight in weights]
        return lambda: [function(frozen)]
    return lambda: _outputs(case.mode, function(weights), weights)


def _flops(mode: str, shapes: Sequence[tuple[int, int]]) -> float:
    total = 0.0
    for shape in shapes:
        m, n = max(shape), min(shape)
        total += m * n**2 + n**3 / 3
        if mode != "value":
            total += 2 * n**3 / 3 + 2 * m * n**2
    return total


def _case(network: str, mode: str) -> Case:
    shapes = NETWORKS[network]
    return Case(
        op="logdet_gram",
        mode=mode,
        shape=network,
        dtype=torch.float32,
        inputs=partial(_inputs, shapes),
        expected=partial(_expected, mode),
        work=_flops(mode, shapes),
        unit="GF/s",
    )


MODES = ("value", "value_and_gradient")
CASES = [_case(network, mode) for network in NETWORKS for mode in MODES]
QUICK = [_case("lenet-300-100", mode) for mode in MODES]
PROVIDERS = [
    Provider(name, partial(_prepare, partial(logdet_gram, ridge=RIDGE, backend=name)))
    for name in ("native", "reference")
]
PROVIDERS.append(Provider("torch slogdet", partial(_prepare, _slogdet)))


def run(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    harness.main(CASES, PROVIDERS, QUICK, argv)


if __name__ == "__main__":
    run()
