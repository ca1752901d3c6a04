"""Batch normalisation and ReLU in one op, in the memory layout that its input has.

Formula, over the entries of each channel c, n of them per batch:

    y  = max(0, (x − μ) s + b),   s = w / √(σ² + ε)
    ĝ  = dy where y > 0, else 0
    db = Σ ĝ,   dw = Σ ĝ (x − μ) / √(σ² + ε)
    dx = s (ĝ − db / n − (x − μ) Σ ĝ (x − μ) / (n (σ² + ε)))     in training
    dx = s ĝ                                                      with given statistics

In training μ and σ² are the batch's mean and biased variance; running statistics move by
`momentum` towards the mean and the unbiased variance, as in torch.

Both passes read memory twice at most: statistics, then output; sums, then gradient. Saved are x and
two numbers per channel, in float64: neither the normalised tensor nor the output, from which the
sign of y would follow, but from x just as well. Sums are taken about a mean of the data and joined
in float64, so that a mean far above the deviation costs no digits.

Layouts: NCHW, channels_last, (B, N) row-major, and (B, N) feature-major with strides (1, B), as
sparse layers leave it; the output has the input's. Any other input is copied once.

Source: Ioffe and Szegedy, arXiv 1502.03167; pairwise variance, Chan, Golub, LeVeque 1979.
"""

import inspect
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tscnc_kernels import _backend
from tscnc_kernels._checks import check_floating, check_number
from tscnc_kernels._vmap import register_loop_vmap
from tscnc_kernels._wanted import wanted_gradients

# Native first: benchmarks/results/*/batch_norm_relu.csv.
BACKENDS = ("native", "reference")
_backend.register("batch_norm_relu", BACKENDS)

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _check(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> None:
    check_floating("input", input)
    if input.dim() < 2 or input.dim() > 5:
        raise ValueError(f"expected input of 2 to 5 dimensions, got shape {tuple(input.shape)}")
    channels = input.shape[1]
    named = {
        "running_mean": running_mean,
        "running_var": running_var,
        "weight": weight,
        "bias": bias,
    }
    for name, tensor in named.items():
        if tensor is None:
            continue
        check_floating(name, tensor)
        if tuple(tensor.shape) != (channels,):
            raise ValueError(f"expected {name} of shape ({channels},), got {tuple(tensor.shape)}")
        if tensor.device != input.device:
            raise ValueError(
                f"expected {name} on the input's device {input.device}, got {tensor.device}"
            )
    if (running_mean is None) != (running_var is None):
        raise ValueError("expected running_mean and running_var, or neither")
    if not training and running_mean is None:
        raise ValueError("expected running_mean and running_var without training, got None")
    if training and input.numel() == channels:
        raise ValueError(
            f"expected more than one value per channel in training, got input of shape "
            f"{tuple(input.shape)}"
        )
    check_number("momentum", momentum, 0, 1)
    check_number("eps", eps, 0)


def _exact(input: Tensor) -> Tensor:
    return input if input.dtype == torch.float64 else input.float()


def _reduced(input: Tensor) -> list[int]:
    return [dim for dim in range(input.dim()) if dim != 1]


def _statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel."""
    variance, mean = torch.var_mean(_exact(input), _reduced(input), correction=0)
    return mean, variance


def reference(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    *,
    eps: float = 1e-5,
    relu: bool = True,
) -> Tensor:
    """Plain torch, differentiable to any order; the batch's statistics if none are given."""
    x = _exact(input)
    if mean is None or variance is None:
        mean, variance = _statistics(input)
    y = (x - _spread(mean, x)) * _spread((variance.to(x.dtype) + eps).rsqrt(), x)
    y = y if weight is None else y * _spread(weight, x)
    y = y if bias is None else y + _spread(bias, x)
    return (F.relu(y) if relu else y).to(input.dtype)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """One value per channel, shaped to meet `like`."""
    return values.to(like.dtype).reshape(-1, *(1,) * (like.dim() - 2))


def reference_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    eps: float,
    relu: bool,
) -> Gradients:
    """Gradients of `reference` for input, weight and bias, themselves differentiable."""
    x, dims = _exact(input), _reduced(input)
    training = mean is None or variance is None
    if mean is None or variance is None:
        mean, variance = _statistics(input)
    deviation = x - _spread(mean, x)
    inverse = (variance.to(x.dtype) + eps).rsqrt()
    scale = inverse if weight is None else inverse * weight.to(x.dtype)
    g = grad_output.to(x.dtype)
    if relu:
        y = deviation * _spread(scale, x)
        y = y if bias is None else y + _spread(bias, x)
        g = g.masked_fill(y <= 0, 0)
    total, product = g.sum(dims), (g * deviation).sum(dims)
    centred = g
    if training:
        count = input.numel() / input.shape[1]
        slope = product * inverse * inverse / count
        centred = g - _spread(total / count, x) - deviation * _spread(slope, x)
    grad_input = (centred * _spread(scale, x)).to(input.dtype)
    grad_weight = None if weight is None else (product * inverse).to(weight.dtype)
    return grad_input, grad_weight, None if bias is None else total.to(bias.dtype)


