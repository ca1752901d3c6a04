"""Triton kernel of gram_iteration: one step on symmetric tiles; formula: ops/gram_iteration.py.

A step makes S = s AᵀA of float64 matrices on the tensor cores, with s = 1 / ‖A‖_F² of the step
before. Tiles on and below the diagonal are computed, and stored a second time as their mirror
images, which halves the products. Every program also writes the sum of the squares of what it
stored, from which the next step's scale is made without reading S again. Nothing waits for the GPU.

Rounding: as in the reference, whatever the order of the sums: a sum of k products is off by at
most k u ‖A‖_F² in norm, u = 2⁻⁵³; scaling the result instead of the operands rounds three times.
The charge of (k + 16) u covers both, and mirrored tiles make S exactly symmetric.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tscnc_kernels.triton import Variant

_UNIT = 2.0**-53


@triton.jit
def gram_step_kernel(
    matrix,
    scales,
    result,
    squares,
    rows,
    width,
    tiles,
    batch_stride,
    row_stride,
    column_stride,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Result (width, width) = scale matrixᵀ matrix of one matrix of a batch, and its squares' sums.

    Program p of a matrix computes the p-th tile of the lower half, row by row.
    """
    program, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row_tile = ((tl.sqrt(8.0 * program + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded: at most one row of tiles too far, or too near.
    row_tile -= (row_tile * (row_tile + 1) // 2 > program).to(tl.int32)
    row_tile += ((row_tile + 1) * (row_tile + 2) // 2 <= program).to(tl.int32)
    column_tile = program - row_tile * (row_tile + 1) // 2
    row = row_tile * SIDE + tl.arange(0, SIDE)
    column = column_tile * SIDE + tl.arange(0, SIDE)
    left_at = matrix + batch * batch_stride + row[:, None].to(tl.int64) * column_stride
    right_at = matrix + batch * batch_stride + column[None, :].to(tl.int64) * column_stride
    sums = tl.zeros((SIDE, SIDE), dtype=tl.float64)
    for first in range(0, rows, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        at = depth.to(tl.int64) * row_stride
        inside = (row < width)[:, None] & (depth < rows)[None, :]
        left = tl.load(left_at + at[None, :], mask=inside, other=0.0)
        inside = (depth < rows)[:, None] & (column < width)[None, :]
        right = tl.load(right_at + at[:, None], mask=inside, other=0.0)
        sums = tl.dot(left, right, sums, out_dtype=tl.float64)
    sums *= tl.load(scales + batch)
    # Products of the same two columns agree, but their sums need not where tensor cores add them.
    if row_tile == column_tile:
        sums = tl.where(row[:, None] >= column[None, :], sums, tl.trans(sums))
    inside = (row < width)[:, None] & (column < width)[None, :]
    target = result + batch * width * width
    tl.store(target + row[:, None].to(tl.int64) * width + column[None, :], sums, mask=inside)
    square = tl.sum(tl.sum(sums * sums, axis=1), axis=0)
    if row_tile != column_tile:
        mirrored = (column < width)[:, None] & (row < width)[None, :]
        places = column[:, None].to(tl.int64) * width + row[None, :]
        tl.store(target + places, tl.trans(sums), mask=mirrored)
        square *= 2.0
    tl.store(squares + batch * tiles * (tiles + 1) // 2 + program, square)


class Tile(NamedTuple):
    """Side of a program's tile, and rows per step of its sum."""

    side: int
    depth: int
    warps: int
    stages: int


def tile_for(width: int, count: int, processors: int = 132) -> Tile:
    """The tile for so many matrices of a width, on a GPU with so many multiprocessors."""
    tiles = triton.cdiv(width, 64)
    if width <= 32 or count * tiles * (tiles + 1) // 2 < processors:
        return Tile(32, 16, 4, 4)
    return Tile(64, 16, 4, 4)


def gram_step(matrix: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled Gram matrices and the squares of their norms.

    Args:
        matrix: (L, m, n) float64 tensor, any strides.
        scales: (L,) float64 factors of the results.

    Returns:
        (L, n, n) symmetric matrices, and (L,) sums of the squares of their entries.
    """
    count, rows, width = matrix.shape
    processors = 132
    if matrix.is_cuda:
        processors = torch.cuda.get_device_properties(matrix.device).multi_processor_count
    tile = tile_for(width, count, processors)
    tiles = triton.cdiv(width, tile.side)
    programs = tiles * (tiles + 1) // 2
    result = matrix.new_empty(count, width, width)
    squares = matrix.new_empty(count, programs)
    with torch.cuda.device_of(matrix):
        gram_step_kernel[(programs, count)](
            *(matrix, scales, result, squares, rows, width, tiles, *matrix.stride()),
            SIDE=tile.side,
            DEPTH=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return result, squares.sum(1)


def bound(weight: Tensor, n_iter: int) -> Tensor:
    """(…) float64 bounds as `reference` of the op, with the same rounding charged.

    Args:
        weight: (…, rows, columns) tensor of a floating dtype.
        n_iter: number of steps.
    """
    tall = weight if weight.shape[-2] >= weight.shape[-1] else weight.mT
    power = tall.detach().to(torch.float64).reshape(-1, *tall.shape[-2:])
    size = power.abs().amax(dim=(-2, -1))
    power = power / torch.where(size == 0, 1.0, size)[:, None, None]
    square = power.square().sum(dim=(-2, -1))
    scales, charges = [], []
    for _ in range(n_iter):
        scales.append(square.sqrt())
        charges.append(1.01 * (power.shape[-2] + 16) * _UNIT)
        power, square = gram_step(power, torch.where(square == 0, 1.0, square).reciprocal())
    entries = power.shape[-2] * power.shape[-1]
    found = square.sqrt() * (1 + (entries + 16) * _UNIT)
    for scale, charge in zip(reversed(scales), reversed(charges), strict=True):
        found = scale * (found + charge).sqrt() * (1 + 4 * _UNIT)
    return (size * found * (1 + 4 * _UNIT)).reshape(weight.shape[:-2])


def _variant(tile: Tile) -> Variant:
    """A contiguous batch whose sizes are multiples of 16."""
    pointers = dict.fromkeys(("matrix", "scales", "result", "squares"), "*fp64")
    sizes = "rows", "width", "batch_stride", "row_stride"
    return Variant(
        gram_step_kernel,
        pointers | dict.fromkeys((*sizes, "tiles"), "i32"),
        {"column_stride": 1, "SIDE": tile.side, "DEPTH": tile.depth},
        sizes,
        tile.warps,
        tile.stages,
    )


VARIANTS = [_variant(tile_for(width, 1)) for width in (32, 4096)]
