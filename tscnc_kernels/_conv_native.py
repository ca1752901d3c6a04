"""The native ops of masked_conv2d on the kept entries (csrc/masked_conv2d.cpp)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tscnc_kernels import _build as _build  # loads the library that registers the ops
from tscnc_kernels._activation import ACTIVATIONS
from tscnc_kernels._conv_algorithms import SPARSE
from tscnc_kernels._conv_geometry import ConvGeometry, is_channels_last
from tscnc_kernels._vmap import register_loop_vmap
from tscnc_kernels.sparsity import SparsityPattern


def _new_images(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(*shape, dtype=like.dtype, device=like.device, memory_format=layout)


@torch.library.register_fake("tscnc_kernels::masked_conv2d")
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_pointers: Tensor,
    columns: Tensor,
    geometry: Sequence[int],
    activation: int,
    algorithm: int,
    channels_last: bool,
    save_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    kernel, stride, dilation = [(geometry[i], geometry[i + 1]) for i in (0, 2, 8)]
    top, bottom, left, right = geometry[4:8]
    shape = ConvGeometry(kernel, stride, (top, bottom, left, right), dilation, geometry[10])
    batch, rows = input.shape[0], row_pointers.shape[0] - 1
    size = rows, *shape.output_size(*input.shape[2:])
    saved = _new_images(input, (batch if save_preactivation else 0, *size), channels_last)
    return _new_images(input, (batch, *size), channels_last), saved


@torch.library.register_fake("tscnc_kernels::masked_conv2d_backward")
def _(
    grad_output: Tensor,
    saved: Tensor,
    input: Tensor,
    weight: Tensor,
    row_pointers: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    channels_last, needs_input, needs_weight, needs_bias = rest[-4:]
    grad_input = input.new_empty((0,))
    if needs_input:
        grad_input = _new_images(input, input.shape, channels_last)
    return (
        grad_input,
        input.new_empty(weight.shape if needs_weight else (0,)),
        input.new_empty((row_pointers.shape[0] - 1 if needs_bias else 0,)),
    )


_ops = torch.ops.tscnc_kernels
for _name in ("masked_conv2d", "masked_conv2d_backward"):
    register_loop_vmap(_name, getattr(_ops, _name))


def conv_product(
    algorithm: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pattern: SparsityPattern,
    geometry: ConvGeometry,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Y of images (B, C, H, W), and Z if it has to be saved (else a tensor of no images)."""
    return _ops.masked_conv2d.default(  # type: ignore[no-any-return]
        *(input, weight, bias, pattern.row_pointers, pattern.columns, geometry.numbers),
        *(ACTIVATIONS[activation], SPARSE[algorithm], is_channels_last(input), save),
    )


def conv_gradients(
    algorithms: tuple[str, str],
    grad_output: Tensor,
    saved: Tensor,
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    geometry: ConvGeometry,
    activation: str,
    needs: Sequence[bool],
) -> Sequence[Tensor]:
    """The gradients of input, weight and bias, empty where they are not needed.

    `algorithms` computes the first and the other two; `saved` is Y for relu and Z for gelu.
    """
    codes = [SPARSE.get(name, 0) for name in algorithms]
    return _ops.masked_conv2d_backward.default(  # type: ignore[no-any-return]
        *(grad_output, saved, input, weight, *pattern.tensors[1:], geometry.numbers),
        *(ACTIVATIONS[activation], *codes, is_channels_last(input), *needs),
    )
