"""Benchmark of `masked_linear` beside dense layers and torch's sparse product, random masks.

Work is counted on the kept entries alone, for every provider: 2·B·nnz flops forward, three times
that with the gradients of the input and of the weight. So a dense provider's rate falls with the
sparsity, and the ratio of two rates is the ratio of their times. All columns include bias, autograd
and layout conversions. The dense layer's weight gradient is masked, as ours is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness
from benchmarks.gate import TOLERANCES, disagreement
from benchmarks.harness import Call, Case, Provider, UnavailableError
from tscnc_kernels import SparsityPattern, masked_linear

# (batch, in, out): a 2048-wide MLP, a transformer's feed-forward layer, and smaller layers.
SHAPES = [
    (128, 2048, 2048),
    (256, 768, 3072),
    (2048, 768, 3072),
    (256, 4096, 4096),
    (512, 1024, 1024),
    (128, 512, 256),
]
SPARSITIES = [0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999]
MODES = ["forward", "forward_backward"]


@dataclass(frozen=True)
class Problem:
    """A masked layer: weight is zero off the mask, gradient is that of the output."""

    input: Tensor
    weight: Tensor
    mask: Tensor
    bias: Tensor
    gradient: Tensor


def _inputs(
    shape: tuple[int, int, int], sparsity: float, generator: torch.Generator, device: torch.device
) -> tuple[Problem]:
    batch, width, rows = shape
    mask = torch.rand(rows, width, generator=generator) >= sparsity
    scale = max(1.0, (1 - sparsity) * width) ** -0.5
    weight = torch.randn(rows, width, generator=generator) * scale * mask
    draw = [(batch, width), (rows,), (batch, rows)]
    input, bias, gradient = (torch.randn(size, generator=generator) for size in draw)
    tensors = (input, weight, mask, bias, gradient)
    return (Problem(*(tensor.to(device) for tensor in tensors)),)


def _expected(mode: str, problem: Problem) -> list[Tensor]:
    input, weight, bias, gradient = (
        t.double() for t in (problem.input, problem.weight, problem.bias, problem.gradient)
    )
    output = F.linear(input, weight, bias)
    return [output] if mode == "forward" else [output, gradient @ weight, gradient.sum(0)]


def _check_weight_gradient(problem: Problem, kept: Tensor) -> None:
    """Gate the kept entries' gradient here: dense and sparse providers return it differently."""
    gradient = problem.gradient.double().t() @ problem.input.double()
    reason = disagreement(kept, gradient[problem.mask], TOLERANCES[torch.float32])
    if reason is not None:
        raise AssertionError(f"WRONG weight gradient, {reason}")


Layer = Callable[[Tensor, Tensor], Tensor]
KeptGradient = Callable[[Tensor], Tensor]


def _call(
    case: Case, problem: Problem, weight: Tensor, layer: Layer, kept: KeptGradient, mask: bool
) -> Call:
    if case.mode == "forward":
        frozen = weight.detach()

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [layer(problem.input, frozen)]

        return forward
    input, bias = problem.input.requires_grad_(), problem.bias.requires_grad_()

    def both() -> tuple[list[Tensor], Tensor]:
        output = layer(input, weight)
        grad_input, grad_weight, grad_bias = torch.autograd.grad(
            output, (input, weight, bias), problem.gradient
        )
        if mask:
            grad_weight.mul_(problem.mask)
        return [output.detach(), grad_input, grad_bias], grad_weight

    _check_weight_gradient(problem, kept(both()[1]))
    return lambda: both()[0]


def _dense(case: Case, problem: Problem) -> Call:
    weight = problem.weight.requires_grad_()
    layer = lambda x, w: F.linear(x, w, problem.bias)  # noqa: E731
    return _call(case, problem, weight, layer, lambda g: g[problem.mask], mask=True)


def _multiplied(case: Case, problem: Problem) -> Call:
    weight = problem.weight.requires_grad_()
    layer = lambda x, w: F.linear(x, w * problem.mask, problem.bias)  # noqa: E731
    return _call(case, problem, weight, layer, lambda g: g[problem.mask], mask=False)


def _csr(case: Case, problem: Problem) -> Call:
    if problem.input.is_cuda:
        raise UnavailableError("measured on the CPU only")
    weight = problem.weight.to_sparse_csr().requires_grad_()
    layer = lambda x, w: torch.sparse.mm(w, x.t()).t() + problem.bias  # noqa: E731
    return _call(case, problem, weight, layer, lambda g: g.values(), mask=False)


def _ours(values: bool, algorithm: str | None, case: Case, problem: Problem) -> Call:
    pattern = SparsityPattern.from_mask(problem.mask)
    weight = (pattern.gather(problem.weight) if values else problem.weight).requires_grad_()

    def layer(input: Tensor, weight: Tensor) -> Tensor:
        return masked_linear(
            input, weight, pattern, problem.bias, assume_masked=True, algorithm=algorithm
        )

    kept = (lambda g: g) if values else (lambda g: g[problem.mask])
    return _call(case, problem, weight, layer, kept, mask=False)


def _case(shape: tuple[int, int, int], sparsity: float, mode: str) -> Case:
    batch, width, rows = shape
    kept = (1 - sparsity) * width * rows
    return Case(
        op="masked_linear",
        mode=mode,
        shape=f"{batch}x{width}x{rows}",
        dtype=torch.float32,
        inputs=partial(_inputs, shape, sparsity),
        expected=partial(_expected, mode),
        work=2 * batch * kept * (1 if mode == "forward" else 3),
        unit="GF/s",
        sparsity=sparsity,
    )


CASES = [_case(shape, s, mode) for shape in SHAPES for mode in MODES for s in SPARSITIES]
QUICK = [_case(SHAPES[0], s, mode) for mode in MODES for s in (0.9, 0.95, 0.99)]
PROVIDERS = [
    Provider("ours, values", partial(_ours, True, "panel")),
    Provider("ours, dense weight", partial(_ours, False, "panel")),
    Provider("F.linear", _dense),
    Provider("F.linear(W * mask)", _multiplied),
    Provider("torch.sparse.mm CSR", _csr),
]


def run(argv: Sequence[str] | None = None) -> None:
    """Measure and print; see `--help`."""
    harness.main(CASES, PROVIDERS, QUICK, argv)


if __name__ == "__main__":
    run()
