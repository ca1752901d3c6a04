"""The native ops of masked_conv2d on the kept entries (csrc/masked_conv2d.cpp)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tscnc_kernels import _build as _build  # loads the library that registers the ops
from tscnc_kernels._activation import ACTIVATIONS
from tscnc_kernels._conv_algorithms import SPARSE
from tscnc_kernels._conv_geometry import ConvGeometry, is_channels_last
from tscnc_kernels._vmap import register_loop_vmap
from tscnc_kernels.sparsity import SparsityPattern

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
