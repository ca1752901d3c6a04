"""MaskedConv2d: nn.Conv2d on the kept entries of its weight."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tscnc_kernels._activation import activate
from tscnc_kernels._conv_geometry import IntPair, conv_geometry, pair
from tscnc_kernels.nn.masked_layer import MaskedLayer, check_layer, check_options, check_pattern
from tscnc_kernels.ops.masked_conv2d import masked_conv2d
from tscnc_kernels.sparsity import SparsityPattern


class MaskedConv2d(MaskedLayer):
    """Convolution act(x * (W ∘ M) + b) with a fixed mask M; zeros as padding.

    Modes, states and masks are those of `MaskedLinear`: the weight is an ordinary Parameter, in
    mode "dense" of shape (out_channels, in_channels / groups, kh, kw) with zeros off the mask, in
    mode "values" the kept entries (nnz,) in row-major order.

    torch.export and the ONNX exporters see F.conv2d on the dense weight: standard ops alone.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result.
        kernel_size: height and width of the kernel, or one integer for both.
        stride: step of the kernel.
        padding: zeros around the images, "valid" or "same".
        dilation: distance of the kernel's elements.
        groups: groups of channels that are convolved apart.
        bias: learn an additive bias.
        pattern: SparsityPattern of the weight's shape.
        mode: "dense" or "values".
        activation: "none", "relu" or "gelu", applied to the result.
        dense_grad: give the weight's gradient off the mask too, see `MaskedLinear`.
        device: device of the parameters; the pattern follows.
        dtype: dtype of the parameters.

    Raises:
        ValueError: the pattern has another shape, the mode or the activation is unknown, groups
            do not divide the channels, dense_grad in values mode, or what `masked_conv2d` raises
            for stride, padding and dilation.
        TypeError: pattern is not a SparsityPattern, or arguments of other types.
    """

    op = "masked_conv2d"
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntPair,
        stride: IntPair = 1,
        padding: IntPair | str = 0,
        dilation: IntPair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        pattern: SparsityPattern,
        mode: str = "dense",
        activation: str = "none",
        dense_grad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kernel = pair("kernel_size", kernel_size, 1)
        geometry = conv_geometry(kernel, stride, padding, dilation, groups)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"expected groups to divide {in_channels} and {out_channels} channels, got {groups}"
            )
        check_pattern((out_channels, in_channels // groups, *kernel), pattern, mode)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = kernel, geometry.stride, geometry.dilation
        self.padding = padding if isinstance(padding, str) else pair("padding", padding, 0)
        self.groups = groups
        check_options(mode, activation, dense_grad)
        self.mode, self.activation, self.dense_grad = mode, activation, dense_grad
        self._make_parameters(pattern, bias, device, dtype)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        mask: Tensor | SparsityPattern,
        mode: str = "dense",
        *,
        activation: str = "none",
        dense_grad: bool = False,
    ) -> "MaskedConv2d":
        """A layer with the mask that takes over a Conv2d's parameters.

        The bias is the same Parameter, and in dense mode so is the weight, whose pruned entries are
        set to zero: an optimizer that holds them keeps working. In values mode the weight is a new
        Parameter.

        Args:
            conv: the layer to take over; its padding_mode must be "zeros".
            mask: bool tensor of the weight's shape, or SparsityPattern.
            mode: "dense" or "values".
            activation: "none", "relu" or "gelu", applied to the result.
            dense_grad: see `MaskedLinear`.

        Returns:
            The masked layer.

        Raises:
            ValueError: the mask has another shape, the mode or the activation is unknown,
                dense_grad in values mode, the padding is not of zeros, or the weight has no data
                or is computed by a parametrization.
            TypeError: not a Conv2d, or the mask is not boolean.
        """
        check_layer(nn.Conv2d, conv)
        if conv.padding_mode != "zeros":
            raise ValueError(f"expected padding_mode 'zeros', got {conv.padding_mode!r}")
        pattern = mask if isinstance(mask, SparsityPattern) else SparsityPattern.from_mask(mask)
        check_pattern(tuple(conv.weight.shape), pattern, mode)
        check_options(mode, activation, dense_grad)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_channels, layer.out_channels = conv.in_channels, conv.out_channels
        layer.kernel_size = pair("kernel_size", conv.kernel_size, 1)
        layer.stride, layer.dilation = (
            pair("stride", conv.stride, 1),
            pair("dilation", conv.dilation, 1),
        )
        layer.padding = (
            conv.padding if isinstance(conv.padding, str) else pair("padding", conv.padding, 0)
        )
        layer.groups = conv.groups
        layer.mode, layer.activation, layer.dense_grad = mode, activation, dense_grad
        layer._take_over(conv, pattern)
        return layer.train(conv.training)

    def to_conv(self) -> nn.Conv2d:
        """A Conv2d with the dense weight; it shares the bias, and the weight in dense mode.

        It has no activation: one that was fused is the caller's to apply.
        """
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            bias=False,
            device="meta",
        )
        self._hand_over(conv)
        return conv.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """The convolution act(x * (W ∘ M) + b) of images (B, C, H, W) or one image (C, H, W)."""
        if torch.compiler.is_exporting() or torch._C._get_tracing_state():
            conv, weight = F.conv2d, self.dense_weight
            output = conv(
                input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups
            )
            return activate(output, self.activation)
        return masked_conv2d(
            *(input, self.weight, self._pattern, self.bias),
            *(self.stride, self.padding, self.dilation, self.groups),
            activation=self.activation,
            dense_grad=self.dense_grad,
            assume_masked=not self.dense_grad,
        )

    def extra_repr(self) -> str:
        pattern = self._pattern
        usual = {"padding": (0, 0), "dilation": (1, 1), "groups": 1}
        changed = "".join(
            f", {name}={getattr(self, name)!r}"
            for name, value in usual.items()
            if getattr(self, name) != value
        )
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}{changed}, bias={self.bias is not None}, mode={self.mode!r}, "
            f"sparsity={1 - pattern.density:.2%}, nnz={pattern.nnz}" + self._options_repr()
        )
