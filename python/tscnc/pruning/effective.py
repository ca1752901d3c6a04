"""Effective sparsity: which of the kept weights still lie on a path from an input to an output.

A kept weight is inactive if no path of kept weights from the inputs to the outputs passes through
it. The effective mask keeps the active weights only; the effective compression is the number of
weights over the number of active ones, infinite for a disconnected network.

Biases and normalisation shifts make no unit active, pooling and activations are transparent.

Source: Vysogorets and Kempe (arXiv 2107.02306), section 3. Their reference algorithm, the support
of SynFlow scores, is the mode ``"exact"``, computed on 0 and 1 so that no depth can overflow it.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from tscnc.pruning.layers import complete_masks, is_prunable, prunable
from tscnc.pruning.linearise import linear_responses

Mode = Literal["graph", "exact"]

# Layers through which every unit reaches its own place in the next layer, and no other.
_TRANSPARENT = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.AlphaDropout,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Hardtanh,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Softmax,
    nn.LogSoftmax,
)


def effective_masks(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    example_input: Tensor | None = None,
    mode: Mode = "graph",
) -> dict[str, Tensor]:
    """The masks restricted to active weights.

    ``"graph"`` propagates booleans through the channels of a Sequential (nested ones included) of
    fully-connected and convolutional layers. For fully-connected networks it is exact; in a
    convolution it does not see taps that only ever meet the zero padding, so it may call a few
    inactive weights active. ``"exact"`` traces any model on the example input's shape, with
    residual connections and padding; it costs one forward and backward pass in float64.

    Args:
        model: the model; its weights' values do not matter.
        masks: bool masks by parameter or module name; a layer not named keeps everything, or its
            own pattern if it is a masked layer.
        example_input: (N, ...) float tensor, needed by ``"exact"``; only its shape matters.
        mode: ``"graph"`` or ``"exact"``.

    Returns:
        A bool mask for every prunable layer, by parameter name.

    Raises:
        TypeError: a mask is not a bool tensor, or the example input is not a float tensor.
        ValueError: unknown mode, masks that do not fit the model, or a model that the mode cannot
            follow.
    """
    complete = complete_masks(model, masks)
    if mode == "graph":
        return _graph_masks(model, complete)
    if mode == "exact":
        if example_input is None:
            raise ValueError("mode='exact' needs an example_input, got None")
        responses = linear_responses(model, complete, example_input, support_only=True)
        return {name: mask & (responses[name] > 0) for name, mask in complete.items()}
    raise ValueError(f"unknown mode {mode!r}, expected 'graph' or 'exact'")


def sparsity_report(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    example_input: Tensor | None = None,
    *,
    mode: Mode = "exact",
) -> dict[str, Any]:
    """Direct and effective sparsity of a pruned model, over all prunable layers.

    Args:
        model: the model.
        masks: bool masks by parameter or module name; a layer not named is dense.
        example_input: as in `effective_masks`.
        mode: as in `effective_masks`.

    Returns:
        ``direct`` and ``effective``, the fractions of weights pruned and inactive;
        ``direct_compression`` and ``effective_compression``, 1 / (1 - fraction), `math.inf` when
        nothing is left; ``layers``, by parameter name ``density`` and ``effective_density``.

    Raises:
        TypeError: as in `effective_masks`.
        ValueError: as in `effective_masks`.
    """
    direct = complete_masks(model, masks)
    effective = effective_masks(model, masks, example_input, mode)
    total = sum(mask.numel() for mask in direct.values())
    kept, active = _count(direct), _count(effective)
    return {
        "direct": 1 - kept / total,
        "effective": 1 - active / total,
        "direct_compression": total / kept if kept else math.inf,
        "effective_compression": total / active if active else math.inf,
        "layers": {
            name: {
                "density": int(direct[name].sum()) / direct[name].numel(),
                "effective_density": int(effective[name].sum()) / direct[name].numel(),
            }
            for name in direct
        },
    }


def _count(masks: Mapping[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def _graph_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Forward, which units an input reaches; backward, which units reach an output; then both."""
    layers = _layers_in_order(model)
    if len(layers) != len(masks):
        raise _cannot_follow("a layer that is used twice")
    channels = {
        name: _by_group(mask, getattr(layer, "groups", 1))
        for (name, mask), layer in zip(masks.items(), layers, strict=True)
    }
    reached = {}  # (groups, in) by layer: the inputs that carry a signal
    signal: Tensor | None = None  # (units,) after the layer before
    for name, mask in channels.items():
        groups, _, inputs = mask.shape
        arriving = (
            mask.new_ones(groups * inputs)
            if signal is None
            else _spread(signal, groups * inputs, name)
        )
        reached[name] = arriving.view(groups, inputs)
        signal = (mask & reached[name][:, None, :]).any(2).flatten()

    effective = {}
    needed: Tensor | None = None  # (units,) before the layer after
    for name, mask in reversed(channels.items()):
        groups, outputs, _ = mask.shape
        wanted = mask.new_ones(groups * outputs) if needed is None else needed
        wanted = wanted.view(groups * outputs, -1).any(1)  # positions of one channel, if flattened
        needed = (mask & wanted.view(groups, outputs, 1)).any(1).flatten()
        alive = wanted.view(groups, outputs, 1) & reached[name][:, None, :]
        full = masks[name]
        taps = [1] * (full.dim() - 2)
        effective[name] = full & alive.reshape(full.shape[0], full.shape[1], *taps)
    return {name: effective[name] for name in masks}


def _by_group(mask: Tensor, groups: int) -> Tensor:
    """(out, in / groups, ...) to (groups, out / groups, in / groups): are two units connected?"""
    return mask.flatten(2).any(2).view(groups, -1, mask.shape[1]) if mask.dim() > 2 else mask[None]


def _spread(signal: Tensor, inputs: int, name: str) -> Tensor:
    """One signal per unit to one per input: flattening puts a channel's positions side by side."""
    if inputs % len(signal) != 0:
        raise _cannot_follow(f"{len(signal)} units into the {inputs} inputs of {name!r}")
    return signal.repeat_interleave(inputs // len(signal))


def _layers_in_order(model: nn.Module) -> list[nn.Module]:
    layers: list[nn.Module] = []
    is_image = False  # the last layer was a convolution, and nothing has flattened its output yet
    for module in _flattened(model):
        if is_prunable(module):
            is_convolution = prunable(module)["weight"].dim() > 2
            if is_image and not is_convolution:
                raise _cannot_follow("a fully-connected layer on images that are not flattened")
            layers.append(module)
            is_image = is_convolution
        elif isinstance(module, nn.Flatten):
            if (module.start_dim, module.end_dim) != (1, -1):
                raise _cannot_follow(f"{module}, which keeps a dimension,")
            is_image = False
        elif not isinstance(module, _TRANSPARENT):
            raise _cannot_follow(f"a {type(module).__name__}")
    return layers


def _flattened(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        return [inner for child in module for inner in _flattened(child)]
    return [module]


def _cannot_follow(what: str) -> ValueError:
    return ValueError(
        f"mode='graph' cannot follow {what}: it knows Sequential models of Linear, Conv2d and "
        "layers without connections of their own; use mode='exact'"
    )
