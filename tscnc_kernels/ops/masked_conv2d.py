"""Two-dimensional convolution with a sparse mask on its weight, computed on the kept entries only.

Formula, with * the cross-correlation of F.conv2d, M the pattern's mask, ∘ the element-wise product
and act none, relu or gelu:

    Z  = X * (W ∘ M) + b,   Y = act(Z)
    G  = dY ∘ act'(Z)
    dX = G *ᵀ (W ∘ M)   (the transposed convolution)
    dW[o, c, i, j] = M[o, c, i, j] Σ over images and pixels of G[o, p] X[c, p shifted by (i, j)]
    db = Σ over images and pixels of G

Shapes: X (B, C, H, W), W (O, C / groups, kh, kw) or its kept values (nnz,), b (O,) and
Y (B, O, H', W'). The derivative of relu at 0 is 0; gelu is the exact one, z Φ(z).

Algorithms of the native backend: in zero-padded planes every kept weight meets all results at one
offset, and a tile of results stays in registers while the kept weights of its channel run by.
"plane" packs one image after the other, results are neighbours in a row; "batch" packs a vector's
worth of images element by element, so that every load is aligned and no lane falls on padding
(csrc/cpu/masked_conv2d.h). "direct" packs nothing: it reads the images as they lie in memory and
masks what lies beyond their borders, for stride 1 and results of the input's size
(csrc/cpu/direct_conv.h). dX is the same product with transposed taps on G, a stride cuts planes
into phases, and dW are inner products; wanted by one algorithm, both come from one pass over G. On
CUDA "plane" reads the images as they are (csrc/cuda/masked_conv2d.cu). "dense" is torch's
convolution with W ∘ M, all that other backends have.

Source: one offset per kept weight, Elsen et al., arXiv 1911.09723 (1×1 kernels); dX and dW from one
pass, Nikdan et al., arXiv 2302.04852, here without scattering. Deviations: none in the formula;
reductions are ordered, so that results do not depend on threads.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tscnc_kernels import _backend
from tscnc_kernels._activation import ACTIVATIONS, activate, activation_gradient
from tscnc_kernels._apply import eager_apply, is_eager, wants_gradient
from tscnc_kernels._autocast import cast_operands
from tscnc_kernels._autotune import DENSE
from tscnc_kernels._checks import check_masked_operands, check_name
from tscnc_kernels._conv_algorithms import ALGORITHMS, choose_for
from tscnc_kernels._conv_geometry import ConvGeometry, IntPair, pattern_geometry
from tscnc_kernels._conv_native import conv_gradients, conv_product
from tscnc_kernels._known_calls import call_key, known_call, remember_call
from tscnc_kernels._masked_algorithms import Choice
from tscnc_kernels._masked_run import Gradients, run_gradients, run_product
from tscnc_kernels._masked_weight import kept_values, masked, masked_weight
from tscnc_kernels._wanted import wanted_gradients
from tscnc_kernels.sparsity import SparsityPattern

# Native first: benchmarks/results/*/masked_conv2d.csv.
BACKENDS = ("native", "reference")
_backend.register("masked_conv2d", BACKENDS)


def _check(
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    bias: Tensor | None,
    geometry: ConvGeometry,
    activation: str,
    dense_grad: bool,
    algorithm: str | None,
) -> None:
    check_masked_operands(input, weight, bias, pattern)
    rows, shared = pattern.shape[:2]
    channels = shared * geometry.groups
    if rows % geometry.groups:
        raise ValueError(
            f"expected groups to divide the {rows} output channels, got {geometry.groups}"
        )
    if input.ndim not in (3, 4) or input.shape[-3] != channels:
        raise ValueError(
            f"expected input of shape (B, {channels}, H, W) or ({channels}, H, W), "
            f"got {tuple(input.shape)}"
        )
    if min(input.shape[-2:]) < 1 or min(geometry.output_size(*input.shape[-2:])) < 1:
        raise ValueError(
            f"expected images that the kernel of {geometry.kernel} fits into, "
            f"got {tuple(input.shape[-2:])} with padding {geometry.padding} "
            f"and dilation {geometry.dilation}"
        )
    if tuple(weight.shape) not in (pattern.shape, (pattern.nnz,)):
        raise ValueError(
            f"expected weight of shape {pattern.shape} or values of shape ({pattern.nnz},), "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"expected bias of shape ({rows},), got {tuple(bias.shape)}")
    check_name("activation", activation, ACTIVATIONS)
    if algorithm is not None:
        check_name("algorithm", algorithm, ALGORITHMS)
    if dense_grad and weight.ndim == 1:
        raise ValueError(
            f"dense_grad=True needs a dense weight of shape {pattern.shape}, got values of shape "
            f"{tuple(weight.shape)}"
        )


def reference(
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    activation: str = "none",
    *,
    dense_grad: bool = False,
) -> Tensor:
    """Plain torch, differentiable to any order."""
    geometry = pattern_geometry(pattern, stride, padding, dilation, groups)
    kernel = masked_weight(weight, pattern, dense_grad)
    return activate(geometry.convolve(input, kernel, bias), activation)


def reference_backward(
    grad_output: Tensor,
    saved: Tensor,
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    geometry: ConvGeometry,
    activation: str = "none",
    dense_grad: bool = False,
    needs: Sequence[bool] = (True, True, True),
    *,
    held: bool = False,
) -> Gradients:
    """Gradients of `reference` for a 4-d input, themselves differentiable.

    `saved` is Z, needed only with an activation. `needs` tells which of the gradients of input,
    weight and bias to compute; the others are None. `held` promises that a dense weight is zero
    off the mask.
    """
    gradient = activation_gradient(grad_output, saved, activation)
    grad_input, grad_weight = None, None
    if needs[0] or needs[1]:
        matrix = masked_weight(weight, pattern, dense_grad, held)
        grad_input, grad_weight = geometry.convolve_backward(gradient, input, matrix, needs)
    if grad_weight is not None and weight.ndim == 1:
        grad_weight = kept_values(grad_weight, pattern)
    elif grad_weight is not None and not dense_grad:
        grad_weight = masked(grad_weight, pattern, own=True)
    return grad_input, grad_weight, gradient.sum((0, 2, 3)) if needs[2] else None


def _new_images(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(*shape, dtype=like.dtype, device=like.device, memory_format=layout)


@torch.library.register_fake("tscnc_kernels::masked_conv2d")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_pointers: Tensor,
    columns: Tensor,
    geometry: Sequence[int],
    activation: int,
    algorithm: int,
    channels_last: bool,
    save_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    kernel, stride, dilation = [(geometry[i], geometry[i + 1]) for i in (0, 2, 8)]
    top, bottom, left, right = geometry[4:8]
    shape = ConvGeometry(kernel, stride, (top, bottom, left, right), dilation, geometry[10])
    batch, rows = input.shape[0], row_pointers.shape[0] - 1
    size = rows, *shape.output_size(*input.shape[2:])
    saved = _new_images(input, (batch if save_preactivation else 0, *size), channels_last)
    return _new_images(input, (batch, *size), channels_last), saved


@torch.library.register_fake("tscnc_kernels::masked_conv2d_backward")
def _(
    grad_output: Tensor,
    saved: Tensor,
    input: Tensor,
    weight: Tensor,
    row_pointers: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    channels_last, needs_input, needs_weight, needs_bias = rest[-4:]
    grad_input = input.new_empty((0,))
    if needs_input:
        grad_input = _new_images(input, input.shape, channels_last)
    return (
        grad_input,
        input.new_empty(weight.shape if needs_weight else (0,)),
        input.new_empty((row_pointers.shape[0] - 1 if needs_bias else 0,)),
    )


class _Options(NamedTuple):
    geometry: ConvGeometry
    activation: str
    dense_grad: bool
    assume_masked: bool
    algorithms: Choice


def _forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pattern: SparsityPattern,
    options: _Options,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Y for a 4-d input, and Z if it has to be saved (else a tensor of no images)."""
    save = save and options.activation == "gelu"

    def product(algorithm: str) -> tuple[Tensor, Tensor]:
        if algorithm != DENSE:
            how = options.geometry, options.activation, save
            return conv_product(algorithm, input, weight, bias, pattern, *how)
        kernel = masked_weight(weight, pattern, held=options.assume_masked)
        z = options.geometry.convolve(input, kernel, bias)
        return activate(z, options.activation), z if save else z.new_empty((0, *z.shape[1:]))

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

    def sparse(for_input: str, for_weight: str, wanted: Sequence[bool]) -> Sequence[Tensor]:
        how = pattern, options.geometry, activation, wanted
        return conv_gradients((for_input, for_weight), *tensors, *how)

    def dense(wanted: Sequence[bool]) -> Gradients:
        return reference_backward(
            *(*tensors, pattern, options.geometry, activation, options.dense_grad, wanted),
            held=options.assume_masked,
        )

    return run_gradients(options.algorithms, sparse, dense, tensors, needs, options.dense_grad)


