"""Linear layer with a sparse mask on its weight, computed on the kept entries only.

Formula, with M the pattern's mask, ∘ the element-wise product and act none, relu or gelu:

    Z  = X (W ∘ M)ᵀ + b,   Y = act(Z)
    G  = dY ∘ act'(Z)
    dX = G (W ∘ M),   dW = (Gᵀ X) ∘ M,   db = Σ over the batch of G

Shapes: X (..., K), W (N, K) or its kept values (nnz,), b (N,), Y (..., N). The derivative of relu
at 0 is 0; gelu is the exact one, z Φ(z).

Algorithms of the native backend: "panel" transposes groups of samples into panels and runs over
the kept entries once per panel, in registers (csrc/cpu/panel.h); dX does so with the transposed
index, and where dW is wanted too, one pass that loads G's panel once computes both. "blocked" keeps
blocks of a panel in the first-level cache. "small_batch" takes up to 16 samples and adds dX up row
by row; "spmv" takes one sample at a time from a plain vector; "block" shares
loads between four rows that keep the same columns. "dense" is torch's GEMM on W ∘ M, all that the
reference has; the triton backend applies the mask inside its own (for weights that hold something
off it). CUDA has "panel", with samples in shared memory, one kernel for both few and one, "bitmap",
which multiplies few samples by values that it spreads out after the mask's bits, and where Triton
is installed "block", on tensor cores, for square blocks 16 to 128 wide.

Source: panel products, Gale et al., arXiv 2006.10901 and Nikdan et al., arXiv 2302.04852.
Deviations: none in the formula; reductions are ordered, so that results do not depend on threads.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tscnc_kernels import _backend
from tscnc_kernels._activation import ACTIVATIONS, activate, activation_gradient
from tscnc_kernels._apply import eager_apply, is_eager, wants_gradient
from tscnc_kernels._autocast import cast_operands
from tscnc_kernels._autotune import DENSE
from tscnc_kernels._checks import check_masked_operands, check_name
from tscnc_kernels._feature_major import (
    feature_major_linear,
    is_feature_major,
    new_matrix,
)
from tscnc_kernels._known_calls import call_key, known_call, remember_call
from tscnc_kernels._masked_algorithms import ALGORITHMS, Call, Choice, choose
from tscnc_kernels._masked_bitmap import BITMAP
from tscnc_kernels._masked_native import native_product
from tscnc_kernels._masked_run import Gradients, run_gradients, run_product
from tscnc_kernels._masked_semi_structured import SEMI_STRUCTURED
from tscnc_kernels._masked_triton import (
    runs_in_triton,
    sparse_gradients,
    triton_gradients,
    triton_product,
)
from tscnc_kernels._masked_weight import kept_values, masked, masked_weight
from tscnc_kernels._vmap import register_loop_vmap
from tscnc_kernels._wanted import wanted_gradients
from tscnc_kernels.sparsity import SparsityPattern

# Native first: benchmarks/results/*/masked_linear.csv.
BACKENDS = ("native", "triton", "reference")
_backend.register("masked_linear", BACKENDS)


def _check(
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    bias: Tensor | None,
    activation: str,
    dense_grad: bool,
    algorithm: str | None,
) -> None:
    if not isinstance(pattern, SparsityPattern):
        raise TypeError(f"expected pattern to be a SparsityPattern, got {type(pattern).__name__}")
    if len(pattern.shape) != 2:
        raise ValueError(f"expected a pattern of shape (N, K), got {pattern.shape}")
    check_masked_operands(input, weight, bias, pattern)
    rows, width = pattern.shape
    if input.ndim == 0 or input.shape[-1] != width:
        raise ValueError(f"expected input of shape (..., {width}), got {tuple(input.shape)}")
    if tuple(weight.shape) not in ((rows, width), (pattern.nnz,)):
        raise ValueError(
            f"expected weight of shape ({rows}, {width}) or values of shape ({pattern.nnz},), "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"expected bias of shape ({rows},), got {tuple(bias.shape)}")
    check_name("activation", activation, ACTIVATIONS)
    if algorithm is not None:
        check_name("algorithm", algorithm, (*ALGORITHMS, BITMAP, SEMI_STRUCTURED))
    if dense_grad and weight.ndim == 1:
        raise ValueError(
            f"dense_grad=True needs a dense weight of shape ({rows}, {width}), got values of shape "
            f"{tuple(weight.shape)}"
        )


def reference(
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    bias: Tensor | None = None,
    activation: str = "none",
    *,
    dense_grad: bool = False,
) -> Tensor:
    """Plain torch, differentiable to any order."""
    return activate(F.linear(input, masked_weight(weight, pattern, dense_grad), bias), activation)


def reference_backward(
    grad_output: Tensor,
    saved: Tensor,
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    activation: str = "none",
    dense_grad: bool = False,
    needs: Sequence[bool] = (True, True, True),
    *,
    held: bool = False,
) -> Gradients:
    """Gradients of `reference` for a 2-d input, themselves differentiable.

    `saved` is Z (B, N), needed only with an activation. `needs` tells which of the gradients of
    input, weight and bias to compute; the others are None. `held` promises that a dense weight is
    zero off the mask.
    """
    gradient, grad_input = activation_gradient(grad_output, saved, activation), None
    if needs[0]:
        matrix = masked_weight(weight, pattern, dense_grad, held)
        features = is_feature_major(input)
        grad_input = (matrix.t() @ gradient.t()).t() if features else gradient @ matrix
    grad_weight = gradient.t() @ input if needs[1] else None
    if grad_weight is not None and weight.ndim == 1:
        grad_weight = kept_values(grad_weight, pattern)
    elif grad_weight is not None and not dense_grad:
        grad_weight = masked(grad_weight, pattern, own=True)
    return grad_input, grad_weight, gradient.sum(0) if needs[2] else None


@torch.library.register_fake("tscnc_kernels::masked_linear")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_pointers: Tensor,
    columns: Tensor,
    activation: int,
    algorithm: int,
    save_preactivation: bool,
    feature_major: bool = False,
) -> tuple[Tensor, Tensor]:
    batch, rows = input.shape[0], row_pointers.shape[0] - 1
    saved_shape = batch if save_preactivation else 0, rows
    return (
        new_matrix(input, (batch, rows), feature_major),
        new_matrix(input, saved_shape, feature_major),
    )


@torch.library.register_fake("tscnc_kernels::masked_linear_backward")
def _(
    grad_output: Tensor,
    saved: Tensor,
    input: Tensor,
    weight: Tensor,
    row_pointers: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    needs_input, needs_weight, needs_bias = rest[-3:]
    batch, width = input.shape
    return (
        new_matrix(input, (batch, width), is_feature_major(input))
        if needs_input
        else input.new_empty((0,)),
        input.new_empty(weight.shape if needs_weight else (0,)),
        input.new_empty((row_pointers.shape[0] - 1 if needs_bias else 0,)),
    )


_native = torch.ops.tscnc_kernels
for _name in ("masked_linear", "masked_linear_backward"):
    register_loop_vmap(_name, getattr(_native, _name))


class _Options(NamedTuple):
    activation: str
    dense_grad: bool
    assume_masked: bool
    feature_major: bool
    algorithms: Choice
    backend: str


def _options_of(
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    activation: str,
    dense_grad: bool,
    assume_masked: bool,
    feature_major: bool,
    backend: str | None,
    algorithm: str | None,
) -> _Options:
    chosen = _backend.select("masked_linear", pattern.device, backend)
    flat = input if input.dim() == 2 else input.reshape(-1, pattern.shape[1])
    call = Call.of(flat, weight, assume_masked, feature_major) if is_eager() else None
    algorithms = choose("masked_linear", pattern, chosen, call, algorithm)
    return _Options(activation, dense_grad, assume_masked, feature_major, algorithms, chosen)


def _forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pattern: SparsityPattern,
    options: _Options,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Y for a 2-d input, and Z if it has to be saved (else a tensor of no rows)."""
    save = save and options.activation == "gelu"

    how = ACTIVATIONS[options.activation], save, options.feature_major

    def product(algorithm: str) -> tuple[Tensor, Tensor]:
        if runs_in_triton(options.backend, algorithm, input):
            return triton_product(algorithm, input, weight, bias, pattern, *how)
        if algorithm != DENSE:
            return native_product(algorithm, input, weight, bias, pattern, *how)
        matrix = masked_weight(weight, pattern, held=options.assume_masked)
        linear = feature_major_linear if options.feature_major else F.linear
        z = linear(input, matrix, bias)
        return activate(z, options.activation), z if save else z.new_empty((0, z.shape[1]))

    return run_product(options.algorithms, product, (input, weight))


