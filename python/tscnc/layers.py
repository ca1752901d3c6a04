"""The prunable layers of a network, whether their weights are dense or stored as kept values."""

from __future__ import annotations

from torch import Tensor, nn

from tscnc_kernels import SparsityPattern
from tscnc_kernels.nn import MaskedLinear


def prunable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the layers with a prunable weight, by its dense parameter name (`"0.weight"`)."""
    return {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | MaskedLinear)
    }


def pattern_of(layer: nn.Module) -> SparsityPattern | None:
    """Returns the sparsity pattern of a pruned layer, None of a dense one."""
    return layer.pattern if isinstance(layer, MaskedLinear) else None


def stored_weight(layer: nn.Module) -> nn.Parameter:
    """Returns the parameter that holds a layer's weight: the matrix, or its (nnz,) kept values."""
    return layer.get_parameter("weight")


def dense_weight(layer: nn.Module) -> Tensor:
    """Returns a layer's weight as a matrix that gradients flow through."""
    return layer.dense_weight if isinstance(layer, MaskedLinear) else stored_weight(layer)
