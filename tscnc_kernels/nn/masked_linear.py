"""MaskedLinear: nn.Linear on the kept entries of its weight."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tscnc_kernels.ops.masked_linear import masked_linear
from tscnc_kernels.sparsity import SparsityPattern, remap

MODES = ("dense", "values")
MASK_KEY = "mask_bits"


class MaskedLinear(nn.Module):
    """Linear layer x (W ∘ M)ᵀ + b with a fixed mask M.

    The weight is an ordinary Parameter, so that any optimizer, AMP, deepcopy, EMA and DDP work:

    - mode "dense": (out_features, in_features), zero off the mask. The gradient is zero there too,
      hence an optimizer step with momentum or weight decay leaves the zeros in place (W = W ∘ M).
    - mode "values": the kept entries (nnz,), row-major. Gradients and optimizer state have nnz
      elements as well.

    `state_dict` holds `weight`, `bias` and the mask as packed bits under `mask_bits`. In dense mode
    it loads into an nn.Linear with strict=False. A state of either mode loads into either mode, and
    brings its mask along; without `mask_bits` (strict=False) the weight is masked by the present
    one.

    Args:
        in_features: size of each input sample, K.
        out_features: size of each output sample, N.
        bias: learn an additive bias.
        pattern: SparsityPattern of shape (N, K).
        mode: "dense" or "values".
        device: device of the parameters; the pattern follows.
        dtype: dtype of the parameters.

    Raises:
        ValueError: the pattern has another shape, or the mode is unknown.
        TypeError: pattern is not a SparsityPattern.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        pattern: SparsityPattern,
        mode: str = "dense",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_layer(in_features, out_features, pattern, mode)
        self.in_features = in_features
        self.out_features = out_features
        self.mode = mode
        shape = (out_features, in_features) if mode == "dense" else (pattern.nnz,)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self._pattern = pattern
        self._follow_device()
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, mask: Tensor | SparsityPattern, mode: str = "dense"
    ) -> "MaskedLinear":
        """A layer with the mask that takes over a Linear's parameters.

        The bias is the same Parameter, and in dense mode so is the weight, whose pruned entries are
        set to zero: an optimizer that holds them keeps working. In values mode the weight is a new
        Parameter.

        Args:
            linear: the layer to take over.
            mask: (N, K) bool tensor or SparsityPattern.
            mode: "dense" or "values".

        Returns:
            The masked layer.

        Raises:
            ValueError: the mask has another shape, the mode is unknown, or the weight has no data
                or is computed by a parametrization.
            TypeError: not a Linear, or the mask is not boolean.
        """
        _check_linear(linear)
        pattern = mask if isinstance(mask, SparsityPattern) else SparsityPattern.from_mask(mask)
        _check_layer(linear.in_features, linear.out_features, pattern, mode)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.mode = mode
        pattern = pattern.to(linear.weight.device)
        weight = linear._parameters["weight"]
        with torch.no_grad():
            if mode == "dense":
                linear.weight.masked_fill_(~pattern.mask, 0)
            else:
                values = pattern.gather(linear.weight)
                weight = nn.Parameter(values, linear.weight.requires_grad)
        layer.register_parameter("weight", weight)
        layer.register_parameter("bias", linear.bias)
        layer._pattern = pattern
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """A Linear with the dense weight; it shares the bias, and the weight in dense mode."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        if self.mode == "dense":
            linear.weight = self.weight
        else:
            dense = self.dense_weight.detach()
            linear.weight = nn.Parameter(dense, self.weight.requires_grad)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    @property
    def pattern(self) -> SparsityPattern:
        """The mask and its index; change it with `set_mask`."""
        return self._pattern

    @property
    def dense_weight(self) -> Tensor:
        """(N, K) weight, differentiable with respect to the parameter."""
        return self.weight if self.mode == "dense" else self._pattern.scatter(self.weight)

    def reset_parameters(self) -> None:
        """Draw the weights as nn.Linear does, then drop the pruned ones."""
        if self.weight.is_meta:
            return
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.mode == "dense":
            with torch.no_grad():
                self.weight.masked_fill_(~self._pattern.mask, 0)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def set_mask(self, mask: Tensor) -> Callable[[Tensor], Tensor]:
        """Change the mask: kept weights stay, pruned ones go, grown ones start at zero.

        The weight stays the same Parameter object (in values mode it gets another size); so does
        its gradient, if any. `nn.update_masks` carries an optimizer's state as well.

        Args:
            mask: (N, K) bool tensor.

        Returns:
            The function that carries any tensor of the old weight's shape over to the new mask.

        Raises:
            TypeError: the mask is not boolean.
            ValueError: another shape, or a weight that a parametrization computes.
        """
        if "weight" not in self._parameters:
            raise ValueError("expected the weight to be a Parameter, got a computed weight")
        pattern, mapping = self._pattern.update(mask)
        dropped = ~(self._pattern.mask & pattern.mask)

        def carry(tensor: Tensor) -> Tensor:
            if self.mode == "dense":
                return tensor.masked_fill(dropped.to(tensor.device), 0)
            return remap(tensor, mapping.to(tensor.device))

        gradient = self.weight.grad
        self.weight.grad = None
        self.weight.data = carry(self.weight.data)
        # Assigning data does not: a backward of an earlier forward would mix two masks in silence.
        if not self.weight.is_inference():
            torch.autograd.graph.increment_version(self.weight)
        if gradient is not None:
            self.weight.grad = carry(gradient)
        self._pattern = pattern
        return carry

    def forward(self, input: Tensor) -> Tensor:
        """The product x (W ∘ M)ᵀ + b, (..., N), for an input x of shape (..., K)."""
        return masked_linear(input, self.weight, self._pattern, self.bias, assume_masked=True)

    def extra_repr(self) -> str:
        pattern = self._pattern
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, mode={self.mode!r}, "
            f"sparsity={1 - pattern.density:.2%}, nnz={pattern.nnz}"
        )

    def _follow_device(self) -> None:
        if not self.weight.is_meta:
            self._pattern = self._pattern.to(self.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MaskedLinear":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._follow_device()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + MASK_KEY] = self._pattern.bits

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        # Not a buffer, because the index has to follow the bits: averaging buffers (EMA) or
        # broadcasting them (DDP) would change the bits alone.
        state = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
        bits = state.pop(prefix + MASK_KEY, None)
        if bits is None:
            if strict:
                missing_keys.append(prefix + MASK_KEY)
        else:
            try:
                self._load_mask(bits)
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix}{MASK_KEY}: {error}")
                return
        weight = state.get(prefix + "weight")
        if weight is not None:
            state[prefix + "weight"] = self._in_this_mode(weight)
        super()._load_from_state_dict(
            state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._follow_device()

    def _load_mask(self, bits: Tensor) -> None:
        pattern = SparsityPattern.from_bits(bits, self._pattern.shape)
        if pattern != self._pattern:
            # The weight follows even if the state holds none.
            self.set_mask(pattern.mask)

    def _in_this_mode(self, weight: Tensor) -> Tensor:
        """A stored weight of either mode in this layer's; one of a wrong shape as it is."""
        pattern = self._pattern.to(weight.device)
        if tuple(weight.shape) == (pattern.nnz,):
            return pattern.scatter(weight) if self.mode == "dense" else weight
        if tuple(weight.shape) == pattern.shape:
            if self.mode == "values":
                return pattern.gather(weight)
            return weight.masked_fill(~pattern.mask, 0)
        return weight


def _check_linear(linear: nn.Linear) -> None:
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"expected an nn.Linear, got {type(linear).__name__}")
    if "weight" not in linear._parameters:
        raise ValueError("expected a Linear whose weight is a Parameter, got a computed weight")
    if linear.weight.is_meta:
        raise ValueError("expected a Linear whose weight has data, got one on the meta device")


def _check_layer(in_features: int, out_features: int, pattern: SparsityPattern, mode: str) -> None:
    if not isinstance(pattern, SparsityPattern):
        raise TypeError(f"expected pattern to be a SparsityPattern, got {type(pattern).__name__}")
    if pattern.shape != (out_features, in_features):
        raise ValueError(
            f"expected a mask of shape ({out_features}, {in_features}), got {pattern.shape}"
        )
    if mode not in MODES:
        raise ValueError(f"expected mode to be one of {', '.join(MODES)}, got {mode!r}")