class MaskedConv2dFunction(torch.autograd.Function):
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
            kernel = masked_weight(weight, pattern, options.dense_grad)
            z = options.geometry.convolve(input, kernel, bias)
            gradients = reference_backward(
                *(grad_output, z, input, weight, pattern, options.geometry),
                *(options.activation, options.dense_grad, needs),
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

    backward = MaskedConv2dFunction.backward


# torch binds forward's arguments by its signature on every call; inspecting it anew takes 50 µs.
MaskedConv2dFunction.forward.__signature__ = inspect.signature(  # type: ignore[attr-defined]
    MaskedConv2dFunction.forward
)
_apply_eagerly = eager_apply(_EagerFunction, tensors=3)


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    activation: str = "none",
    *,
    dense_grad: bool = False,
    assume_masked: bool = False,
    backend: str | None = None,
    algorithm: str | None = None,
) -> Tensor:
    """Convolution act(x * (W ∘ M) + b) that reads and writes only the kept entries of W.

    Args:
        input: (B, C, H, W) or (C, H, W) tensor of dtype float32, float64, bfloat16 or float16, any
            strides. Half types are summed in float32.
        weight: (O, C / groups, kh, kw) tensor of the input's dtype, any strides, whatever it holds
            off the mask; or the kept values (nnz,) in row-major order, weight[mask].
        pattern: the mask M of shape (O, C / groups, kh, kw), on the input's device.
        bias: (O,) tensor of the input's dtype, or None.
        stride: step of the kernel, one integer or (vertical, horizontal).
        padding: zeros around the images, one integer or (vertical, horizontal), "valid" for none,
            or "same" for results of the images' size (stride 1 only).
        dilation: distance of the kernel's elements, one integer or (vertical, horizontal).
        groups: groups of channels that are convolved apart.
        activation: "none", "relu" or "gelu" (the exact one).
        dense_grad: give a dense weight's gradient off the mask too, as for pruning scores and
            regrowth.
        assume_masked: promise that a dense weight is zero off the mask, so that the dense
            algorithm need not mask it.
        backend: "native" or "reference"; None chooses.
        algorithm: "plane" (all that CUDA has), "batch" or "direct" (for stride 1 and results of
            the input's size) on the kept entries, or "dense" (torch's, of W ∘ M); None chooses.

    Returns:
        (B, O, H', W') or (O, H', W') tensor of the input's dtype, and channels-last in memory
        where the input is. The gradient of a dense weight has its shape and is zero off the mask
        (unless dense_grad); that of values has shape (nnz,).

    Raises:
        ValueError: shapes that do not fit, tensors on several devices, a bad stride, padding,
            dilation or number of groups, an unknown activation or algorithm, or dense_grad with
            values.
        TypeError: a dtype that is not supported or differs from the input's; pattern is not a
            SparsityPattern.
        RuntimeError: the backend or the algorithm cannot run here.

    NaN: the sparse algorithms do not read an input that no kept weight multiplies; NaN or infinity
    there need not come through as it does in a dense convolution. Elsewhere it may also spoil
    gradients of other weights, which "plane" and "direct" multiply by the zeros around an image.

    Autograd: any order; second and higher orders run in plain torch. Under autocast the tensors
    are cast as for F.conv2d.

    Determinism: the sparse algorithms give the same bits every run and for any number of threads.
    """
    geometry = pattern_geometry(pattern, stride, padding, dilation, groups)
    settings = geometry, activation, dense_grad, assume_masked
    key = call_key(input, weight, bias, (*settings, backend, algorithm))
    options = known_call(pattern, key)
    if options is None:
        input, weight, bias = cast_operands(pattern.device, input, weight, bias)
        _check(input, weight, pattern, bias, geometry, activation, dense_grad, algorithm)
        how = assume_masked, backend, algorithm
        options = _Options(*settings, choose_for(input, weight, pattern, geometry, *how))
        remember_call(pattern, key, options)
    images = input if input.dim() == 4 else input.unsqueeze(0)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if not wants_gradient(images, weight, bias):
        output, _ = _forward(images, weight, bias, pattern, options, save=False)
    elif is_eager():
        output = _apply_eagerly(images, weight, bias, options, pattern)
    else:
        output, _ = MaskedConv2dFunction.apply(images, weight, bias, options, pattern)  # type: ignore[no-untyped-call]
    return output if input.dim() == 4 else output.squeeze(0)
