"""Other ways to compute a masked layer, one small adapter each, and how to install what is missing.

An adapter takes a `Problem` and returns a `Layer`: the function to call, its parameters, and how to
read the kept weights' gradient. None is trusted: the harness's gate compares each with float64.
Every peer gets its best: SparseProp the batch sizes of its fast transpose and both of its
convolutions, the condensed layer a fused gather, MKL an input that is transposed beforehand.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gate import Outputs
from benchmarks.harness import Timed, UnavailableError

INSTALL = "make bench-peers"
# torch calls its sparse layouts a beta feature, once per process.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


@dataclass(frozen=True)
class Problem:
    """A masked layer: `weight` is zero off the mask, `gradient` is that of the output.

    Linear: input (B, K), weight (N, K). Convolution: input (B, C, H, W), weight (out, in, kh, kw).
    """

    input: Tensor
    weight: Tensor
    mask: Tensor
    bias: Tensor
    gradient: Tensor
    stride: int = 1
    padding: int = 0

    @property
    def is_convolution(self) -> bool:
        """Whether it is one; else linear."""
        return self.weight.ndim == 4


def _identity(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Layer:
    """How a provider computes the problem.

    Attributes:
        apply: input -> output.
        weight: the parameter that takes the gradient; the bias likewise.
        bias: the (N,) bias.
        kept: the weight's gradient -> (nnz,) gradient of the kept entries, row-major; not timed.
        gradient_mask: multiplied into the weight's gradient, which is timed; None to leave it.
        input: what `apply` is given instead of the problem's input (another layout).
        output: converts its result back, not timed.
    """

    apply: Callable[[Tensor], Tensor]
    weight: Tensor
    bias: Tensor
    kept: Callable[[Tensor], Tensor] = _identity
    gradient_mask: Tensor | None = None
    input: Tensor | None = None
    output: Callable[[Tensor], Tensor] = _identity


def inference(problem: Problem, layer: Layer) -> Timed:
    """The forward product without autograd."""
    input = problem.input if layer.input is None else layer.input

    def call() -> Tensor:
        with torch.no_grad():
            return layer.apply(input)

    return Timed(call, layer.output)


def training(problem: Problem, layer: Layer) -> Timed:
    """The forward product and the gradients of input, weight and bias."""
    if layer.input is not None:
        raise UnavailableError("its layout is for the forward product")
    input, parameters = problem.input.requires_grad_(), (layer.weight, layer.bias)

    def call() -> tuple[Tensor, ...]:
        output = layer.apply(input)
        grads = torch.autograd.grad(output, (input, *parameters), problem.gradient)
        if layer.gradient_mask is not None:
            grads[1].mul_(layer.gradient_mask)
        return output.detach(), *grads

    def outputs(found: Any) -> Outputs:
        output, grad_input, grad_weight, grad_bias = found
        return [layer.output(output), grad_input, layer.kept(grad_weight), grad_bias]

    return Timed(call, outputs)


def expected(mode: str, problem: Problem) -> Outputs:
    """What `inference` ("forward") or `training` should give, in float64."""
    input, weight, bias = (
        t.detach().double().requires_grad_(mode != "forward")
        for t in (problem.input, problem.weight, problem.bias)
    )
    output = _dense_product(problem, input, weight, bias)
    if mode == "forward":
        return output
    gradient = problem.gradient.double()
    grads = torch.autograd.grad(output, (input, weight, bias), gradient)
    return [output.detach(), grads[0], grads[1][problem.mask], grads[2]]


def _dense_product(problem: Problem, input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if problem.is_convolution:
        return F.conv2d(input, weight, bias, problem.stride, problem.padding)
    return F.linear(input, weight, bias)


def _at(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient[mask]


def dense(problem: Problem) -> Layer:
    """`F.linear` or `F.conv2d` on the masked weight; its gradient is masked afterwards."""
    weight, bias = problem.weight.requires_grad_(), problem.bias.requires_grad_()
    return Layer(
        lambda x: _dense_product(problem, x, weight, bias),
        weight,
        bias,
        _at(problem.mask),
        problem.mask,
    )


def multiplied(problem: Problem) -> Layer:
    """The weight times its mask in every call, as in most training code."""
    weight, bias = problem.weight.requires_grad_(), problem.bias.requires_grad_()
    mask = problem.mask.to(weight.dtype)
    return Layer(
        lambda x: _dense_product(problem, x, weight * mask, bias), weight, bias, _at(problem.mask)
    )


def dense_in_fp32(problem: Problem) -> Layer:
    """A half-precision layer computed in fp32, faster where the CPU has no such instructions."""
    if problem.weight.dtype not in (torch.bfloat16, torch.float16):
        raise UnavailableError("for half precision only")
    weight, bias = (t.detach().float().requires_grad_() for t in (problem.weight, problem.bias))
    return Layer(
        lambda x: _dense_product(problem, x.float(), weight, bias).to(x.dtype), weight, bias
    )


def _csr(problem: Problem) -> Tensor:
    if problem.input.is_cuda or problem.weight.dtype not in (torch.float32, torch.float64):
        raise UnavailableError("torch's CSR products are measured on the CPU in fp32 and fp64")
    return problem.weight.detach().to_sparse_csr().requires_grad_()


def sparse_mm(problem: Problem) -> Layer:
    """`torch.sparse.mm` with a CSR weight, which gives a CSR gradient."""
    weight, bias = _csr(problem), problem.bias.requires_grad_()
    return Layer(
        lambda x: torch.sparse.mm(weight, x.t()).t() + bias, weight, bias, lambda g: g.values()
    )


def sparse_linear(problem: Problem) -> Layer:
    """`F.linear` with a CSR weight, which gives a dense gradient."""
    weight, bias = _csr(problem), problem.bias.requires_grad_()
    return Layer(lambda x: F.linear(x, weight, bias), weight, bias, _at(problem.mask))


def mkl_feature_major(problem: Problem) -> Layer:
    """MKL's CSR product on an input that is transposed already; SpMV for a single sample."""
    weight, bias = _csr(problem), problem.bias[:, None]
    if len(problem.input) == 1:
        single = lambda x: torch.mv(weight, x[0]).add_(problem.bias)[None]  # noqa: E731
        return Layer(single, weight, problem.bias, input=problem.input)
    return Layer(
        lambda x: torch.sparse.mm(weight, x).add_(bias),
        weight,
        problem.bias,
        input=problem.input.t().contiguous(),
        output=Tensor.t,
    )


