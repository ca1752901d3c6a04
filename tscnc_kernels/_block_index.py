"""The index of a pattern that is made of square blocks, for products that read whole blocks.

Every tensor is made of the pattern's own index on its device, without waiting for the GPU.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tscnc_kernels.sparsity import SparsityPattern

# The smallest block that fills a step of a tensor core.
SMALLEST_EDGE = 16


class BlockIndex(NamedTuple):
    """Kept blocks row by row, and column by column.

    With E = edge, block b of the first order keeps the values from E² row_pointers[i], i its row of
    blocks: E rows of as many blocks as that row of blocks keeps, side by side.

    Attributes:
        edge: rows and columns of a block.
        row_pointers: (N / E + 1,) int32; row of blocks i holds row_pointers[i] to
            row_pointers[i + 1] - 1.
        rows: (blocks,) int32, each block's row of blocks.
        columns: (blocks,) int32, each block's column of blocks.
        row_order: (N / E,) int32, the rows of blocks, the longest first.
        column_pointers: (K / E + 1,) int32, as row_pointers for the blocks column by column.
        column_rows: (blocks,) int32, each one's row of blocks.
        column_starts: (blocks,) int32, where each one's values begin, over E.
        column_widths: (blocks,) int32, its row's stride in the values, over E.
        column_order: (K / E,) int32, as row_order.
    """

    edge: int
    row_pointers: Tensor
    rows: Tensor
    columns: Tensor
    row_order: Tensor
    column_pointers: Tensor
    column_rows: Tensor
    column_starts: Tensor
    column_widths: Tensor
    column_order: Tensor


def edge_of(shape: tuple[int, int] | None) -> int | None:
    """Edge of the square blocks that a pattern of this `block_shape` is made of, if they are large
    enough for a kernel of their own.
    """
    edge = 0 if shape is None else min(shape)
    return edge if edge >= SMALLEST_EDGE else None


def block_edge(pattern: SparsityPattern) -> int | None:
    """As `edge_of`, of a pattern."""
    return edge_of(pattern.block_shape)


def _lines(pointers: Tensor, places: Tensor, edge: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of an index by lines: pointers of the blocks, the line of each and its place across, and the
    number of its first entry.
    """
    area = edge * edge
    starts = torch.div(pointers[::edge], area, rounding_mode="floor")
    blocks = places.shape[0] // area
    lines = torch.arange(len(starts) - 1, device=places.device)
    line = lines.repeat_interleave(starts.diff(), output_size=blocks)
    within = torch.arange(blocks, device=places.device) - starts[line]
    entry = starts[line].long() * area + within * edge
    return starts, line, torch.div(places[entry], edge, rounding_mode="floor"), entry


def _order(starts: Tensor) -> Tensor:
    """The lines, the longest first, so that no long one starts last."""
    return starts.diff().argsort(descending=True, stable=True).int()


def block_index(pattern: SparsityPattern) -> BlockIndex:
    """The index of a pattern's blocks, which the pattern keeps.

    Raises:
        RuntimeError: the pattern is not made of blocks of at least `SMALLEST_EDGE` each way.
    """
    known: BlockIndex | None = pattern.__dict__.get("_block_index")
    if known is not None:
        return known
    edge = block_edge(pattern)
    if edge is None:
        raise RuntimeError(
            f"expected a pattern of blocks of {SMALLEST_EDGE}x{SMALLEST_EDGE} or larger, "
            f"got block_shape {pattern.block_shape}"
        )
    row_pointers, rows, columns, _ = _lines(pattern.row_pointers, pattern.columns, edge)
    column_pointers, _, column_rows, entry = _lines(
        pattern.column_pointers, pattern.column_rows, edge
    )
    starts = torch.div(pattern.permutation[entry], edge, rounding_mode="floor")
    found = BlockIndex(
        edge,
        row_pointers.int(),
        rows.int(),
        columns.int(),
        _order(row_pointers),
        column_pointers.int(),
        column_rows.int(),
        starts.int(),
        row_pointers.diff()[column_rows].int(),
        _order(column_pointers),
    )
    pattern.__dict__["_block_index"] = found
    return found
