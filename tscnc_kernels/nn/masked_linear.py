"""MaskedLinear: nn.Linear on the kept entries of its weight."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tscnc_kernels._activation import activate
from tscnc_kernels.nn.masked_layer import MaskedLayer, check_layer, check_options, check_pattern
from tscnc_kernels.ops.masked_linear import masked_linear
from tscnc_kernels.sparsity import SparsityPattern


class MaskedLinear(MaskedLayer):
    """Linear layer act(x (W ∘ M)ᵀ + b) with a fixed mask M.

    The weight is an ordinary Parameter, so that any optimizer, AMP, deepcopy, EMA and DDP work:

    - mode "dense": (out_features, in_features), zero off the mask. The gradient is zero there too,
      hence an optimizer step with momentum or weight decay leaves the zeros in place (W = W ∘ M).
    - mode "values": the kept entries (nnz,), row-major. Gradients and optimizer state have nnz
      elements as well.

    `state_dict` holds `weight`, `bias` and the mask as packed bits under `mask_bits`. In dense mode
    it loads into an nn.Linear with strict=False. A state of either mode loads into either mode, and
    brings its mask along; without `mask_bits` (strict=False) the weight is masked by the present
    one.

    torch.export and torch.jit.trace see F.linear on the dense weight: standard ops alone. Before an
    export to ONNX, `nn.densify` a copy: its exporter knows no op that spreads the values.

    Attributes:
        activation: "none", "relu" or "gelu"; fused into the product.
        feature_major: give the result with strides (1, B) for B samples, as another masked layer
            reads it fastest; element-wise modules between keep it so. A `view` of the result that
            mixes features and samples fails then. `nn.sparsify` sets it where it is safe.
        dense_grad: give the weight's gradient off the mask too, in dense mode, as pruning scores
            and regrowth need it. An optimizer step would then fill the pruned entries.

    Args:
        in_features: size of each input sample, K.
        out_features: size of each output sample, N.
        bias: learn an additive bias.
        pattern: SparsityPattern of shape (N, K).
        mode: "dense" or "values".
        activation: see above.
        feature_major: see above.
        dense_grad: see above.
        device: device of the parameters; the pattern follows.
        dtype: dtype of the parameters.

    Raises:
        ValueError: the pattern has another shape, the mode or the activation is unknown, or
            dense_grad in values mode.
        TypeError: pattern is not a SparsityPattern.
    """

    op = "masked_linear"
    feature_major: bool = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pattern: SparsityPattern,
        mode: str = "dense",
        activation: str = "none",
        feature_major: bool = False,
        dense_grad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_pattern((out_features, in_features), pattern, mode)
        self.in_features = in_features
        self.out_features = out_features
        self.mode = mode
        self.activation = activation
        self.feature_major = feature_major
        self.dense_grad = dense_grad
        check_options(mode, activation, dense_grad)
        self._make_parameters(pattern, bias, device, dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        mask: Tensor | SparsityPattern,
        mode: str = "dense",
        *,
        activation: str = "none",
        feature_major: bool = False,
        dense_grad: bool = False,
    ) -> "MaskedLinear":
        """A layer with the mask that takes over a Linear's parameters.

        The bias is the same Parameter, and in dense mode so is the weight, whose pruned entries are
        set to zero: an optimizer that holds them keeps working. In values mode the weight is a new
        Parameter.

        Args:
            linear: the layer to take over.
            mask: (N, K) bool tensor or SparsityPattern.
            mode: "dense" or "values".
            activation: "none", "relu" or "gelu", applied to the result.
            feature_major: see the class.
            dense_grad: see the class.

        Returns:
            The masked layer.

        Raises:
            ValueError: the mask has another shape, the mode or the activation is unknown,
                dense_grad in values mode, or the weight has no data or is computed by a
                parametrization.
            TypeError: not a Linear, or the mask is not boolean.
        """
        check_layer(nn.Linear, linear)
        pattern = mask if isinstance(mask, SparsityPattern) else SparsityPattern.from_mask(mask)
        check_pattern((linear.out_features, linear.in_features), pattern, mode)
        check_options(mode, activation, dense_grad)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.mode, layer.activation, layer.dense_grad = mode, activation, dense_grad
        layer.feature_major = feature_major
        layer._take_over(linear, pattern)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """A Linear with the dense weight; it shares the bias, and the weight in dense mode.

        It has no activation: one that was fused is the caller's to apply.
        """
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        self._hand_over(linear)
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """The product act(x (W ∘ M)ᵀ + b), (..., N), for an input x of shape (..., K)."""
        if torch.compiler.is_exporting() or torch._C._get_tracing_state():
            return activate(F.linear(input, self.dense_weight, self.bias), self.activation)
        return masked_linear(
            *(input, self.weight, self._pattern, self.bias, self.activation),
            dense_grad=self.dense_grad,
            assume_masked=not self.dense_grad,
            feature_major=self.feature_major,
        )

    def extra_repr(self) -> str:
        pattern = self._pattern
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, mode={self.mode!r}, "
            f"sparsity={1 - pattern.density:.2%}, nnz={pattern.nnz}"
            f"{', feature_major=True' if self.feature_major else ''}" + self._options_repr()
        )