def _backward(
    grad_output: Tensor,
    saved: Tensor,
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    options: _Options,
    needs: Sequence[bool],
) -> Gradients:
    """First derivatives; `saved` is Y for relu and Z for gelu."""
    tensors, activation = (grad_output, saved, input, weight), options.activation

    def sparse(for_input: str, for_weight: str, wanted: Sequence[bool]) -> Sequence[Tensor | None]:
        by = options.backend, (for_input, for_weight)
        return sparse_gradients(*by, *tensors, pattern, activation, wanted)

    def dense(wanted: Sequence[bool]) -> Gradients:
        if options.backend == "triton":
            return triton_gradients(*tensors, pattern, activation, options.dense_grad, wanted)
        return reference_backward(
            *(*tensors, pattern, activation, options.dense_grad, wanted), held=options.assume_masked
        )

    return run_gradients(options.algorithms, sparse, dense, tensors, needs, options.dense_grad)


class MaskedLinearFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input, weight, bias, options, pattern):  # type: ignore[no-untyped-def]
        return _forward(input, weight, bias, pattern, options, save=True)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        input, weight, bias, ctx.options, ctx.pattern = inputs
        result, preactivation = output
        ctx.mark_non_differentiable(preactivation)
        ctx.set_materialize_grads(False)
        saved = result if ctx.options.activation == "relu" else preactivation
        ctx.save_for_backward(saved, input, weight, bias)

    @staticmethod
    def backward(ctx, grad_output, *_):  # type: ignore[no-untyped-def]
        if grad_output is None:
            return None, None, None, None, None
        saved, input, weight, bias = ctx.saved_tensors
        options, pattern = ctx.options, ctx.pattern
        needs = wanted_gradients(ctx, (input, weight, bias))
        if torch.is_grad_enabled():
            activation, dense_grad = options.activation, options.dense_grad
            z = F.linear(input, masked_weight(weight, pattern, dense_grad), bias)
            gradients = reference_backward(
                grad_output, z, input, weight, pattern, activation, dense_grad, needs
            )
        else:
            # Without an activation nothing is saved, and nothing reads it.
            saved = grad_output if saved is None else saved
            gradients = _backward(grad_output, saved, input, weight, pattern, options, needs)
        return *gradients, None, None


