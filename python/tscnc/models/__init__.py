"""The networks that `tscnc train` knows by name."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import torch
from torch import nn

_ALIASES = {"lenet-300-100": "mlp-300-100"}


def build(
    name: str,
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """Builds a network: flatten, linear, ReLU, …, linear.

    Args:
        name: `"lenet-300-100"`, or `"mlp-WIDTH-WIDTH…"` with the widths of the hidden layers.
        input_shape: shape of one input, without the batch.
        num_classes: number of outputs.
        generator: source of the initial weights; torch's global one if None.

    Returns:
        A float32 network whose linear layers have Kaiming-uniform weights and zero biases.

    Raises:
        ValueError: an unknown name, an empty input shape, or no class.
    """
    match = re.fullmatch(r"mlp((?:-[1-9]\d*)+)", _ALIASES.get(name, name))
    if match is None:
        raise ValueError(
            f"unknown model {name!r}: expected lenet-300-100, or mlp-WIDTH-WIDTH... with "
            "the hidden widths"
        )
    inputs = math.prod(input_shape)
    if inputs < 1 or num_classes < 1:
        raise ValueError(
            f"expected a non-empty input and at least one class, got input shape "
            f"{tuple(input_shape)} and {num_classes} classes"
        )
    hidden = [int(width) for width in match[1].split("-")[1:]]
    widths = [inputs, *hidden, num_classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths):
        layers += [_linear(fan_in, fan_out, generator), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _linear(fan_in: int, fan_out: int, generator: torch.Generator | None) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
