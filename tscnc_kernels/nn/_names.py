"""Masks named by parameter ("0.weight") or module ("0"), resolved to modules."""

import difflib
from collections.abc import Mapping

from torch import Tensor, nn

from tscnc_kernels.nn.masked_layer import MaskedLayer

MASKABLE = (nn.Linear, nn.Conv2d, MaskedLayer)


def resolve(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks by the first name of their module.

    Raises:
        ValueError: a name is unknown (the message lists close or known ones), or a module is named
            twice.
        TypeError: not a module, or not a mapping with strings as its keys.
    """
    check_module(model)
    if not isinstance(masks, Mapping):
        raise TypeError(f"expected masks to be a mapping, got {type(masks).__name__}")
    known: dict[str, str] = {}
    first: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, MASKABLE):
            known[name] = first.setdefault(module, name)
    resolved: dict[str, Tensor] = {}
    for name, mask in masks.items():
        if not isinstance(name, str):
            raise TypeError(f"expected masks to be named by strings, got {name!r}")
        module_name = name.removesuffix("weight").removesuffix(".") if _is_weight(name) else name
        if module_name not in known:
            hint = _hint(name, list(known))
            raise ValueError(f"no weight that can be masked is named {name!r}; {hint}")
        canonical = known[module_name]
        if canonical in resolved:
            raise ValueError(f"the weight of {canonical!r} is named twice")
        resolved[canonical] = mask
    return resolved


def check_module(model: nn.Module) -> None:
    """Raises TypeError for what is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(model).__name__}")


def _is_weight(name: str) -> bool:
    return name == "weight" or name.endswith(".weight")


def _hint(name: str, known: list[str]) -> str:
    names = [f"{module}.weight" if module else "weight" for module in known]
    close = difflib.get_close_matches(name, names + known, n=3)
    if close:
        return f"close names: {', '.join(close)}"
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"known names: {shown}" if names else "the model has no Linear or Conv2d layer"
