"""Shapes of what the native ops behind SparsityPattern return (csrc/sparsity*.cpp)."""

import torch
from torch import Tensor

from tscnc_kernels import _build as _build  # loads the library that registers the ops


@torch.library.register_fake("tscnc_kernels::sparsity_pack")
def _(mask: Tensor) -> Tensor:
    return mask.new_empty(((mask.numel() + 7) // 8,), dtype=torch.uint8)


@torch.library.register_fake("tscnc_kernels::sparsity_build")
def _(bits: Tensor, rows: int, width: int) -> tuple[Tensor, ...]:
    nnz = torch.library.get_ctx().new_dynamic_size()
    sizes = (rows + 1, nnz, width + 1, nnz, nnz)
    return tuple(bits.new_empty((size,), dtype=torch.int32) for size in sizes)


@torch.library.register_fake("tscnc_kernels::sparsity_block")
def _(pointers: Tensor, columns: Tensor, width: int) -> Tensor:
    rows, kept = pointers.shape[0] - 1, columns.shape[0]
    step = 96 if 10 * kept > 3 * rows * width else 128
    blocks, tiles = -(-width // step), -(-rows // 256)
    size = 40 + 4 * (tiles * blocks + 1) + rows * blocks + kept
    return pointers.new_empty((size,), dtype=torch.uint8)


@torch.library.register_fake("tscnc_kernels::sparsity_block_order")
def _(buffer: Tensor, order: Tensor, rows: int, width: int) -> Tensor:
    return torch.empty_like(order)


@torch.library.register_fake("tscnc_kernels::sparsity_block_shape")
def _(row_pointers: Tensor, columns: Tensor, width: int) -> Tensor:
    return columns.new_empty((2,), dtype=torch.int64)


@torch.library.register_fake("tscnc_kernels::sparsity_unpack")
def _(bits: Tensor, rows: int, width: int) -> Tensor:
    return bits.new_empty((rows, width), dtype=torch.bool)


@torch.library.register_fake("tscnc_kernels::sparsity_mapping")
def _(old_bits: Tensor, new_bits: Tensor) -> Tensor:
    nnz = torch.library.get_ctx().new_dynamic_size()
    return new_bits.new_empty((nnz,), dtype=torch.int64)


@torch.library.register_fake("tscnc_kernels::sparsity_places")
def _(bits: Tensor) -> Tensor:
    return bits.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int32)


@torch.library.register_fake("tscnc_kernels::sparsity_remap")
def _(values: Tensor, mapping: Tensor) -> Tensor:
    return values.new_empty(mapping.shape)
