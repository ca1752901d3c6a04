"""The prunable layers of a model, and masks keyed by their names.

Prunable are the weights of `nn.Linear`, `nn.Conv2d` and the masked layers of `tscnc_kernels.nn`
(recognised by ``pattern`` and ``dense_weight``). Their names are parameter names, ``"0.weight"``;
wherever names are given, the module's name (``"0"``) is understood as well.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tscnc_kernels.nn import FusedActivation


def is_prunable(module: nn.Module) -> bool:
    """Whether the module itself, not only one inside it, is a prunable layer."""
    return isinstance(module, (nn.Linear, nn.Conv2d)) or _is_masked(module)


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """The dense weight of every prunable layer, by parameter name, in the model's order.

    Args:
        model: any module.

    Returns:
        The layers' own parameters; for a masked layer that stores only its kept values, a dense
        tensor of those values with zeros elsewhere.

    Raises:
        ValueError: the model has no prunable layer.
    """
    weights = {
        _parameter_name(name): _dense_weight(module)
        for name, module in model.named_modules()
        if is_prunable(module)
    }
    if not weights:
        raise ValueError(f"{type(model).__name__} has no Linear or Conv2d layer to prune")
    return weights


def complete_masks(model: nn.Module, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """A mask for every prunable layer.

    Args:
        model: any module with prunable layers.
        masks: bool tensors of the weights' shapes by parameter or module name, or None.

    Returns:
        Masks by parameter name, in the model's order, on the weights' devices. A layer that `masks`
        does not name keeps everything; a masked layer never keeps more than its own pattern.

    Raises:
        TypeError: a mask is not a bool tensor.
        ValueError: an unknown name, or a mask of another shape than its weight.
    """
    weights = prunable(model)
    given: dict[str, Tensor] = {}
    for name, mask in (masks or {}).items():
        key = name if name in weights else _parameter_name(name)
        if key not in weights:
            raise ValueError(f"no prunable layer {name!r}, the model has {', '.join(weights)}")
        if key in given:
            raise ValueError(f"two masks for {key!r}")
        given[key] = _checked_mask(name, mask, weights[key])
    patterns = {
        _parameter_name(name): module.pattern.mask
        for name, module in model.named_modules()
        if _is_masked(module)
    }
    complete = {}
    for name, weight in weights.items():
        mask = given.get(name, torch.ones_like(weight, dtype=torch.bool)).to(weight.device)
        complete[name] = mask & patterns[name].to(weight.device) if name in patterns else mask
    return complete


def plain_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose prunable layers are ordinary dense ones, each with a weight of its own.

    Masked layers become the Linear or Conv2d they stand for, and parametrized weights (spectral
    norm, say) stay at their present value. Whatever is computed on the copy leaves the model's
    gradients, buffers and mode as they are.
    """
    copied = copy.deepcopy(model)
    if _is_masked(copied):
        return _plain_layer(copied)
    plain: dict[nn.Module, nn.Module] = {}  # a layer that is used twice stays one layer
    for module in list(copied.modules()):
        if is_prunable(module) and parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
        for name, child in module.named_children():
            if _is_masked(child):
                setattr(module, name, plain.setdefault(child, _plain_layer(child)))
            elif isinstance(child, FusedActivation):
                setattr(module, name, child.original)
    return copied


def _parameter_name(module_name: str) -> str:
    return f"{module_name}.weight" if module_name else "weight"


def _is_masked(module: nn.Module) -> bool:
    return hasattr(type(module), "pattern") and hasattr(type(module), "dense_weight")


def _dense_weight(module: Any) -> Tensor:
    weight: Tensor = module.dense_weight if _is_masked(module) else module.weight
    return weight


def _checked_mask(name: str, mask: Tensor, weight: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"expected a bool tensor as mask of {name!r}, got {got}")
    if mask.shape != weight.shape:
        raise ValueError(
            f"expected a mask of shape {tuple(weight.shape)} for {name!r}, got {tuple(mask.shape)}"
        )
    return mask


def _plain_layer(module: Any) -> nn.Module:
    # Made on the meta device, so that no initial values are drawn from the global generator.
    weight, has_bias = _dense_weight(module).detach(), module.bias is not None
    plain: nn.Linear | nn.Conv2d
    if weight.dim() == 2:
        plain = nn.Linear(weight.shape[1], weight.shape[0], has_bias, device="meta")
    else:
        plain = nn.Conv2d(
            weight.shape[1] * module.groups,
            weight.shape[0],
            (weight.shape[2], weight.shape[3]),
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            bias=has_bias,
            device="meta",
        )
    plain.weight = nn.Parameter(weight.clone())
    if has_bias:
        plain.bias = nn.Parameter(module.bias.detach().clone())
    return plain.train(module.training)
