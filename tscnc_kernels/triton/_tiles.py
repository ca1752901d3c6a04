"""What the tensor-core products share: tiles, their order, one step of a sum, activations."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

GROUP = 8  # programs that share rows of the weight or samples in the L2 cache


@triton.jit
def add_product(left, right, sums, PRECISION: tl.constexpr):
    """Sums + left right. Triton 3.6 compiles no float64 `tl.dot` of operands in registers."""
    if sums.dtype == tl.float64:
        sums += tl.sum(left[:, :, None] * right[None, :, :], axis=1)
    else:
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    return sums


@triton.jit
def tile_of_program(row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of this program's tile, in an order that keeps neighbours close."""
    program = tl.program_id(0)
    group = program // (GROUP * column_tiles)
    first = group * GROUP
    size = min(row_tiles - first, GROUP)
    inside = program % (GROUP * column_tiles)
    return first + inside % size, inside // size


@triton.jit
def activated(sums, ACTIVATION: tl.constexpr):
    """act(sums), by the codes of `_activation.ACTIVATIONS`."""
    if ACTIVATION == 1:
        sums = tl.where(sums < 0, 0.0, sums)
    if ACTIVATION == 2:
        sums = 0.5 * sums * (1.0 + tl.erf(sums * 0.7071067811865476))
    return sums


class Tile(NamedTuple):
    """Sizes of a program's tile: of the result, and of what it takes per step of its sum."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def math_type(dtype: torch.dtype) -> tl.dtype:
    """What sums over tensors of a dtype are kept in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def precision(dtype: torch.dtype) -> str:
    """What `tl.dot` may do to its operands: torch's own switch decides for float32."""
    is_strict = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if is_strict else "tf32"