@torch.library.register_fake("tscnc_kernels::batch_norm_relu")
def _(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, variance = (input.new_empty(input.shape[1], dtype=torch.float64) for _ in range(2))
    return torch.empty_like(input), mean, variance


@torch.library.register_fake("tscnc_kernels::batch_norm_relu_backward")
def _(grad_output: Tensor, input: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs_input, needs_affine = rest[-2:]
    size = input.shape[1] if needs_affine else 0
    grad_weight, grad_bias = (input.new_empty(size, dtype=torch.float64) for _ in range(2))
    return input.new_empty(input.shape if needs_input else (0,)), grad_weight, grad_bias


_native = torch.ops.tscnc_kernels
for _name in ("batch_norm_relu", "batch_norm_relu_backward"):
    register_loop_vmap(_name, getattr(_native, _name))


class _Options(NamedTuple):
    eps: float
    relu: bool
    training: bool


class BatchNormReLUFunction(torch.autograd.Function):
    """On a contiguous (outer, channels, length) input; the statistics are outputs, too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, weight, bias, mean, variance, options):  # type: ignore[no-untyped-def]
        return _native.batch_norm_relu(
            input, weight, bias, mean, variance, options.eps, options.relu
        )

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        input, weight, bias, _, _, ctx.options = inputs
        _, mean, variance = output
        ctx.mark_non_differentiable(mean, variance)
        ctx.save_for_backward(input, weight, bias, mean, variance)

    @staticmethod
    def backward(ctx, grad_output, *_):  # type: ignore[no-untyped-def]
        input, weight, bias, mean, variance = ctx.saved_tensors
        eps, relu, training = ctx.options
        if torch.is_grad_enabled():
            if training:
                mean = variance = None
            gradients = reference_backward(
                grad_output, input, weight, bias, mean, variance, eps, relu
            )
            return *gradients, None, None, None
        needs_input, *affine = wanted_gradients(ctx, (input, weight, bias))
        found = _native.batch_norm_relu_backward(
            grad_output.contiguous(),
            *(input, weight, bias, mean, variance),
            *(eps, relu, training, needs_input, any(affine)),
        )
        grad_input = found[0] if needs_input else None
        grad_weight = found[1].to(weight.dtype) if affine[0] else None
        grad_bias = found[2].to(bias.dtype) if affine[1] else None
        return grad_input, grad_weight, grad_bias, None, None, None


# torch binds forward's arguments by its signature on every call; inspecting it anew takes 50 µs.
BatchNormReLUFunction.forward.__signature__ = inspect.signature(  # type: ignore[attr-defined]
    BatchNormReLUFunction.forward
)


def _layout(input: Tensor) -> str:
    """How the channels lie in memory: "planes", "channels_last" or "feature_major".

    Any other layout counts as planes, to which it is copied.
    """
    if not input.is_contiguous():
        if input.dim() == 2:
            return "feature_major" if input.t().is_contiguous() else "planes"
        if input.movedim(1, -1).is_contiguous():
            return "channels_last"
    return "planes"


def _as_planes(input: Tensor, layout: str) -> Tensor:
    """The input as a contiguous (outer, channels, length) tensor."""
    batch, channels = input.shape[:2]
    if layout == "feature_major":
        return input.t().unsqueeze(0)
    if layout == "channels_last":
        return input.movedim(1, -1).reshape(-1, channels, 1)
    return input.reshape(batch, channels, math.prod(input.shape[2:])).contiguous()


def _as_input(output: Tensor, input: Tensor, layout: str) -> Tensor:
    """What `_as_planes` made of an input, back in the input's shape and layout."""
    batch, channels, *spatial = input.shape
    if layout == "feature_major":
        return output.squeeze(0).t()
    if layout == "channels_last":
        return output.reshape(batch, *spatial, channels).movedim(-1, 1)
    return output.reshape(input.shape)


@torch.no_grad()
def _move(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    count: int,
) -> None:
    if running_mean is None or running_var is None:
        return
    unbiased = variance * (count / (count - 1))
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    relu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Batch normalisation and ReLU, max(0, (x − μ) w / √(σ² + ε) + b), in one op.

    The arguments are those of torch.nn.functional.batch_norm.

    Args:
        input: (N, C) or (N, C, …) tensor of dtype float32, float64, bfloat16 or float16, any
            layout.
        running_mean: (C,) tensor, or None; read without training, moved in training.
        running_var: (C,) tensor, or None, in the same way.
        weight: (C,) tensor of any of these dtypes, or None for 1.
        bias: (C,) tensor, or None for 0.
        training: normalise by the batch's statistics.
        momentum: how far running statistics move, in [0, 1].
        eps: ε ≥ 0.
        relu: False leaves the ReLU out.
        backend: "native" or "reference"; None chooses.

    Returns:
        Tensor of the input's shape, dtype and layout; half types are computed in float32.

    Raises:
        ValueError: shapes, devices or numbers that do not fit, no statistics, or one value per
            channel in training.
        TypeError: a dtype that is not supported.
        RuntimeError: the backend cannot run here.

    Autograd: any order in input, weight and bias; second and higher orders run in plain torch. The
        derivative of ReLU at 0 is 0. Autocast does not change the dtype.

    Source: arXiv 1502.03167.
    """
    _check(input, running_mean, running_var, weight, bias, training, momentum, eps)
    chosen = _backend.select("batch_norm_relu", input.device, backend)
    if chosen == "reference":
        mean, variance = _statistics(input) if training else (running_mean, running_var)
        output = reference(input, weight, bias, mean, variance, eps=eps, relu=relu)
    else:
        given = (None, None) if training else (running_mean, running_var)
        layout = _layout(input)
        planes = _as_planes(input, layout)
        options = _Options(eps, relu, training)
        inputs = planes, weight, bias
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
            found = BatchNormReLUFunction.apply(*inputs, *given, options)  # type: ignore[no-untyped-call]
        else:
            found = _native.batch_norm_relu(*inputs, *given, eps, relu)
        output, mean, variance = _as_input(found[0], input, layout), found[1], found[2]
    if training and mean is not None and variance is not None:
        _move(running_mean, running_var, mean, variance, momentum, input.numel() // input.shape[1])
    return output