class _EagerFunction(torch.autograd.Function):
    """The same where `is_eager()`: Z need not be a result, which autograd would have to wrap."""

    @staticmethod
    def forward(ctx, input, weight, bias, options, pattern):  # type: ignore[no-untyped-def]
        output, preactivation = _forward(input, weight, bias, pattern, options, save=True)
        saved = {"none": None, "relu": output, "gelu": preactivation}[options.activation]
        ctx.options, ctx.pattern = options, pattern
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(saved, input, weight, bias)
        return output

    backward = MaskedLinearFunction.backward


_apply_eagerly = eager_apply(_EagerFunction, tensors=3)


def masked_linear(
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    bias: Tensor | None = None,
    activation: str = "none",
    *,
    dense_grad: bool = False,
    assume_masked: bool = False,
    feature_major: bool = False,
    backend: str | None = None,
    algorithm: str | None = None,
) -> Tensor:
    """Linear layer act(x (W ∘ M)ᵀ + b) that reads and writes only the kept entries of W.

    Args:
        input: (..., K) tensor of dtype float32, float64, bfloat16 or float16, any strides. Half
            types are summed in float32.
        weight: (N, K) tensor of the input's dtype, any strides, whatever it holds off the mask; or
            the kept values (nnz,) in row-major order, weight[mask].
        pattern: the mask M of shape (N, K), on the input's device.
        bias: (N,) tensor of the input's dtype, or None.
        activation: "none", "relu" or "gelu" (the exact one).
        dense_grad: give a dense weight's gradient off the mask too, as for pruning scores and
            regrowth.
        assume_masked: promise that a dense weight is zero off the mask, so that the dense
            algorithm need not mask it.
        feature_major: give the result with the samples of a feature next to each other: strides
            (1, B) for B samples, the layout in which sparse products read and write. Another sparse
            layer reads it without the transposition that a row-major input takes.
        backend: "native", "triton" or "reference"; None chooses.
        algorithm: "panel", "blocked", "small_batch", "spmv", "block" (native, on the kept
            entries; "block" triton too), "bitmap" (native, on a GPU) or "dense" (GEMM on W ∘ M);
            "semi_structured" (on a GPU) lets torch's product for masks that keep 2 of 4 weights
            compete with "dense"; None chooses without it.

    Returns:
        (..., N) tensor of the input's dtype, row-major unless feature_major. The gradient of the
        input is feature-major where the input is; that of a dense weight has its shape and is zero
        off the mask (unless dense_grad); that of values has shape (nnz,).

    Raises:
        ValueError: shapes that do not fit, tensors on several devices, an unknown activation or
            algorithm, or dense_grad with values.
        TypeError: a dtype that is not supported or differs from the input's; pattern is not a
            SparsityPattern.
        RuntimeError: the backend or the algorithm cannot run here.

    NaN: the sparse algorithms do not use an input that no kept weight multiplies, so that NaN or
    infinity there stays out of the result; "bitmap" and a dense product spread it.

    Autograd: any order; second and higher orders run in plain torch. Under autocast the tensors
    are cast as for F.linear.

    Determinism: a sparse algorithm gives the same bits every run and for any number of threads.
    """
    settings = activation, dense_grad, assume_masked, feature_major, backend, algorithm
    key = call_key(input, weight, bias, settings)
    options = known_call(pattern, key)
    if options is None:
        if isinstance(pattern, SparsityPattern):
            input, weight, bias = cast_operands(pattern.device, input, weight, bias)
        _check(input, weight, pattern, bias, activation, dense_grad, algorithm)
        options = _options_of(input, weight, pattern, *settings)
        remember_call(pattern, key, options)
    flat = input if input.dim() == 2 else input.reshape(-1, pattern.shape[1])
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if not wants_gradient(flat, weight, bias):
        output, _ = _forward(flat, weight, bias, pattern, options, save=False)
    elif is_eager():
        output = _apply_eagerly(flat, weight, bias, options, pattern)
    else:
        output, _ = MaskedLinearFunction.apply(flat, weight, bias, options, pattern)  # type: ignore[no-untyped-call]
    return output if input.dim() == 2 else output.reshape(*input.shape[:-1], pattern.shape[0])
