"""Triton kernels of masked_linear's algorithm "block": patterns of square blocks, 16 to 128 wide.

Formula: tscnc_kernels/ops/masked_linear.py. Samples are the first operand of every product, so that
blocks of 16 and 32 fill a tensor core's instruction as well: its other side may be as short as 8.
Dense weights and flat values are read in place, block by block, by the index of `_block_index`; the
gradient of the weight is computed at kept blocks alone. Sums are in float32, float64 for float64;
one program per tile, no atomics.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tscnc_kernels._block_index import block_index
from tscnc_kernels._feature_major import new_matrix
from tscnc_kernels.sparsity import SparsityPattern
from tscnc_kernels.triton import Variant
from tscnc_kernels.triton._tiles import (
    GROUP,
    Tile,
    activated,
    math_type,
    precision,
    tile_of_program,
)

PROCESSORS = 132  # of an H100 and an H200


@triton.jit
def block_product_kernel(
    samples,
    weight,
    bias,
    output,
    preactivation,
    order,
    pointers,
    others,
    starts,
    widths,
    lines,
    count,
    sample_stride,
    feature_stride,
    row_stride,
    column_stride,
    output_sample_stride,
    output_feature_stride,
    ACTIVATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    VALUES: tl.constexpr,
    MATH: tl.constexpr,
    PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
    SAMPLES: tl.constexpr,
    FEATURES: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Output (count, lines EDGE) = act(samples (weight ∘ mask)ᵀ + bias), without ᵀ if TRANSPOSED.

    A line is what a feature of the output sums over: a row of blocks, a column if TRANSPOSED. Line
    l has the blocks pointers[l] to pointers[l + 1] - 1, `others` tells where each lies across it.
    """
    PARTS: tl.constexpr = EDGE // FEATURES
    STEPS: tl.constexpr = EDGE // DEPTH
    line_tile, sample_tile = tile_of_program(lines * PARTS, tl.cdiv(count, SAMPLES), GROUP)
    line = tl.load(order + line_tile // PARTS)
    feature = line_tile % PARTS * FEATURES + tl.arange(0, FEATURES)
    sample = sample_tile * SAMPLES + tl.arange(0, SAMPLES)
    depth = tl.arange(0, DEPTH)
    samples_at = samples + sample[:, None].to(tl.int64) * sample_stride
    sums = tl.zeros((SAMPLES, FEATURES), dtype=MATH)
    first, last = tl.load(pointers + line), tl.load(pointers + line + 1)
    for step in range(first * STEPS, last * STEPS):
        entry = step // STEPS
        inner = step % STEPS * DEPTH + depth
        other = tl.load(others + entry)
        at = other.to(tl.int64) * EDGE + inner
        left = tl.load(
            samples_at + at[None, :] * feature_stride, mask=(sample < count)[:, None], other=0.0
        )
        if VALUES and TRANSPOSED:
            start = tl.load(starts + entry).to(tl.int64) * EDGE
            stride = tl.load(widths + entry) * EDGE
        elif VALUES:
            start = (first.to(tl.int64) * EDGE + entry - first) * EDGE
            stride = (last - first) * EDGE
        else:
            across = other if TRANSPOSED else line
            along = line if TRANSPOSED else other
            start = (across.to(tl.int64) * row_stride + along.to(tl.int64) * column_stride) * EDGE
            stride = row_stride
        if TRANSPOSED:
            places = inner[:, None] * stride + feature[None, :] * column_stride
        else:
            places = feature[None, :] * stride + inner[:, None] * column_stride
        right = tl.load(weight + start + places)
        sums = tl.dot(left, right, sums, input_precision=PRECISION, out_dtype=MATH)
    feature += line * EDGE
    if bias is not None:
        sums += tl.load(bias + feature).to(MATH)[None, :]
    places = sample[:, None].to(tl.int64) * output_sample_stride
    places += feature[None, :].to(tl.int64) * output_feature_stride
    inside = (sample < count)[:, None]
    if preactivation is not None:
        tl.store(preactivation + places, sums.to(output.dtype.element_ty), mask=inside)
    sums = activated(sums, ACTIVATION)
    tl.store(output + places, sums.to(output.dtype.element_ty), mask=inside)


@triton.jit
def block_gradient_kernel(
    gradient,
    samples,
    result,
    rows,
    columns,
    row_pointers,
    count,
    gradient_sample_stride,
    gradient_feature_stride,
    sample_stride,
    feature_stride,
    row_stride,
    VALUES: tl.constexpr,
    MATH: tl.constexpr,
    PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Gradientᵀ samples at the kept blocks, one tile of SIDE² entries per program."""
    PARTS: tl.constexpr = EDGE // SIDE
    number = tl.program_id(0) // (PARTS * PARTS)
    part = tl.program_id(0) % (PARTS * PARTS)
    block_row, block_column = tl.load(rows + number), tl.load(columns + number)
    row = part // PARTS * SIDE + tl.arange(0, SIDE)
    column = part % PARTS * SIDE + tl.arange(0, SIDE)
    gradient_row = block_row.to(tl.int64) * EDGE + row
    gradient_at = gradient + gradient_row[:, None] * gradient_feature_stride
    sample_column = block_column.to(tl.int64) * EDGE + column
    samples_at = samples + sample_column[None, :] * feature_stride
    sums = tl.zeros((SIDE, SIDE), dtype=MATH)
    for begin in range(0, count, DEPTH):
        sample = begin + tl.arange(0, DEPTH)
        at = sample.to(tl.int64)
        left = tl.load(
            gradient_at + at[None, :] * gradient_sample_stride,
            mask=(sample < count)[None, :],
            other=0.0,
        )
        right = tl.load(
            samples_at + at[:, None] * sample_stride, mask=(sample < count)[:, None], other=0.0
        )
        sums = tl.dot(left, right, sums, input_precision=PRECISION, out_dtype=MATH)
    if VALUES:
        first = tl.load(row_pointers + block_row)
        stride = (tl.load(row_pointers + block_row + 1) - first) * EDGE
        start = (first.to(tl.int64) * EDGE + number - first) * EDGE
    else:
        stride = row_stride
        start = (block_row.to(tl.int64) * row_stride + block_column) * EDGE
    places = row[:, None] * stride + column[None, :]
    tl.store(result + start + places, sums.to(result.dtype.element_ty))


def product_tile(
    dtype: torch.dtype, edge: int, count: int, lines: int, processors: int = PROCESSORS
) -> Tile:
    """The tile (samples, features, …) of a product of so many samples and lines of blocks.

    A third of the stages wait for the index: a dense product has fewer.
    """
    few = 16 if count <= 16 else 64
    if dtype == torch.float64:
        return Tile(few, min(edge, 32), 16, 4, 4)
    if dtype == torch.float32:
        return Tile(few, min(edge, 64), 16, 4, 5)
    depth = min(edge, 64)
    is_small = count <= 64 or lines * triton.cdiv(count, 128) < processors
    if count <= 16 or (is_small and edge >= 64):
        return Tile(few, edge, depth, 4, 6)
    return Tile(128, edge, depth, 8 if edge == 128 else 4, 5)


def gradient_tile(dtype: torch.dtype, edge: int, blocks: int, processors: int = PROCESSORS) -> Tile:
    """The tile of the gradient at so many blocks."""
    if dtype == torch.float64:
        return Tile(min(edge, 32), min(edge, 32), 16, 4, 3)
    if dtype == torch.float32:
        return Tile(min(edge, 64), min(edge, 64), 32, 4, 3)
    if edge == 128 and blocks >= 2 * processors:
        return Tile(128, 128, 64, 8, 3)
    return Tile(min(edge, 64), min(edge, 64), 64, 4, 4)


def _processors(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return PROCESSORS
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def product(
    samples: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    bias: Tensor | None = None,
    activation: int = 0,
    *,
    transposed: bool = False,
    save: bool = False,
    feature_major: bool = False,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """act(X (W ∘ M)ᵀ + b), or X (W ∘ M) if `transposed`.

    Args:
        samples: (B, K) tensor, any strides; (B, N) if transposed.
        weight: (N, K) tensor of the same dtype, any strides; or (nnz,) values.
        pattern: a mask of blocks, see `_block_index.block_edge`.
        bias: contiguous tensor of one entry per column of the result, or None.
        activation: its code in `_activation.ACTIVATIONS`.
        transposed: sums over the weight's rows instead of its columns.
        save: return Z too.
        feature_major: strides (1, B) of the results.
        tile: another one than `product_tile`'s.

    Returns:
        Y, and Z if asked for, else a tensor of no rows.
    """
    index, is_values = block_index(pattern), weight.ndim == 1
    weight = weight.contiguous() if is_values else weight
    width, count = pattern.matrix_shape[1 if transposed else 0], len(samples)
    output = new_matrix(samples, (count, width), feature_major)
    preactivation = new_matrix(samples, (count if save else 0, width), feature_major)
    lines = width // index.edge
    tile = tile or product_tile(samples.dtype, index.edge, count, lines, _processors(samples))
    programs = width // tile.columns * triton.cdiv(count, tile.rows)
    if programs == 0:
        return output, preactivation
    if transposed:
        order = index.column_order, index.column_pointers, index.column_rows
        places = (index.column_starts, index.column_widths) if is_values else (None, None)
    else:
        order, places = (index.row_order, index.row_pointers, index.columns), (None, None)
    with torch.cuda.device_of(samples):
        block_product_kernel[(programs,)](
            *(samples, weight, bias, output, preactivation if save else None),
            *(*order, *places, lines, count, *samples.stride()),
            *((0, 1) if is_values else weight.stride()),
            *output.stride(),
            ACTIVATION=activation,
            TRANSPOSED=transposed,
            VALUES=is_values,
            GROUP=GROUP,
            **_product_options(tile, samples.dtype, index.edge),
        )
    return output, preactivation


def _product_options(tile: Tile, dtype: torch.dtype, edge: int) -> dict[str, object]:
    sizes = {"SAMPLES": tile.rows, "FEATURES": tile.columns, "DEPTH": tile.depth}
    return {**_options(tile, dtype, edge), **sizes}


def _options(tile: Tile, dtype: torch.dtype, edge: int) -> dict[str, object]:
    launch = {"num_warps": tile.warps, "num_stages": tile.stages}
    return {"MATH": math_type(dtype), "PRECISION": precision(dtype), "EDGE": edge, **launch}


def weight_gradient(
    gradient: Tensor,
    samples: Tensor,
    pattern: SparsityPattern,
    *,
    values: bool,
    tile: Tile | None = None,
) -> Tensor:
    """(Gᵀ X) ∘ M, computed at the kept blocks.

    Args:
        gradient: (B, N) tensor, any strides.
        samples: (B, K) tensor of the same dtype, any strides.
        pattern: a mask of blocks, see `_block_index.block_edge`.
        values: give the kept entries alone.
        tile: another one than `gradient_tile`'s.

    Returns:
        (N, K) tensor that is zero off the mask, or (nnz,) values.
    """
    index, count = block_index(pattern), len(samples)
    result = samples.new_empty(pattern.nnz) if values else samples.new_zeros(pattern.matrix_shape)
    blocks = len(index.rows)
    tile = tile or gradient_tile(samples.dtype, index.edge, blocks, _processors(samples))
    with torch.cuda.device_of(samples):
        block_gradient_kernel[(blocks * (index.edge // tile.rows) ** 2,)](
            *(gradient, samples, result, index.rows, index.columns, index.row_pointers, count),
            *(*gradient.stride(), *samples.stride(), pattern.matrix_shape[1]),
            VALUES=values,
            SIDE=tile.rows,
            DEPTH=tile.depth,
            **_options(tile, samples.dtype, index.edge),
        )
    return result


PRODUCT_SIZES = "count", "sample_stride", "row_stride", "output_sample_stride"
GRADIENT_SIZES = "count", "gradient_sample_stride", "sample_stride", "row_stride"


def _product_variant(dtype: torch.dtype, kind: str, edge: int, tile: Tile, back: bool) -> Variant:
    """Forward from a dense weight, or back from values; sizes are multiples of 16."""
    tensors = ("samples", "weight", "output", *(() if back else ("bias", "preactivation")))
    indices = ("order", "pointers", "others", *(("starts", "widths") if back else ()))
    sizes = [name for name in PRODUCT_SIZES if not (back and name == "row_stride")]
    constants: dict[str, object] = {"feature_stride": 1, "output_feature_stride": 1}
    constants |= {"column_stride": 1, "ACTIVATION": 0 if back else 2, "GROUP": GROUP}
    constants |= {"TRANSPOSED": back, "VALUES": back, **_product_options(tile, dtype, edge)}
    absent = ("bias", "preactivation", "row_stride") if back else ("starts", "widths")
    return _variant(
        block_product_kernel,
        dict.fromkeys(tensors, kind) | dict.fromkeys(indices, "*i32"),
        (*sizes, "lines"),
        constants | {name: 0 if name == "row_stride" else None for name in absent},
    )


def _gradient_variant(dtype: torch.dtype, kind: str, edge: int, tile: Tile, flag: bool) -> Variant:
    pointers = dict.fromkeys(("gradient", "samples", "result"), kind)
    pointers |= dict.fromkeys(("rows", "columns", "row_pointers"), "*i32")
    constants: dict[str, object] = {
        "gradient_feature_stride": 1,
        "feature_stride": 1,
        "VALUES": flag,
    }
    constants |= {"SIDE": tile.rows, "DEPTH": tile.depth, **_options(tile, dtype, edge)}
    return _variant(block_gradient_kernel, pointers, GRADIENT_SIZES, constants)


def _variant(
    kernel: object, pointers: dict[str, str], sizes: Sequence[str], constants: dict[str, Any]
) -> Variant:
    launch = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    multiples = tuple(name for name in sizes if name != "lines")
    arguments = pointers | dict.fromkeys(sizes, "i32")
    return Variant(kernel, arguments, constants | {"PRECISION": "ieee"}, multiples, **launch)


def _variants(dtype: torch.dtype, kind: str) -> list[Variant]:
    """Every tile of the rules forward, and the usual one of every edge back as well."""
    found: dict[object, Variant] = {}
    # Tiles of wide types are no wider than 64: wider blocks only take more steps of them.
    for edge in {2: (16, 32, 64, 128), 4: (16, 32, 64), 8: (16, 64)}[dtype.itemsize]:
        for count in (16, 64, 4096) if dtype.itemsize == 2 or edge == 64 else (4096,):
            tile = product_tile(dtype, edge, count, lines=32)
            found[edge, tile, False] = _product_variant(dtype, kind, edge, tile, False)
        found[edge, tile, True] = _product_variant(dtype, kind, edge, tile, True)
        for blocks in (1, 512):
            tile = gradient_tile(dtype, edge, blocks)
            found[edge, tile] = _gradient_variant(dtype, kind, edge, tile, blocks > 1)
    return list(found.values())


# Float16 differs from bfloat16 in the type of its tensor-core instruction alone.
VARIANTS = [
    *_variants(torch.bfloat16, "*bf16"),
    *_variants(torch.float32, "*fp32"),
    *_variants(torch.float64, "*fp64"),
]
