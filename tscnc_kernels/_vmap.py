"""vmap rules of the raw ops."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree


def register_loop_vmap(name: str, op: Callable[..., Any]) -> None:
    """Register a vmap rule for `tscnc_kernels::<name>` that runs the op once per example."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        leaves, spec = pytree.tree_flatten(list(args))
        dims = pytree.tree_leaves(
            pytree.tree_map(lambda dim: -1 if dim is None else dim, _align(in_dims, args))
        )

        def example(index: int) -> Any:
            picked = [
                leaf.select(dim, index) if isinstance(leaf, torch.Tensor) and dim >= 0 else leaf
                for leaf, dim in zip(leaves, dims, strict=True)
            ]
            return op(*pytree.tree_unflatten(picked, spec))

        if info.batch_size == 0:
            raise ValueError(f"expected {name} over a batch of at least one example, got 0")
        results = [example(index) for index in range(info.batch_size)]
        stacked = pytree.tree_map(lambda *parts: torch.stack(parts), *results)
        return stacked, pytree.tree_map(lambda _: 0, stacked)

    torch.library.register_vmap(f"tscnc_kernels::{name}", rule)


def register_elementwise_vmap(name: str, op: Callable[..., Any]) -> None:
    """Register a vmap rule for an element-wise `tscnc_kernels::<name>`: one call on the batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        batched = []
        for arg, dim in zip(args, in_dims, strict=True):
            if isinstance(arg, torch.Tensor):
                shared = arg.expand(info.batch_size, *arg.shape)
                arg = (shared if dim is None else arg.movedim(dim, 0)).contiguous()
            batched.append(arg)
        return op(*batched), 0

    torch.library.register_vmap(f"tscnc_kernels::{name}", rule)


def _align(in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[Any]:
    """in_dims with the structure of args: a list argument gets one dim per element."""
    aligned = []
    for dim, arg in zip(in_dims, args, strict=True):
        if isinstance(arg, (list, tuple)):
            aligned.append(list(dim) if isinstance(dim, (list, tuple)) else [dim] * len(arg))
        else:
            aligned.append(dim)
    return aligned
