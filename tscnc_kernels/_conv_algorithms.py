"""Which algorithm computes each product of a masked convolution."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tscnc_kernels import _backend
from tscnc_kernels._apply import is_eager
from tscnc_kernels._autotune import DENSE
from tscnc_kernels._build import C
from tscnc_kernels._conv_geometry import ConvGeometry, is_channels_last
from tscnc_kernels._masked_algorithms import (
    FAMILIES,
    Algorithms,
    Call,
    Choice,
    check_forced,
    plan_for,
    predict,
)
from tscnc_kernels._masked_cuda import CONV_DENSITY
from tscnc_kernels.sparsity import SparsityPattern

# Algorithms of the native backend on the kept entries, and their codes in csrc/masked_conv2d.cpp.
SPARSE = FAMILIES["masked_conv2d"].sparse
ALGORITHMS = (*SPARSE, DENSE)
# Above this density torch's convolution is expected to win over a training step.
SPARSE_DENSITY = 0.45


def conv_call(input: Tensor, weight: Tensor, geometry: ConvGeometry, held: bool) -> Call:
    """What the time of a convolution of images (B, C, H, W) depends on, beside the pattern."""
    images, _, height, width = input.shape
    pixels = images * math.prod(geometry.output_size(height, width))
    layout = "channels_last" if is_channels_last(input) else "rows"
    detail = f"{images}x{height}x{width}:{','.join(map(str, geometry.numbers))}"
    return Call(pixels, weight.dim() == 1, held, input.dtype, layout, detail)


def choose(
    pattern: SparsityPattern,
    geometry: ConvGeometry,
    backend: str,
    input_shape: Sequence[int],
    call: Call | None,
    forced: str | None = None,
) -> Choice:
    """What masked_conv2d runs: the algorithm asked for, else the fastest one measured or predicted.

    Where the call cannot be known, as under compilation (None), the rule is a sparse one where the
    native backend runs, the density is at most `SPARSE_DENSITY` (on CUDA `CONV_DENSITY`) and the
    convolution is not depthwise: "batch" if images fill the lanes of vectors, else "plane".

    Raises:
        RuntimeError: a sparse algorithm was asked for on a backend without it, or "direct" for a
            convolution that does not keep the images' size.
    """
    op, depthwise = "masked_conv2d", pattern.shape[1] == 1 and geometry.groups > 1
    direct = keeps_size(geometry, input_shape)
    if forced == "direct" and not direct:
        raise RuntimeError(
            f"{op}: algorithm 'direct' needs stride 1 and results of the input's size, got stride "
            f"{geometry.stride} and {geometry.output_size(*input_shape[2:])} from images of "
            f"{tuple(input_shape[2:])}"
        )
    if call is not None and not depthwise:
        fills = _fills_lanes(input_shape[0])
        model = functools.partial(_predict, fills, direct)
        return plan_for(op, pattern, backend, call, forced, model)
    check_forced(op, pattern, backend, forced)
    if forced is not None:
        return Algorithms(forced, forced, forced)
    on_cuda = pattern.device.type == "cuda"
    most = CONV_DENSITY if on_cuda else SPARSE_DENSITY
    if backend != "native" or depthwise or pattern.density > most:
        return Algorithms(DENSE, DENSE, DENSE)
    name = "batch" if not on_cuda and _fills_lanes(input_shape[0]) else "plane"
    return Algorithms(name, name, name)


def choose_for(
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    geometry: ConvGeometry,
    held: bool,
    backend: str | None,
    algorithm: str | None,
) -> Choice:
    """`choose` for the arguments of masked_conv2d, one image among them."""
    chosen = _backend.select("masked_conv2d", input.device, backend)
    images = input if input.dim() == 4 else input.unsqueeze(0)
    call = conv_call(images, weight, geometry, held) if is_eager() else None
    return choose(pattern, geometry, chosen, images.shape, call, algorithm)


def keeps_size(geometry: ConvGeometry, input_shape: Sequence[int]) -> bool:
    """Whether results are as large as the images and meet every pixel, as "direct" needs it."""
    size = tuple(input_shape[2:])
    return geometry.stride == (1, 1) and geometry.output_size(*size) == size


def _predict(
    fills: bool,
    direct: bool,
    op: str,
    shape: Sequence[int],
    nnz: int,
    call: Call,
    direction: str,
    _: None,
) -> dict[str, float]:
    """As `predict`; "batch" wastes what images do not fill of its vectors.

    "direct" is left out where it cannot run or would have to move the pixels first.
    """
    times = predict(op, shape, nnz, call, direction)
    wasteful = "plane" if fills else "batch"
    if wasteful in times:
        times[wasteful] *= 1.3
    if not direct or call.layout != "rows":
        times.pop("direct", None)
    return times


def _fills_lanes(images: int) -> bool:
    lanes = _lanes()
    return images >= 0.75 * ((images + lanes - 1) // lanes) * lanes


@torch.compiler.assume_constant_result
def _lanes() -> int:
    """float32 elements of the kernels' vectors."""
    return {"portable": 4, "avx2": 8}.get(C.active_isa(), 16)
