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
    lists, copies = [list(grads), *(list(tensors) for tensors in written)], []
    for place, tensors in enumerate(zip(*filter(None, lists), strict=True)):
        if not all([tensor.is_contiguous() for tensor in tensors]):
            copies += _make_contiguous(lists, place, patterns[place])
    grads, params, *states = lists
    op(params, grads, *states, *rest)
    for view, copy in copies:
        view.copy_(copy)
    for changed in written:
        torch.autograd.graph.increment_version(changed)


def _make_contiguous(
    lists: list[list[Tensor]], place: int, pattern: SparsityPattern | None
) -> list[tuple[Tensor, Tensor]]:
    """Replaces the tensors of one parameter; returns what was copied with the copies."""
    copies = []
    order = _order(lists[1][place], pattern)
    for tensors in filter(None, lists):
        tensor = tensors[place]
        view = tensor.permute(order) if tensor.dim() == len(order) else tensor
        tensors[place] = view.contiguous()
        if tensors is not lists[0] and tensors[place] is not view:
            copies.append((view, tensors[place]))
    return copies
