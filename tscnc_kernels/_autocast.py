"""Autocast at the public boundary of an op that follows F.linear's policy."""

from typing import Any

import torch
from torch import Tensor


def autocast(tensor: Any) -> Any:
    """The tensor in autocast's dtype where autocast is on, by torch's rule for F.linear.

    float64 and integer tensors stay as they are, and so does what is not a tensor.
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return tensor
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return tensor
    if not torch.is_autocast_enabled(device):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))
