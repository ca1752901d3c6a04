"""Run a model as the non-negative linear network that only knows which weights are connected."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tscnc.pruning.layers import plain_copy, prunable


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names of torch functions without leading and trailing underscores: add_ and __add__ are add.
_IDENTITY = _words(
    """abs alpha_dropout batch_norm celu clamp detach dropout dropout1d dropout2d dropout3d elu exp
    feature_alpha_dropout feature_dropout gelu group_norm hardshrink hardsigmoid hardswish hardtanh
    instance_norm layer_norm leaky_relu local_response_norm log log_softmax logsigmoid mish neg
    normalize pow prelu relu relu6 rms_norm rrelu rsqrt selu sigmoid silu softmax softplus
    softshrink softsign sqrt square tanh tanhshrink threshold"""
)
_UNCHANGED = _words(
    """adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d avg_pool1d avg_pool2d avg_pool3d
    bmm cat channel_shuffle chunk clone concat concatenate contiguous double einsum expand expand_as
    flatten flip float get getitem interpolate matmul mean movedim narrow pad permute pixel_shuffle
    pixel_unshuffle repeat repeat_interleave reshape roll select split squeeze stack sum swapaxes t
    tile to transpose type_as unbind unflatten unfold unsqueeze view view_as"""
)
_AFFINE = _words("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
_SUM_LIKE = _words("add sub rsub maximum minimum")
_QUOTIENT_LIKE = _words("div true_divide")


def linear_responses(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    example_input: Tensor,
    *,
    support_only: bool = False,
) -> dict[str, Tensor]:
    """∂R/∂w of the linearised model, R the sum of its outputs for an input of ones.

    Linearised means: the given non-negative weights (every other parameter 1), no biases, identity
    for activations and normalisations, average pooling for max pooling. The gradient of a weight is
    the sum, over all input-to-output paths through it, of the product of the other weights. The
    model is traced as it runs, so residual and branching models work; it is not changed.

    Args:
        model: a module that maps one float tensor (N, ...) to a tensor or several.
        weights: a non-negative weight for every prunable layer, by parameter name.
        example_input: (N, ...) float tensor; only its shape beyond N and its device matter.
        support_only: replace every activation and its gradient by 1 where positive. Of the result
            only the sign then means anything, but nothing can overflow or underflow at any depth.

    Returns:
        float64 tensors of the weights' shapes, by parameter name; zero for an unused layer.

    Raises:
        TypeError: the example input is not a float tensor.
        ValueError: the model uses an operation that has no linearised form here.
    """
    if not example_input.is_floating_point():
        raise TypeError(f"expected a float example input, got {example_input.dtype}")
    linear = plain_copy(model).double().eval()
    leaves = prunable(linear)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.requires_grad_(False).fill_(1.0)
        for name, leaf in leaves.items():
            leaf.copy_(weights[name]).requires_grad_(True)
    # Whatever depends on the input requires a gradient: that is how constants are told apart.
    ones = torch.ones_like(example_input[:1], dtype=torch.float64, requires_grad=True)
    # A model may add in place to what another layer has seen, which autograd alone would refuse.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_copied, _as_it_is):
        with _Linearised(support_only):
            outputs = linear(ones)
        sums = [output.sum() for output in _tensors(outputs) if output.requires_grad]
        if not sums:
            raise ValueError(f"no output of {type(model).__name__} depends on its input")
        gradients = torch.autograd.grad(sums, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }


class _Support(torch.autograd.Function):
    """1 where positive, in the forward and in the backward direction."""

    @staticmethod
    def forward(input: Tensor) -> Tensor:
        return (input > 0).to(input.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return (grad_outputs[0] > 0).to(grad_outputs[0].dtype)


class _Linearised(TorchFunctionMode):
    """Replaces every torch function the model calls by its linearised form."""

    def __init__(self, support_only: bool) -> None:
        super().__init__()
        self._support_only = support_only

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        # A name with one underscore at its end works in place.
        in_place = name.endswith("_") and not name.endswith("__") and len(args) > 0
        target = args[0] if in_place else None
        if isinstance(target, Tensor):
            args = (target.clone(), *args[1:])
        output = _linearised(func, name.strip("_"), args, kwargs or {})
        if not isinstance(output, Tensor) or not output.requires_grad:
            return output
        if self._support_only:
            output = _Support.apply(output)  # type: ignore[no-untyped-call]
        return output if target is None else target.copy_(output)


def _linearised(
    func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    operands = [tensor for tensor in _tensors((args, kwargs)) if tensor.requires_grad]
    if not operands or name in _UNCHANGED:
        return func(*args, **kwargs)
    if name in _IDENTITY:
        return args[0].clone()  # not the tensor itself: the model may change the result in place
    if name in _AFFINE:
        # The third argument is the bias in all of them.
        without_bias = {key: value for key, value in kwargs.items() if key != "bias"}
        return func(*args[:2], *[None for _ in args[2:3]], *args[3:], **without_bias)
    if name in _SUM_LIKE:
        # Constants that are added are biases; subtraction adds, since only connections count.
        return sum(_with_constants_as(0, args, kwargs))
    if name == "mul":
        return math.prod(_with_constants_as(1, args, kwargs))
    if name in _QUOTIENT_LIKE and args[0].requires_grad:
        # What an activation is divided by only scales it.
        return math.prod([args[0], *map(torch.ones_like, _tensors(args[1:]))])
    if name.startswith("max_pool"):
        return _average_pool(name, *args, **kwargs)
    if name.startswith("adaptive_max_pool"):
        return _adaptive_average_pool(name, *args, **kwargs)
    output = func(*args, **kwargs)
    if any(tensor.requires_grad for tensor in _tensors(output)):
        raise ValueError(
            f"the model calls {name}, for which there is no linearised form; "
            "a Sequential model can use mode='graph'"
        )
    return output


def _with_constants_as(value: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among the arguments; those that do not depend on the input are filled."""
    return [
        tensor if tensor.requires_grad else torch.full_like(tensor, value)
        for tensor in _tensors((args, kwargs))
    ]


def _average_pool(
    name: str,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """Average pooling over the windows of a max pooling: both see the same inputs."""
    if return_indices or any(step != 1 for step in _flat(dilation)):
        raise ValueError(
            f"no linearised form of {name} with dilation {dilation} and "
            f"return_indices={return_indices}, expected 1 and False"
        )
    pool = getattr(F, f"avg_pool{name[len('max_pool')]}d")
    output: Tensor = pool(input, kernel_size, stride, padding, ceil_mode)
    return output


def _adaptive_average_pool(
    name: str, input: Tensor, output_size: Any, return_indices: bool = False
) -> Tensor:
    if return_indices:
        raise ValueError(f"no linearised form of {name} with return_indices=True, expected False")
    output: Tensor = getattr(F, f"adaptive_avg_pool{name[len('adaptive_max_pool')]}d")(
        input, output_size
    )
    return output


def _copied(saved: Tensor) -> Tensor:
    return saved.clone()


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def _flat(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a value of nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
