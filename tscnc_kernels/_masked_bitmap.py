"""masked_linear's algorithm "bitmap" on CUDA: few samples, a mask that is read as bits.

The weight comes as its kept values. Where there is no kernel for a call (float64, a width that is
not whole words of the mask, gradients) "small_batch" computes it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tscnc_kernels import _build as _build  # loads the library that registers the op
from tscnc_kernels._feature_major import new_matrix
from tscnc_kernels._masked_weight import kept_values
from tscnc_kernels._tile_starts import tile_starts
from tscnc_kernels._vmap import register_loop_vmap
from tscnc_kernels.sparsity import SparsityPattern

BITMAP = "bitmap"
# Four lanes share a row of a chunk, and hold up to this many bytes of values each.
_LANES, _BYTES = 4, 128

_native = torch.ops.tscnc_kernels


def chunk_columns(dtype: torch.dtype) -> int:
    """Columns of a chunk, as csrc/cuda/masked_linear_bitmap.cu cuts them."""
    return _LANES * _BYTES // dtype.itemsize


def has_kernel(shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether there is one for a weight of this shape."""
    return dtype != torch.float64 and shape[1] % (_BYTES // dtype.itemsize) == 0


def bitmap_product(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pattern: SparsityPattern,
    activation: int,
    save: bool,
    feature_major: bool,
) -> tuple[Tensor, Tensor]:
    """Y for a 2-d input, and Z if it has to be saved (else a tensor of no rows)."""
    values = weight if weight.ndim == 1 else kept_values(weight, pattern)
    starts = tile_starts(pattern, chunk_columns(input.dtype))
    how = activation, save, feature_major
    return _native.masked_linear_bitmap.default(  # type: ignore[no-any-return]
        input, values.contiguous(), bias, pattern.bits, starts, *how
    )


@torch.library.register_fake("tscnc_kernels::masked_linear_bitmap")
def _(
    input: Tensor,
    values: Tensor,
    bias: Tensor | None,
    bits: Tensor,
    starts: Tensor,
    activation: int,
    save_preactivation: bool,
    feature_major: bool,
) -> tuple[Tensor, Tensor]:
    batch, rows = input.shape[0], starts.shape[0]
    saved_shape = batch if save_preactivation else 0, rows
    return (
        new_matrix(input, (batch, rows), feature_major),
        new_matrix(input, saved_shape, feature_major),
    )


register_loop_vmap("masked_linear_bitmap", _native.masked_linear_bitmap)
