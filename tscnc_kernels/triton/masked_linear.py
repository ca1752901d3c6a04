"""Triton kernels of masked_linear for dense weights; formula: tscnc_kernels/ops/masked_linear.py.

The mask enters as packed bits (SparsityPattern.bits), one per weight. A product applies it to the
tile of the weight between load and tensor core, so that a weight that holds anything off its mask
is read once and W ∘ M is never written. The weight is the first operand, which sm_90 takes from
registers. The gradient of the weight applies the mask to its result, and stores a dense matrix or
the kept values alone. Sums are in float32, float64 for float64; no atomics.
"""

import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tscnc_kernels._activation import activation_gradient
from tscnc_kernels._masked_weight import masked_weight
from tscnc_kernels._tile_starts import tile_starts
from tscnc_kernels.sparsity import SparsityPattern
from tscnc_kernels.triton import Variant
from tscnc_kernels.triton._tiles import (
    GROUP,
    Tile,
    activated,
    add_product,
    math_type,
    precision,
    tile_of_program,
)


@triton.jit
def load_mask(
    bits,
    rows,
    columns,
    first_row,
    first_column,
    row_count,
    column_count,
    row_step,
    column_step,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BYTES_ALONG: tl.constexpr,
):
    """The tile of a mask whose bit (r, c) is number r row_step + c column_step.

    BYTES_ALONG: the axis along which a byte's bits lie, or -1 if one holds bits of two lines.
    """
    if BYTES_ALONG == 1:
        bytes_at = first_column // 8 + tl.arange(0, COLUMNS // 8)
        places = rows[:, None].to(tl.int64) * (row_step // 8) + bytes_at[None, :]
        inside = (rows < row_count)[:, None] & (bytes_at * 8 < column_count)[None, :]
        packed = tl.load(bits + places, mask=inside, other=0)
        spread = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :].to(tl.uint8)) & 1
        return tl.reshape(spread, (ROWS, COLUMNS)) != 0
    if BYTES_ALONG == 0:
        bytes_at = first_row // 8 + tl.arange(0, ROWS // 8)
        places = columns[None, :].to(tl.int64) * (column_step // 8) + bytes_at[:, None]
        inside = (bytes_at * 8 < row_count)[:, None] & (columns < column_count)[None, :]
        packed = tl.load(bits + places, mask=inside, other=0)
        spread = (packed[:, None, :] >> tl.arange(0, 8)[None, :, None].to(tl.uint8)) & 1
        return tl.reshape(spread, (ROWS, COLUMNS)) != 0
    number = rows[:, None].to(tl.int64) * row_step + columns[None, :].to(tl.int64) * column_step
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    packed = tl.load(bits + number // 8, mask=inside, other=0)
    return ((packed >> (number % 8).to(tl.uint8)) & 1) != 0


@triton.jit
def masked_linear_forward_kernel(
    samples,
    weight,
    bits,
    bias,
    output,
    preactivation,
    count,
    rows,
    width,
    sample_stride,
    feature_stride,
    row_stride,
    column_stride,
    row_step,
    column_step,
    ACTIVATION: tl.constexpr,
    MATH: tl.constexpr,
    PRECISION: tl.constexpr,
    BYTES_ALONG: tl.constexpr,
    ROWS: tl.constexpr,
    SAMPLES: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Contiguous (count, rows) output = act(samples (count, width) (weight ∘ mask)ᵀ + bias)."""
    row_tile, sample_tile = tile_of_program(tl.cdiv(rows, ROWS), tl.cdiv(count, SAMPLES), GROUP)
    first_row = row_tile * ROWS
    row = first_row + tl.arange(0, ROWS)
    sample = sample_tile * SAMPLES + tl.arange(0, SAMPLES)
    weight_at = weight + row[:, None].to(tl.int64) * row_stride
    samples_at = samples + sample[None, :].to(tl.int64) * sample_stride
    sums = tl.zeros((ROWS, SAMPLES), dtype=MATH)
    for first in range(0, width, DEPTH):
        column = first + tl.arange(0, DEPTH)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        at = column.to(tl.int64)
        entries = tl.load(weight_at + at[None, :] * column_stride, mask=inside, other=0.0)
        kept = load_mask(
            *(bits, row, column, first_row, first, rows, width, row_step, column_step),
            *(ROWS, DEPTH, BYTES_ALONG),
        )
        entries = tl.where(kept, entries, 0.0)
        inside = (column < width)[:, None] & (sample < count)[None, :]
        features = tl.load(samples_at + at[:, None] * feature_stride, mask=inside, other=0.0)
        sums = add_product(entries, features, sums, PRECISION)
    inside = (row < rows)[:, None] & (sample < count)[None, :]
    if bias is not None:
        sums += tl.load(bias + row, mask=row < rows, other=0.0).to(MATH)[:, None]
    places = sample[None, :].to(tl.int64) * rows + row[:, None]
    if preactivation is not None:
        tl.store(preactivation + places, sums.to(output.dtype.element_ty), mask=inside)
    sums = activated(sums, ACTIVATION)
    tl.store(output + places, sums.to(output.dtype.element_ty), mask=inside)


@triton.jit
def masked_linear_backward_kernel(
    gradient,
    samples,
    bits,
    starts,
    result,
    count,
    rows,
    width,
    gradient_sample_stride,
    gradient_row_stride,
    sample_stride,
    feature_stride,
    MATH: tl.constexpr,
    PRECISION: tl.constexpr,
    BYTES_ALONG: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """(gradientᵀ samples) ∘ mask: the kept values if `starts` is given, else a dense matrix.

    starts: for every row and tile of columns the number of kept entries before them.
    """
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(width, COLUMNS)
    row_tile, column_tile = tile_of_program(row_tiles, column_tiles, GROUP)
    first_row, first_column = row_tile * ROWS, column_tile * COLUMNS
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    gradient_at = gradient + row[:, None].to(tl.int64) * gradient_row_stride
    samples_at = samples + column[None, :].to(tl.int64) * feature_stride
    sums = tl.zeros((ROWS, COLUMNS), dtype=MATH)
    for first in range(0, count, DEPTH):
        sample = first + tl.arange(0, DEPTH)
        at = sample.to(tl.int64)
        inside = (row < rows)[:, None] & (sample < count)[None, :]
        left = tl.load(gradient_at + at[None, :] * gradient_sample_stride, mask=inside, other=0.0)
        inside = (sample < count)[:, None] & (column < width)[None, :]
        right = tl.load(samples_at + at[:, None] * sample_stride, mask=inside, other=0.0)
        sums = add_product(left, right, sums, PRECISION)
    kept = load_mask(
        *(bits, row, column, first_row, first_column, rows, width, width, 1),
        *(ROWS, COLUMNS, BYTES_ALONG),
    )
    inside = (row < rows)[:, None] & (column < width)[None, :]
    if starts is None:
        values = tl.where(kept, sums, 0.0).to(result.dtype.element_ty)
        tl.store(result + row[:, None].to(tl.int64) * width + column[None, :], values, mask=inside)
    else:
        start = tl.load(starts + row.to(tl.int64) * column_tiles + column_tile, mask=row < rows)
        places = start[:, None] + tl.cumsum(kept.to(tl.int32), axis=1) - 1
        tl.store(result + places, sums.to(result.dtype.element_ty), mask=inside & kept)


def tile_for(dtype: torch.dtype, columns: int) -> Tile:
    """The tile for a result of so many columns (samples of a product)."""
    if dtype == torch.float64:
        return Tile(16, 16, 16, 4, 2)
    if dtype == torch.float32:
        return Tile(64, 64 if columns > 16 else 16, 32, 4, 3)
    if columns <= 16:
        return Tile(128, 16, 64, 4, 3)
    return Tile(64, 64, 64, 4, 3) if columns <= 64 else Tile(128, 128, 64, 8, 3)


def _options(tile: Tile, dtype: torch.dtype) -> dict[str, object]:
    sizes = {"ROWS": tile.rows, "DEPTH": tile.depth, "GROUP": GROUP}
    sizes |= {"num_warps": tile.warps, "num_stages": tile.stages}
    return {"MATH": math_type(dtype), "PRECISION": precision(dtype), **sizes}


def product(
    samples: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    bias: Tensor | None = None,
    activation: int = 0,
    *,
    transposed: bool = False,
    save: bool = False,
) -> tuple[Tensor, Tensor]:
    """act(X (W ∘ M)ᵀ + b), or X (W ∘ M) if `transposed`.

    Args:
        samples: (B, K) tensor, any strides; (B, N) if transposed.
        weight: (N, K) tensor of the same dtype, any strides, whatever it holds off the mask.
        pattern: the mask.
        bias: contiguous tensor of one entry per column of the result, or None.
        activation: its code in `_activation.ACTIVATIONS`.
        transposed: sums over the weight's rows instead of its columns.
        save: return Z too.

    Returns:
        Y, and Z if asked for, else a tensor of no rows.
    """
    (count, width), rows = samples.shape, weight.shape[1 if transposed else 0]
    output = samples.new_empty(count, rows)
    preactivation = samples.new_empty(count if save else 0, rows)
    strides, steps = weight.stride(), (weight.shape[1], 1)
    if transposed:
        strides, steps = strides[::-1], steps[::-1]
    whole_bytes = weight.shape[1] % 8 == 0
    tile = tile_for(samples.dtype, count)
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(count, tile.columns)
    if programs == 0:
        return output, preactivation
    with torch.cuda.device_of(samples):
        masked_linear_forward_kernel[(programs,)](
            *(samples, weight, pattern.bits, bias, output, preactivation if save else None),
            *(count, rows, width, *samples.stride(), *strides, *steps),
            ACTIVATION=activation,
            BYTES_ALONG=(0 if transposed else 1) if whole_bytes else -1,
            SAMPLES=tile.columns,
            **_options(tile, samples.dtype),
        )
    return output, preactivation


def weight_gradient(
    gradient: Tensor, samples: Tensor, pattern: SparsityPattern, *, values: bool
) -> Tensor:
    """(Gᵀ X) ∘ M.

    Args:
        gradient: (B, N) tensor, any strides.
        samples: (B, K) tensor of the same dtype, any strides.
        pattern: the mask.
        values: give the kept entries alone.

    Returns:
        (N, K) tensor that is zero off the mask, or (nnz,) values.
    """
    rows, width = pattern.matrix_shape
    result = samples.new_empty(pattern.nnz if values else (rows, width))
    tile = tile_for(samples.dtype, width)
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.columns)
    with torch.cuda.device_of(samples):
        masked_linear_backward_kernel[(programs,)](
            *(gradient, samples, pattern.bits),
            *(tile_starts(pattern, tile.columns) if values else None, result),
            *(len(samples), rows, width, *gradient.stride(), *samples.stride()),
            BYTES_ALONG=1 if width % 8 == 0 else -1,
            COLUMNS=tile.columns,
            **_options(tile, samples.dtype),
        )
    return result


def gradients(
    grad_output: Tensor,
    saved: Tensor,
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    activation: str,
    dense_grad: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `reference_backward` of the op; `saved` is Y for relu and Z for gelu."""
    gradient = activation_gradient(grad_output, saved, activation)
    grad_input = grad_weight = None
    if needs[0]:
        dense = masked_weight(weight, pattern) if weight.ndim == 1 else weight
        grad_input, _ = product(gradient, dense, pattern, transposed=True)
    if needs[1] and dense_grad:
        grad_weight = gradient.t() @ input
    elif needs[1]:
        grad_weight = weight_gradient(gradient, input, pattern, values=weight.ndim == 1)
    return grad_input, grad_weight, gradient.sum(0) if needs[2] else None


SIZES = ("count", "rows", "width")


def _product_variant(kind: str, transposed: bool, common: dict[str, object]) -> Variant:
    """A product of contiguous tensors whose sizes are multiples of 16."""
    along, across = ("row", "column") if not transposed else ("column", "row")
    pointers = dict.fromkeys(("samples", "weight", "bias", "output"), kind) | {"bits": "*u8"}
    steps = f"{along}_stride", f"{along}_step"
    integers = dict.fromkeys((*SIZES, "sample_stride", *steps), "i32")
    ones = dict.fromkeys(("feature_stride", f"{across}_stride", f"{across}_step"), 1)
    codes = {"ACTIVATION": 0 if transposed else 2, "BYTES_ALONG": 0 if transposed else 1}
    constants = {"preactivation": None, **ones, **codes, **common}
    return Variant(masked_linear_forward_kernel, pointers | integers, constants, tuple(integers))


def _gradient_variant(kind: str, values: bool, common: dict[str, object]) -> Variant:
    pointers = dict.fromkeys(("gradient", "samples", "result"), kind) | {"bits": "*u8"}
    pointers |= {"starts": "*i32"} if values else {}
    integers = dict.fromkeys((*SIZES, "gradient_sample_stride", "sample_stride"), "i32")
    ones = {"gradient_row_stride": 1, "feature_stride": 1, "BYTES_ALONG": 1}
    constants = ones | common | ({} if values else {"starts": None})
    return Variant(masked_linear_backward_kernel, pointers | integers, constants, tuple(integers))


def _variants(dtype: torch.dtype, kind: str) -> list[Variant]:
    found = []
    for columns in (16, 64, 128) if dtype.itemsize == 2 else (128,):
        tile = tile_for(dtype, columns)
        common = {"MATH": math_type(dtype), "PRECISION": "ieee", "GROUP": GROUP}
        common |= {"ROWS": tile.rows, "DEPTH": tile.depth}
        for flag in (False, True):
            product_of = _product_variant(kind, flag, common | {"SAMPLES": tile.columns})
            gradient_of = _gradient_variant(kind, flag, common | {"COLUMNS": tile.columns})
            found += [
                dataclasses.replace(variant, num_warps=tile.warps, num_stages=tile.stages)
                for variant in (product_of, gradient_of)
            ]
    return found


# Float16 differs from bfloat16 in the type of its tensor-core instruction alone.
VARIANTS = [
    *_variants(torch.bfloat16, "*bf16"),
    *_variants(torch.float32, "*fp32"),
    *_variants(torch.float64, "*fp64"),
]
