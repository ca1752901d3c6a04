"""Benchmark of three masked layers in a row, with ReLU between, as in a pruned perceptron.

Consecutive sparse layers can leave the activations in the layout that the next one reads, which
`sparsify` does ("sparsify") unless it is told not to ("row-major"); both fuse the activations into
the products, which single calls do not ("layer by layer"). A step is the
forward product and all gradients. Work is counted on the kept entries: 6·B·nnz flops per layer. The
peer "torch.sparse.mm CSR" keeps the activations feature-major between the layers as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness, peers
from benchmarks.harness import Case, Provider, Timed, UnavailableError
from tscnc_kernels import SparsityPattern, masked_linear
from tscnc_kernels import nn as masked_nn

# (batch, width)
SHAPES = [(128, 2048), (256, 1024)]
SPARSITIES = [0.9, 0.95, 0.99, 0.999]
DEPTH = 3

Arguments = tuple[nn.Sequential, dict[str, Tensor], Tensor, Tensor]
Apply = Callable[[Tensor], Tensor]


def _inputs(
    shape: tuple[int, int], sparsity: float, generator: torch.Generator, device: torch.device
) -> Arguments:
    batch, width = shape
    layers: list[nn.Module] = []
    masks = {}
    for index in range(DEPTH):
        layer = nn.utils.skip_init(nn.Linear, width, width)
        mask = torch.rand(width, width, generator=generator) >= sparsity
        scale = (2 / max(1.0, (1 - sparsity) * width)) ** 0.5
        layer.weight.data = torch.randn(width, width, generator=generator) * scale * mask
        layer.bias.data = torch.randn(width, generator=generator)
        masks[f"{2 * index}.weight"] = mask.to(device)
        layers += [layer, nn.ReLU()]
    input, gradient = (torch.randn(batch, width, generator=generator) for _ in range(2))
    return nn.Sequential(*layers[:-1]).to(device), masks, input.to(device), gradient.to(device)


def _expected(
    model: nn.Sequential, masks: dict[str, Tensor], input: Tensor, gradient: Tensor
) -> list[Tensor]:
    x = input.double()
    inputs = []
    for layer in model:
        inputs.append(x)
        x = F.linear(x, layer.weight.double(), layer.bias.double()) if _has(layer) else F.relu(x)
    output, g = x.detach(), gradient.double()
    for layer, x in zip(reversed(list(model)), reversed(inputs), strict=True):
        g = g @ layer.weight.detach().double() if _has(layer) else g * (x > 0)
    return [output, g.detach()]


def _has(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear)


def _timed(
    apply: Apply,
    parameters: Sequence[Tensor],
    input: Tensor,
    gradient: Tensor,
    masks: Sequence[Tensor] = (),
) -> Timed:
    input = input.requires_grad_()

    def call() -> list[Tensor]:
        output = apply(input)
        grad_input, *grads = torch.autograd.grad(output, (input, *parameters), gradient)
        # Weights come first.
        for grad, mask in zip(grads, masks, strict=False):
            grad.mul_(mask)
        return [output.detach(), grad_input]

    return Timed(call, lambda found: found)


def _dense(
    case: Case, model: nn.Sequential, masks: dict[str, Tensor], input: Tensor, gradient: Tensor
) -> Timed:
    weights = [m.weight for m in model if _has(m)]
    biases = [m.bias for m in model if _has(m)]
    return _timed(model, [*weights, *biases], input, gradient, list(masks.values()))


def _sparsify(
    case: Case, model: nn.Sequential, masks: dict[str, Tensor], input: Tensor, gradient: Tensor
) -> Timed:
    masked_nn.sparsify(model, masks, mode="values")
    return _timed(model, list(model.parameters()), input, gradient)


def _row_major(
    case: Case, model: nn.Sequential, masks: dict[str, Tensor], input: Tensor, gradient: Tensor
) -> Timed:
    masked_nn.sparsify(model, masks, mode="values", feature_major=False)
    return _timed(model, list(model.parameters()), input, gradient)


def _single(
    case: Case, model: nn.Sequential, masks: dict[str, Tensor], input: Tensor, gradient: Tensor
) -> Timed:
    patterns = [SparsityPattern.from_mask(mask) for mask in masks.values()]
    layers = [m for m in model if _has(m)]
    values = [
        p.gather(m.weight.detach()).requires_grad_() for p, m in zip(patterns, layers, strict=True)
    ]

    def apply(x: Tensor) -> Tensor:
        for index, (value, pattern, layer) in enumerate(zip(values, patterns, layers, strict=True)):
            x = masked_linear(F.relu(x) if index else x, value, pattern, layer.bias)
        return x

    return _timed(apply, [*values, *(m.bias for m in layers)], input, gradient)


def _sparseprop(case: Case, model: nn.Sequential, *rest: Any) -> Timed:
    linear = peers.sparseprop_swap().linear
    swapped = nn.Sequential(*(linear(m) if isinstance(m, nn.Linear) else m for m in model))
    return _timed(swapped, list(swapped.parameters()), *rest[1:])


def _csr(
    case: Case, model: nn.Sequential, masks: dict[str, Tensor], input: Tensor, gradient: Tensor
) -> Timed:
    if input.is_cuda:
        raise UnavailableError("measured on the CPU only")
    layers = [m for m in model if _has(m)]
    weights = [m.weight.detach().to_sparse_csr().requires_grad_() for m in layers]

    def apply(x: Tensor) -> Tensor:
        x = x.t()
        for index, (weight, layer) in enumerate(zip(weights, layers, strict=True)):
            x = torch.sparse.mm(weight, F.relu(x) if index else x) + layer.bias[:, None]
        return x.t()

    return _timed(apply, [*weights, *(m.bias for m in layers)], input, gradient)


def _case(shape: tuple[int, int], sparsity: float) -> Case:
    batch, width = shape
    dense_work = 6.0 * DEPTH * batch * width**2
    return Case(
        op="masked_chain",
        mode="forward_backward",
        shape=f"{batch}x{width}-{DEPTH}",
        dtype=torch.float32,
        inputs=partial(_inputs, shape, sparsity),
        expected=_expected,
        work=(1 - sparsity) * dense_work,
        dense_work=dense_work,
        unit="GF/s",
        sparsity=sparsity,
        # A pre-activation near 0 on the other side of ReLU's kink drops a whole term.
        tolerance=1e-3,
    )


CASES = [_case(shape, s) for shape in SHAPES for s in SPARSITIES]
QUICK = [_case(SHAPES[0], 0.99)]
PROVIDERS = [
    Provider("ours, sparsify", _sparsify),
    Provider("ours, row-major", _row_major),
    Provider("ours, layer by layer", _single),
    Provider("dense", _dense),
    Provider("SparseProp", _sparseprop),
    Provider("torch.sparse.mm CSR", _csr),
]


def run(argv: Sequence[str] | None = None) -> list[harness.results.Row]:
    """Measure and print; see `--help`."""
    return harness.main(CASES, PROVIDERS, QUICK, argv)


if __name__ == "__main__":
    run()
