"""Which gradients a running backward pass wants from an autograd Function."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tscnc_kernels._apply import is_eager

_will_run = torch._C._will_engine_execute_node
_pass_id = torch._C._current_graph_task_id
# Passes for which a refusal of torch's is remembered where the input is a leaf.
PATIENCE = 16


class _Refusals:
    """The last backward passes in which torch did not answer."""

    last = -1
    last_for_leaf_input = -PATIENCE


def wanted_gradients(ctx: Any, inputs: Sequence[Tensor | None]) -> list[bool]:
    """Per input, whether this backward pass uses its gradient.

    `ctx.needs_input_grad` tells which inputs require one at all. A pass that asks for some tensors
    only, like an attack's `torch.autograd.grad(loss, input)`, would still compute the weights'
    gradients; torch's own ops ask the engine, and so does this.

    torch refuses to answer for leaves that autograd.grad() was asked for, and a refusal costs as
    much as a small layer. So the input comes last, which an attack asks for alone, and after a
    refusal all leaves count as wanted until the pass is over. A layer whose input is a leaf too
    asks again some passes later only: whoever asks for that input and the weights at once does so
    repeatedly, and does not train by it.

    Args:
        ctx: the context of a backward that runs now.
        inputs: the first arguments of `forward`; None for a missing one.
    """
    wanted = list(ctx.needs_input_grad[: len(inputs)])
    left = sum(wanted)
    if left < 2 or not is_eager():
        return wanted
    this, has_leaf_input = _pass_id(), inputs[0] is not None and inputs[0].is_leaf and wanted[0]
    if has_leaf_input and this - _Refusals.last_for_leaf_input < PATIENCE:
        return wanted
    nodes = iter(ctx.next_functions)
    asked = [(i, t.is_leaf, next(nodes)[0]) for i, t in enumerate(inputs) if t is not None]
    some = False
    for index, is_leaf, node in reversed(asked):
        if not wanted[index]:
            continue
        left -= 1
        if not left and not some:
            # The engine runs no node for nothing.
            break
        if not is_leaf or this != _Refusals.last:
            try:
                wanted[index] = _will_run(node)
            except RuntimeError:
                _Refusals.last = this
                if has_leaf_input:
                    _Refusals.last_for_leaf_input = this
        some = some or wanted[index]
    return wanted
