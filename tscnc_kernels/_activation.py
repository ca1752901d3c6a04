"""The activations that masked layers fuse into their products, in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

# With their codes in csrc/include/activation.h.
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}


def activate(z: Tensor, activation: str) -> Tensor:
    """The activation of a name in `ACTIVATIONS`."""
    if activation == "relu":
        return F.relu(z)
    return F.gelu(z) if activation == "gelu" else z


def activation_gradient(grad_output: Tensor, saved: Tensor, activation: str) -> Tensor:
    """The gradient dY ∘ act'(Z). `saved` is Z; for relu Y serves as well."""
    if activation == "relu":
        return grad_output.masked_fill(saved <= 0, 0)
    if activation == "gelu":
        distribution = 0.5 * (1 + torch.erf(saved * 0.5**0.5))
        density = torch.exp(-0.5 * saved * saved) * (2 * torch.pi) ** -0.5
        return grad_output * (distribution + saved * density)
    return grad_output
