"""Transformed l1, the penalty of TSC, over a list of tensors in one call.

Formula, with t running over every element of every tensor and a > 0:

    value    = Σ ρ_a(|t|),   ρ_a(t) = (a + 1) t / (a + t)
    gradient = grad_output · sign(t) · a (a + 1) / (a + |t|)²,   0 at t = 0

a → 0 gives the number of non-zeros, a → ∞ the l1 norm.

Source: Ma, Miao, Niu, Zhang, arXiv 1901.01021; the penalty inside TSC of arXiv 2503.20454. The code
published with the latter passes a negative argument, which has a pole at |t| = a; this is the
function of |t|.

The backward pass recomputes from the tensors, which reads less memory than a saved gradient would.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tscnc_kernels import _backend
from tscnc_kernels._checks import SMALLEST, check_floating_list, check_number
from tscnc_kernels._vmap import register_loop_vmap

# Native first: benchmarks/results/*/transformed_l1.csv.
BACKENDS = ("native", "triton", "reference")
_backend.register("transformed_l1", BACKENDS)


def _check(tensors: Sequence[Tensor], a: float) -> None:
    check_floating_list("tensors", tensors)
    for index, tensor in enumerate(tensors):
        if tensor.dtype != tensors[0].dtype:
            raise TypeError(
                f"expected tensors of one dtype, got {tensors[0].dtype} and {tensor.dtype} "
                f"at tensors[{index}]"
            )
    check_number("a", a, SMALLEST)


def _value_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def reference(tensors: Sequence[Tensor], a: float) -> Tensor:
    """Plain torch, differentiable to any order."""
    dtype = _value_dtype(tensors[0])
    magnitudes = [tensor.to(dtype).abs() for tensor in tensors]
    return torch.stack([((a + 1) * (t / (a + t))).sum() for t in magnitudes]).sum()


def reference_backward(grad_output: Tensor, tensors: Sequence[Tensor], a: float) -> list[Tensor]:
    """Gradient of `reference`, itself differentiable."""
    dtype = _value_dtype(tensors[0])
    gradients = []
    for tensor in tensors:
        t = tensor.to(dtype)
        reach = a + t.abs()
        # Two quotients: the square of `reach` would overflow.
        slope = (a / reach) * ((a + 1) / reach) * t.sign()
        gradients.append((grad_output * slope).to(tensor.dtype))
    return gradients


def _reference_value_and_grad(tensors: Sequence[Tensor], a: float) -> tuple[Tensor, list[Tensor]]:
    value = reference(tensors, a)
    return value, reference_backward(torch.ones_like(value), tensors, a)


@torch.library.register_fake("tscnc_kernels::transformed_l1")
def _(tensors: list[Tensor], a: float) -> Tensor:
    return tensors[0].new_empty((), dtype=_value_dtype(tensors[0]))


@torch.library.register_fake("tscnc_kernels::transformed_l1_backward")
def _(grad_output: Tensor, tensors: list[Tensor], a: float) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in tensors]


@torch.library.register_fake("tscnc_kernels::transformed_l1_value_and_grad")
def _(tensors: list[Tensor], a: float) -> tuple[Tensor, list[Tensor]]:
    value = tensors[0].new_empty((), dtype=_value_dtype(tensors[0]))
    return value, [torch.empty_like(tensor) for tensor in tensors]


_native = torch.ops.tscnc_kernels
for _name in ("transformed_l1", "transformed_l1_backward", "transformed_l1_value_and_grad"):
    register_loop_vmap(_name, getattr(_native, _name))


def _value(tensors: list[Tensor], a: float, backend: str) -> Tensor:
    if backend == "native":
        return _native.transformed_l1(tensors, a)
    if backend == "triton":
        from tscnc_kernels.triton import transformed_l1 as triton

        return triton.transformed_l1(tensors, a)
    return reference(tensors, a)


def _gradients(grad_output: Tensor, tensors: list[Tensor], a: float, backend: str) -> list[Tensor]:
    if backend == "native":
        return _native.transformed_l1_backward(grad_output, tensors, a)
    if backend == "triton":
        from tscnc_kernels.triton import transformed_l1 as triton

        return triton.transformed_l1_backward(grad_output, tensors, a)
    return reference_backward(grad_output, tensors, a)


class TransformedL1Function(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: float, backend: str, *tensors: Tensor) -> Tensor:
        return _value(list(tensors), a, backend)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.a, ctx.backend, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        wanted = ctx.needs_input_grad[2:]
        tensors = [t for t, needed in zip(ctx.saved_tensors, wanted, strict=True) if needed]
        if torch.is_grad_enabled():
            found = iter(reference_backward(grad_output, tensors, ctx.a))
        else:
            found = iter(_gradients(grad_output, tensors, ctx.a, ctx.backend))
        return None, None, *(next(found) if needed else None for needed in wanted)


def transformed_l1(
    tensors: Sequence[Tensor], a: float = 1.0, *, backend: str | None = None
) -> Tensor:
    """Sum of the transformed l1 penalty ρ_a(|t|) = (a + 1)|t| / (a + |t|) over a list of tensors.

    Args:
        tensors: list of tensors of any shapes, all of one floating dtype (float32, float64,
            bfloat16, float16) and on one device. Non-contiguous tensors are copied.
        a: shape parameter, in [1e-15, 1e15].
        backend: "native", "triton" or "reference"; None chooses.

    Returns:
        0-d tensor, float32 (float64 for float64 tensors); half types are computed in float32. NaN
        or infinite elements give NaN.

    Raises:
        ValueError: empty list, tensors on several devices, or a out of range.
        TypeError: not a list, a dtype that is not supported, or several dtypes.
        RuntimeError: the backend cannot run here.

    Autograd: any order. Autocast does not change the dtype.

    Source: arXiv 1901.01021; arXiv 2503.20454.
    """
    _check(tensors, a)
    chosen = _backend.select("transformed_l1", tensors[0].device, backend)
    dense = [tensor.contiguous() for tensor in tensors]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in dense):
        return TransformedL1Function.apply(a, chosen, *dense)  # type: ignore[no-untyped-call]
    return _value(dense, a, chosen)


def transformed_l1_value_and_grad(
    tensors: Sequence[Tensor], a: float = 1.0, *, backend: str | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients of `transformed_l1` in one pass over memory, outside autograd.

    Args:
        tensors: as for `transformed_l1`.
        a: as for `transformed_l1`.
        backend: as for `transformed_l1`.

    Returns:
        The 0-d value, and one gradient per tensor with its shape and dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as `transformed_l1`.
    """
    _check(tensors, a)
    chosen = _backend.select("transformed_l1", tensors[0].device, backend)
    with torch.no_grad():
        dense = [tensor.detach().contiguous() for tensor in tensors]
        if chosen == "native":
            return _native.transformed_l1_value_and_grad(dense, a)
        if chosen == "triton":
            from tscnc_kernels.triton import transformed_l1 as triton

            return triton.transformed_l1_value_and_grad(dense, a)
        return _reference_value_and_grad(dense, a)
