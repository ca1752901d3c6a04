"""Which gradients a running backward pass wants from an autograd Function."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tscnc_kernels._apply import is_eager


def wanted_gradients(ctx: Any, inputs: Sequence[Tensor | None]) -> list[bool]:
    """Per input, whether this backward pass uses its gradient.

    `ctx.needs_input_grad` tells which inputs require one at all. A pass that asks for some tensors
    only, like an attack's `torch.autograd.grad(loss, input)`, would still compute the weights'
    gradients; torch's own ops ask the engine, and so does this.

    Args:
        ctx: the context of a backward that runs now.
        inputs: the first arguments of `forward`; None for a missing one.
    """
    needed = list(ctx.needs_input_grad[: len(inputs)])
    # The engine runs no node for nothing.
    if sum(needed) < 2 or not is_eager():
        return needed
    nodes = iter(ctx.next_functions)
    asked = [(i, t.is_leaf, next(nodes)[0]) for i, t in enumerate(inputs) if t is not None]
    refused = False
    # An attack's input comes last: it is the leaf that autograd.grad() is often asked for alone.
    for index, is_leaf, node in reversed(asked):
        if node is None or (is_leaf and refused):
            continue
        try:
            needed[index] = torch._C._will_engine_execute_node(node)
        except RuntimeError:
            # torch refuses to answer for leaves that autograd.grad() was asked for. Where it was
            # asked for one, the others count as wanted: a refusal costs as much as a small layer.
            refused = True
    return needed
