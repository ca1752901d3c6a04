"""Closed-form times of the algorithms of masked_linear and masked_conv2d on a GPU.

Rooflines of an H200 with a share of them that kernels of each kind reach elsewhere; no GPU has
confirmed them yet. They only choose what the autotuner measures, and decide where it must not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tscnc_kernels import _backend
from tscnc_kernels._block_index import edge_of
from tscnc_kernels._masked_bitmap import BITMAP, chunk_columns, has_kernel
from tscnc_kernels._masked_semi_structured import SEMI_STRUCTURED

if TYPE_CHECKING:
    from tscnc_kernels._masked_algorithms import Call

# Native algorithms: "panel" for many samples, the others for few, one sample in particular.
SPARSE = ("panel", "small_batch", "spmv", BITMAP)
# The dense gradient of a weight by Triton, masked or gathered as it is stored.
EPILOGUE = "epilogue"
# Of convolutions.
CONV_SPARSE = ("plane",)
SMALL_BATCH = 16
# Seconds per kernel launch; bytes per second of device memory, and of shared memory as the products
# read it (two fifths of its peak for a gradient of the weight, which also reduces over threads).
LAUNCH, MEMORY, SHARED, REDUCED = 3e-6, 4e12, 16e12, 10e12
# Floating-point operations per second of a dense product.
DENSE_RATE = {torch.float32: 50e12, torch.float64: 50e12}
HALF_RATE, TF32_RATE = 700e12, 350e12
# Pixels that the kernels of convolutions read per second, for one kept weight each, from the L2
# cache; and bytes of a packed one.
GATHERS, TAP = 1e12, 16
# Density up to which a convolution is expected to be faster on the kept entries, where nothing else
# about the call is known.
CONV_DENSITY = 0.01
# Entries of a mask, kept or not, that "bitmap" spreads out and multiplies per second.
SPREAD = {2: 4e12, 4: 2e12}
# Bytes of a sector, the least that a scattered access moves.
SECTOR = 32
# Share of the dense rate that blocks reach: narrow ones load each feature for fewer sums.
BLOCK_SHARE, WIDEST = 0.75, 160
# And that a dense product in Triton reaches.
TRITON_SHARE = 0.9


def predict(
    op: str,
    shape: Sequence[int],
    nnz: int,
    call: Call,
    direction: str,
    blocks: tuple[int, int] | None = None,
) -> dict[str, float]:
    """Seconds of each algorithm that can compute a direction on the GPU, as `predict` on a CPU."""
    if direction == "backward":  # no algorithm computes both gradients in one pass
        gradients = [predict(op, shape, nnz, call, f"grad_{name}") for name in ("input", "weight")]
        return {"separate": sum(min(times.values()) for times in gradients)}
    seconds = {"dense": _dense(op, shape, nnz, call, direction)}
    if op == "masked_conv2d":
        seconds["plane"] = _plane(shape, nnz, call, direction)
    elif call.batch > SMALL_BATCH:
        seconds["panel"] = _panel(shape, nnz, call, direction)
    elif call.batch > 0:
        name = "spmv" if call.batch == 1 else "small_batch"
        seconds[name] = _small(shape, nnz, call, direction)
        if direction == "forward" and call.values and has_kernel(shape, call.dtype):
            seconds[BITMAP] = _bitmap(shape, nnz, call)
    if op == "masked_linear" and direction == "grad_weight" and _has_epilogue(call):
        seconds[EPILOGUE] = _epilogue(shape, nnz, call)
    edge = edge_of(blocks)
    if edge is not None and call.batch > 0:
        seconds["block"] = _block(shape, nnz, call, direction, edge)
    return seconds


def predict_race(
    op: str,
    shape: Sequence[int],
    nnz: int,
    call: Call,
    direction: str,
    blocks: tuple[int, int] | None = None,
) -> dict[str, float]:
    """As `predict`, but the forward product is dense or torch's with 2 of 4 weights: which of them
    is faster has to be measured.
    """
    if direction != "forward":
        return predict(op, shape, nnz, call, direction, blocks)
    seconds = _dense(op, shape, nnz, call, direction)
    return {"dense": seconds, SEMI_STRUCTURED: seconds}


def sparse_of(op: str) -> tuple[str, ...]:
    """The native algorithms of an op on CUDA."""
    return CONV_SPARSE if op == "masked_conv2d" else SPARSE


def _rate(op: str, dtype: torch.dtype) -> float:
    in_tf32 = torch.get_float32_matmul_precision() != "highest"
    if op == "masked_conv2d":
        in_tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    if dtype == torch.float32 and in_tf32:
        return TF32_RATE
    return DENSE_RATE.get(dtype, HALF_RATE)


def _dense(op: str, shape: Sequence[int], nnz: int, call: Call, direction: str) -> float:
    size, item = math.prod(shape), call.dtype.itemsize
    moved = (size + call.batch * sum(shape[:2])) * item
    product = LAUNCH + max(2.0 * call.batch * size / _rate(op, call.dtype), moved / MEMORY)
    if call.values:
        return product + LAUNCH + (size * item + nnz * (4 + SECTOR)) / MEMORY
    if call.held and direction != "grad_weight":
        return product
    return product + 2 * LAUNCH + size * (2 * item + 3) / MEMORY


def _has_epilogue(call: Call) -> bool:
    is_half = call.dtype.itemsize == 2
    return is_half and call.batch > SMALL_BATCH and _backend.why_no_triton("cuda") is None


def _epilogue(shape: Sequence[int], nnz: int, call: Call) -> float:
    item, size = call.dtype.itemsize, math.prod(shape)
    rate = TRITON_SHARE * _rate("masked_linear", call.dtype)
    moved = (call.batch * sum(shape) + (nnz if call.values else size)) * item + size / 8
    return LAUNCH + max(2.0 * call.batch * size / rate, moved / MEMORY)


def _panel(shape: Sequence[int], nnz: int, call: Call, direction: str) -> float:
    item = call.dtype.itemsize
    moved = call.batch * sum(shape) * item + nnz * (4 + 3 * item)
    if not call.values:
        moved += nnz * SECTOR + (math.prod(shape) * item if direction == "grad_weight" else 0)
    fed = REDUCED if direction == "grad_weight" else SHARED
    return 3 * LAUNCH + moved / MEMORY + nnz * call.batch * item / fed


def _plane(shape: Sequence[int], nnz: int, call: Call, direction: str) -> float:
    item = call.dtype.itemsize
    moved = call.batch * sum(shape[:2]) * item + nnz * (4 + TAP + item)
    if not call.values:
        moved += nnz * SECTOR + (math.prod(shape) * item if direction == "grad_weight" else 0)
    return 3 * LAUNCH + moved / MEMORY + nnz * call.batch / GATHERS


def _block(shape: Sequence[int], nnz: int, call: Call, direction: str, edge: int) -> float:
    item = call.dtype.itemsize
    rate = _rate("masked_linear", call.dtype) * min(BLOCK_SHARE, edge / WIDEST)
    moved = (call.batch * sum(shape) + nnz) * item
    if not call.values and direction == "grad_weight":
        moved += math.prod(shape) * item
    return LAUNCH + max(2.0 * call.batch * nnz / rate, moved / MEMORY)


def _bitmap(shape: Sequence[int], nnz: int, call: Call) -> float:
    size, item = math.prod(shape), call.dtype.itemsize
    moved = nnz * item + size / 8 + 4 * size / chunk_columns(call.dtype)
    return LAUNCH + max(moved / MEMORY, size / SPREAD[item])


def _small(shape: Sequence[int], nnz: int, call: Call, direction: str) -> float:
    item = call.dtype.itemsize
    is_scattered = not call.values or direction == "grad_input"
    index = min(4, item) if direction == "forward" else 4
    moved = nnz * (index + (SECTOR if is_scattered else item))
    if direction == "grad_weight" and not call.values:
        moved += math.prod(shape) * item
    return LAUNCH + moved / MEMORY + nnz * call.batch * item / SHARED
