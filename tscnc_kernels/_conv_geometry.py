"""The numbers of a two-dimensional convolution, checked once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tscnc_kernels.sparsity import SparsityPattern

IntPair = int | Sequence[int]


class ConvGeometry(NamedTuple):
    """Kernel size, stride, padding, dilation (each height first) and groups of a convolution.

    Attributes:
        padding: top, bottom, left, right.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def numbers(self) -> list[int]:
        """The eleven numbers that the native op takes."""
        pairs = self.kernel, self.stride, self.padding, self.dilation
        return [*(number for pair in pairs for number in pair), self.groups]

    @property
    def is_symmetric(self) -> bool:
        """Whether padding is the same on opposite sides, as torch's own convolutions want it."""
        top, bottom, left, right = self.padding
        return top == bottom and left == right

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result."""
        top, bottom, left, right = self.padding
        sizes = []
        for i, padded in enumerate((height + top + bottom, width + left + right)):
            reach = self.dilation[i] * (self.kernel[i] - 1)
            sizes.append((padded - reach - 1) // self.stride[i] + 1)
        return sizes[0], sizes[1]

    def pad(self, input: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input, padded where torch cannot, and the padding that is left to torch."""
        top, bottom, left, right = self.padding
        if self.is_symmetric:
            return input, (top, left)
        return F.pad(input, (left, right, top, bottom)), (0, 0)

    def convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution in torch of an input (B, C, H, W)."""
        padded, padding = self.pad(input)
        return F.conv2d(padded, weight, bias, self.stride, padding, self.dilation, self.groups)

    def convolve_backward(
        self, gradient: Tensor, input: Tensor, weight: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients in torch of `convolve` with respect to input and weight, differentiable."""
        padded, padding = self.pad(input)
        mask = [bool(needs[0]), bool(needs[1]), False]
        grad_padded, grad_weight, _ = torch.ops.aten.convolution_backward(
            *(gradient, padded, weight, None, self.stride, padding, self.dilation),
            *(False, (0, 0), self.groups, mask),
        )
        if needs[0] and not self.is_symmetric:
            top, _, left, _ = self.padding
            height, width = input.shape[2:]
            grad_padded = grad_padded[:, :, top : top + height, left : left + width]
        return (grad_padded if needs[0] else None), (grad_weight if needs[1] else None)


def conv_geometry(
    kernel: tuple[int, int],
    stride: IntPair,
    padding: IntPair | str,
    dilation: IntPair,
    groups: int,
) -> ConvGeometry:
    """The geometry that arguments as those of F.conv2d describe.

    Raises:
        TypeError: something else than integers (or "same" and "valid" as padding).
        ValueError: a stride, dilation or number of groups below 1, a negative padding, another
            word as padding, or "same" with a stride.
    """
    steps, spread = pair("stride", stride, 1), pair("dilation", dilation, 1)
    _check_integer("groups", groups, 1)
    if not isinstance(padding, str):
        rows, columns = pair("padding", padding, 0)
        return ConvGeometry(kernel, steps, (rows, rows, columns, columns), spread, groups)
    if padding not in ("same", "valid"):
        raise ValueError(f"expected padding to be integers, 'same' or 'valid', got {padding!r}")
    if padding == "same" and steps != (1, 1):
        raise ValueError(f"expected stride 1 with padding='same', got {steps}")
    reach = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, spread, strict=True)]
    (top, left), (bottom, right) = [r // 2 for r in reach], [r - r // 2 for r in reach]
    return ConvGeometry(kernel, steps, (top, bottom, left, right), spread, groups)


def pattern_geometry(
    pattern: SparsityPattern,
    stride: IntPair,
    padding: IntPair | str,
    dilation: IntPair,
    groups: int,
) -> ConvGeometry:
    """The geometry of a convolution whose weight has a pattern; errors as of `conv_geometry`, and
    for a pattern of another kind or shape.
    """
    if not isinstance(pattern, SparsityPattern):
        raise TypeError(f"expected pattern to be a SparsityPattern, got {type(pattern).__name__}")
    if len(pattern.shape) != 4:
        raise ValueError(
            f"expected a pattern of shape (out, in / groups, kh, kw), got {pattern.shape}"
        )
    kernel = pattern.shape[2], pattern.shape[3]
    return conv_geometry(kernel, stride, padding, dilation, groups)


def is_channels_last(images: Tensor) -> bool:
    """Whether images (B, C, H, W) lie in memory pixel by pixel."""
    channels, width = images.shape[1], images.shape[3]
    _, step, row, pixel = images.stride()
    return channels > 1 and step == 1 and pixel == channels and row == channels * width


def pair(name: str, value: IntPair, least: int) -> tuple[int, int]:
    """One integer twice, or two; TypeError or ValueError for anything else."""
    if isinstance(value, int):
        value = (value, value)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"expected {name} to be an integer or two, got {type(value).__name__}")
    if len(value) not in (1, 2):
        raise ValueError(f"expected {name} to be an integer or two, got {tuple(value)}")
    for number in value:
        _check_integer(name, number, least)
    return value[0], value[-1]


def _check_integer(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected {name} of integers, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"expected {name} of at least {least}, got {value}")