def torchsparsegradutils(problem: Problem) -> Layer:
    """Its `sparse_mm`, whose gradient stays sparse."""
    package = _import("torchsparsegradutils")
    weight, bias = _csr(problem), problem.bias.requires_grad_()
    return Layer(
        lambda x: package.sparse_mm(weight, x.t()).t() + bias, weight, bias, lambda g: g.values()
    )


def condensed(problem: Problem) -> Layer:
    """Constant fan-in (SRigL): a dense (N, k) matrix of values and one of columns.

    Rows with fewer than k kept entries are padded with zero values. One sample is a gather and a
    sum; more are torch's fused gather, `F.embedding_bag` over the transposed input.
    """
    if problem.weight.dtype != torch.float32:
        raise UnavailableError("torch's fused gather is measured in fp32")
    counts = problem.mask.sum(1)
    width = int(counts.max())
    order = problem.mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    columns, is_kept = order[:, :width].contiguous(), torch.arange(width) < counts[:, None]
    values = problem.weight.detach().gather(1, columns).requires_grad_()
    bias = problem.bias.requires_grad_()

    def one(x: Tensor) -> Tensor:
        return (x[0][columns] * values).sum(1)[None] + bias

    def many(x: Tensor) -> Tensor:
        # Contiguous, because the fused kernel reads nothing else.
        features = x.t().contiguous()
        rows = F.embedding_bag(columns, features, per_sample_weights=values, mode="sum")
        return rows.t() + bias

    return Layer(one if len(problem.input) == 1 else many, values, bias, lambda g: g[is_kept])


def sparseprop_linear(problem: Problem) -> Layer:
    """SparseProp's linear layer."""
    modules = _sparseprop(problem)
    layer = modules.SparseLinear(problem.weight.detach(), nn.Parameter(problem.bias.detach()))
    return Layer(layer, layer.W_val, layer.bias)


def sparseprop_conv(over_width: bool, problem: Problem) -> Layer:
    """SparseProp's convolution, vectorised over the batch or over the output's width."""
    modules = _sparseprop(problem)
    height, width = problem.weight.shape[2:]
    if height != width or problem.stride not in (1, 2):
        raise UnavailableError("SparseProp has square kernels and strides 1 and 2 only")
    layer = modules.SparseConv2d(
        problem.weight.detach(),
        nn.Parameter(problem.bias.detach()),
        padding=problem.padding,
        stride=problem.stride,
        vectorizing_over_on=over_width,
    )
    return Layer(layer, layer.W_val, layer.bias)


@dataclass(frozen=True)
class Swap:
    """SparseProp's layers for a whole network: `linear(weight, bias)` and `conv(module, shape)`."""

    linear: Callable[[nn.Linear], nn.Module]
    conv: Callable[[nn.Conv2d, tuple[int, ...]], nn.Module]
    package: ModuleType = field(repr=False)


def sparseprop_swap() -> Swap:
    """SparseProp's own swap, which times its convolution's two modes and takes the faster one."""
    modules = _import("sparseprop.modules")
    return Swap(modules.SparseLinear.from_dense, modules.sparsify_conv2d_auto, modules)


def _sparseprop(problem: Problem) -> ModuleType:
    if problem.input.is_cuda or problem.weight.dtype != torch.float32:
        raise UnavailableError("SparseProp computes on the CPU in fp32 only")
    return _import("sparseprop.modules")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"{name.split('.')[0]} is missing; install it: {INSTALL}") from error
