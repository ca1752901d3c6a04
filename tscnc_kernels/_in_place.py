"""Native ops that write lists of parameters and their state, whatever order these lie in memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tscnc_kernels.sparsity import SparsityPattern

Patterns = Sequence[SparsityPattern | None]
_WHOLE = torch.empty(0, dtype=torch.int32)


def pattern_indices(patterns: Patterns) -> tuple[list[Tensor], list[Tensor]]:
    """Row pointers and columns; empty ones for tensors that are stepped wholly."""
    pointers = [_WHOLE if p is None else p.row_pointers for p in patterns]
    return pointers, [_WHOLE if p is None else p.columns for p in patterns]


def _order(param: Tensor, pattern: SparsityPattern | None) -> list[int]:
    """Dimensions as they lie in memory, where every entry is stepped alike (channels_last)."""
    dims = range(param.dim())
    return list(dims) if pattern is not None else sorted(dims, key=param.stride, reverse=True)


def run_in_place(
    op: Callable[..., None],
    written: Sequence[Sequence[Tensor]],
    grads: Sequence[Tensor],
    patterns: Patterns,
    *rest: object,
) -> None:
    """op(params, grads, *states, *rest) on contiguous tensors; `written` are params and states.

    Tensors in another memory order than row-major are permuted to it if that suffices, else copied,
    and copied back.
    """
    copies: list[tuple[Tensor, Tensor]] = []
    lists, gradients = [list(tensors) for tensors in written], list(grads)
    for index, pattern in enumerate(patterns):
        everything = [gradients[index], *(tensors[index] for tensors in lists if tensors)]
        if all(tensor.is_contiguous() for tensor in everything):
            continue
        order = _order(lists[0][index], pattern)
        ordered = [t.permute(order) if t.dim() == len(order) else t for t in everything]
        dense = [tensor.contiguous() for tensor in ordered]
        gradients[index] = dense[0]
        for tensors, view, copy in zip(filter(None, lists), ordered[1:], dense[1:], strict=True):
            tensors[index] = copy
            if copy is not view:
                copies.append((view, copy))
    op(lists[0], gradients, *lists[1:], *rest)
    for view, copy in copies:
        view.copy_(copy)
    for changed in written:
        torch.autograd.graph.increment_version(changed)
