"""Where the kept entries of tiles of columns begin."""

import torch
from torch import Tensor

from tscnc_kernels.sparsity import SparsityPattern


def tile_starts(pattern: SparsityPattern, columns: int) -> Tensor:
    """(N, number of tiles) int32, the kept entries before each row's tile of so many columns.

    The pattern keeps it, unless a CUDA graph is captured, whose memory does not outlive it. Nothing
    waits for the device.
    """
    known: dict[int, Tensor] = pattern.__dict__.setdefault("_tile_starts", {})
    if columns in known:
        return known[columns]
    rows, width = pattern.matrix_shape
    tiles = -(-width // columns)
    row = torch.arange(rows, device=pattern.device).repeat_interleave(
        pattern.row_counts.long(), output_size=pattern.nnz
    )
    counts = torch.zeros(rows * tiles, dtype=torch.int32, device=pattern.device)
    tile = row * tiles + pattern.columns // columns
    counts.scatter_add_(0, tile, torch.ones_like(pattern.columns))
    starts = (counts.cumsum(0) - counts).to(torch.int32).view(rows, tiles)
    if not (pattern.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        known[columns] = starts
    return starts
