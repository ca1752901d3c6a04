"""What layers with a masked weight share: the mask's life, copies, devices and states."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tscnc_kernels._activation import ACTIVATIONS
from tscnc_kernels._checks import check_name
from tscnc_kernels.sparsity import SparsityPattern, remap

MODES = ("dense", "values")
MASK_KEY = "mask_bits"


class MaskedLayer(nn.Module):
    """A layer whose weight is W ∘ M with a fixed mask M.

    The weight is an ordinary Parameter, so that any optimizer, AMP, deepcopy, EMA and DDP work:

    - mode "dense": of the mask's shape, zero off the mask. The gradient is zero there too, hence
      an optimizer step with momentum or weight decay leaves the zeros in place (W = W ∘ M).
    - mode "values": the kept entries (nnz,), row-major. Gradients and optimizer state have nnz
      elements as well.

    `state_dict` holds `weight`, `bias` and the mask as packed bits under `mask_bits`. In dense mode
    it loads into torch's own layer with strict=False. A state of either mode loads into either
    mode, and brings its mask along; without `mask_bits` (strict=False) the weight is masked by the
    present one.

    Attributes:
        op: the name of the layer's op.
        activation: "none", "relu" or "gelu"; computed with the product.
        dense_grad: give the weight's gradient off the mask too, in dense mode, as pruning scores
            and regrowth need it. An optimizer step would then fill the pruned entries.
    """

    op: str
    activation: str
    dense_grad: bool
    weight: nn.Parameter
    bias: nn.Parameter | None
    mode: str
    _pattern: SparsityPattern

    def _make_parameters(
        self,
        pattern: SparsityPattern,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        shape = pattern.shape if self.mode == "dense" else (pattern.nnz,)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(pattern.shape[0], device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self._pattern = pattern
        self._follow_device()
        self.reset_parameters()

    def _take_over(self, layer: nn.Linear | nn.Conv2d, pattern: SparsityPattern) -> None:
        """Use the parameters of torch's own layer; in values mode the weight is a new one."""
        pattern = pattern.to(layer.weight.device)
        weight = layer._parameters["weight"]
        with torch.no_grad():
            if self.mode == "dense":
                layer.weight.masked_fill_(~pattern.mask, 0)
            else:
                values = pattern.gather(layer.weight)
                weight = nn.Parameter(values, layer.weight.requires_grad)
        self.register_parameter("weight", weight)
        self.register_parameter("bias", layer._parameters["bias"])
        self._pattern = pattern

    def _hand_over(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Give torch's own layer the bias, and the dense weight: the Parameter in dense mode."""
        if self.mode == "dense":
            layer.weight = self.weight
        else:
            layer.weight = nn.Parameter(self.dense_weight.detach(), self.weight.requires_grad)
        layer.register_parameter("bias", self.bias)

    @property
    def pattern(self) -> SparsityPattern:
        """The mask and its index; change it with `set_mask`."""
        return self._pattern

    @property
    def dense_weight(self) -> Tensor:
        """The weight in the mask's shape, differentiable with respect to the parameter."""
        return self.weight if self.mode == "dense" else self._pattern.scatter(self.weight)

    def reset_parameters(self) -> None:
        """Draw the weights as torch's own layers do, then drop the pruned ones."""
        if self.weight.is_meta:
            return
        bound = 1 / math.sqrt(math.prod(self._pattern.shape[1:]))
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
            mask: bool tensor of the weight's shape.

        Returns:
            The function that carries any tensor of the old weight's shape over to the new mask; in
            dense mode it changes the tensor itself, where the masks differ.

        Raises:
            TypeError: the mask is not boolean.
            ValueError: another shape, or a weight that a parametrization computes.
        """
        self._check_weight()
        return self._take_pattern(self._pattern.update(mask)[0])

    def _check_weight(self) -> None:
        if "weight" not in self._parameters:
            raise ValueError("expected the weight to be a Parameter, got a computed weight")

    @torch.no_grad()
    def _take_pattern(self, pattern: SparsityPattern) -> Callable[[Tensor], Tensor]:
        carry = self._carrying_to(pattern)
        gradient = self.weight.grad
        self.weight.grad = None
        self.weight.data = carry(self.weight.data)
        # Assigning data does not: a backward of an earlier forward would mix two masks in silence.
        if not self.weight.is_inference():
            torch.autograd.graph.increment_version(self.weight)
        if gradient is not None:
            # A dense_grad that was switched off since leaves it non-zero off the masks.
            clear = self._lost(pattern) if self.mode == "dense" else carry
            self.weight.grad = clear(gradient)
        self._pattern = pattern
        return carry

    def _lost(self, pattern: SparsityPattern) -> Callable[[Tensor], Tensor]:
        """Clears all but what both masks keep."""
        lost = ~(self._pattern.mask & pattern.mask)
        return lambda tensor: tensor.masked_fill(lost.to(tensor.device), 0)

    def _carrying_to(self, pattern: SparsityPattern) -> Callable[[Tensor], Tensor]:
        if self.mode == "values":
            mapping = self._pattern.mapping_to(pattern)
            return lambda values: remap(values, mapping.to(values.device))
        if self.dense_grad:
            # What an optimizer made of such gradients is not zero off the masks.
            return self._lost(pattern)
        changed = self._pattern.changes_to(pattern)

        def clear(tensor: Tensor) -> Tensor:
            tensor = tensor.clone() if tensor.is_inference() else tensor
            return tensor.index_put_(changed, tensor.new_zeros(()))

        return clear

    def _options_repr(self) -> str:
        activation = f", activation={self.activation!r}" if self.activation != "none" else ""
        return activation + (", dense_grad=True" if self.dense_grad else "")

    def _follow_device(self) -> None:
        if not self.weight.is_meta:
            self._pattern = self._pattern.to(self.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MaskedLayer":
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


def check_layer(kind: type[nn.Linear] | type[nn.Conv2d], layer: nn.Module) -> None:
    """A layer of torch's own whose weight is a Parameter with data."""
    name = kind.__name__
    if not isinstance(layer, kind):
        article = "an" if name == "Linear" else "a"
        raise TypeError(f"expected {article} nn.{name}, got {type(layer).__name__}")
    if "weight" not in layer._parameters:
        raise ValueError(f"expected a {name} whose weight is a Parameter, got a computed weight")
    if layer.weight.is_meta:
        raise ValueError(f"expected a {name} whose weight has data, got one on the meta device")


def check_pattern(shape: tuple[int, ...], pattern: SparsityPattern, mode: str) -> None:
    """A pattern of the weight's shape, and a known mode."""
    if not isinstance(pattern, SparsityPattern):
        raise TypeError(f"expected pattern to be a SparsityPattern, got {type(pattern).__name__}")
    if pattern.shape != shape:
        raise ValueError(f"expected a mask of shape {shape}, got {pattern.shape}")
    if mode not in MODES:
        raise ValueError(f"expected mode to be one of {', '.join(MODES)}, got {mode!r}")


def check_options(mode: str, activation: str, dense_grad: bool) -> None:
    """A known activation, and no dense gradient of values."""
    check_name("activation", activation, ACTIVATIONS)
    if dense_grad and mode != "dense":
        raise ValueError(f"dense_grad=True needs mode 'dense', got {mode!r}")
