"""Autocast at the public boundary of an op that follows F.linear's policy."""

import torch
from torch import Tensor


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks for on this device, None where it is off."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in autocast's dtype.

    What F.linear leaves as it is stays: float64, integers, and what is not a tensor.
    """
    if not isinstance(tensor, Tensor) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def cast_operands(
    device: torch.device, input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A layer's tensors as autocast wants them on this device."""
    dtype = autocast_dtype(device)
    if dtype is None:
        return input, weight, bias
    return cast(input, dtype), cast(weight, dtype), None if bias is None else cast(bias, dtype)
