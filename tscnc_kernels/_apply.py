"""Calls of an autograd Function without the Python that torch puts around them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_eager() -> bool:
    """Whether this call runs now, on tensors with data: neither traced nor transformed."""
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())


def eager_apply(function: type[torch.autograd.Function], tensors: int) -> Callable[..., Any]:
    """`function.apply` for calls where `is_eager()`, about 20 µs faster.

    torch's own binds the arguments to forward's signature on every call, for the sake of functorch.
    This one wants all arguments, in order, of which the first `tensors` are tensors or None.
    """
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    alive = torch._C._functorch.unwrap_if_dead

    def call(*args: Any) -> Any:
        living = [arg if arg is None else alive(arg) for arg in args[:tensors]]
        return apply(*living, *args[tensors:])

    return call


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record a call with these arguments."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False
