"""Swap the pruned layers of a model to sparse kernels, back, and to other masks."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tscnc_kernels.nn._fuse import FusedActivation, fused_layers, fusible, has_hooks
from tscnc_kernels.nn._gain import WORTHWHILE, measured_gain, predicted_gain
from tscnc_kernels.nn._layout import feature_major_layers
from tscnc_kernels.nn._names import check_module, resolve
from tscnc_kernels.nn.explain import table
from tscnc_kernels.nn.masked_conv2d import MaskedConv2d
from tscnc_kernels.nn.masked_layer import MODES, MaskedLayer
from tscnc_kernels.nn.masked_linear import MaskedLinear
from tscnc_kernels.optim.masked_optimizer import MaskedOptimizer
from tscnc_kernels.sparsity import SparsityPattern

# Values mode is the faster one for layers that are at least half empty.
VALUES_DENSITY = 0.5
ZEROS = "existing zeros"
_PLAIN: dict[type, Callable[[Any], nn.Module]] = {
    MaskedLinear: MaskedLinear.to_linear,
    MaskedConv2d: MaskedConv2d.to_conv,
}


@dataclass(frozen=True)
class LayerReport:
    """What `sparsify` did with one layer.

    Attributes:
        name: module name.
        kind: class name before the swap.
        shape: shape of the weight.
        density: share of its entries that are kept, or not zero.
        mode: "dense" or "values" if it was swapped, else None.
        reason: why it was swapped or left.
        gain: time of the plain layer over that of the masked one, forward and backward; None where
            it was not asked.
        measured: whether the gain was timed on this machine, or predicted.
        activation: that of the module behind it, if it was fused into the layer.
        feature_major: whether it hands its result to another swapped layer feature-major.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    density: float
    mode: str | None
    reason: str
    gain: float | None = None
    measured: bool = False
    activation: str | None = None
    feature_major: bool = False


@dataclass(frozen=True)
class SparsifyReport:
    """One entry per Linear and Conv2d layer; `print(report)` shows them as a table."""

    layers: tuple[LayerReport, ...]

    @property
    def swapped(self) -> list[str]:
        """Names of the layers that run sparse now."""
        return [layer.name for layer in self.layers if layer.mode is not None]

    def __str__(self) -> str:
        rows = [("layer", "shape", "density", "now", "gain", "reason")]
        for layer in self.layers:
            now = f"{layer.kind}, unchanged"
            if layer.mode:
                now = f"Masked{layer.kind} {layer.mode}"
                now += f" + {layer.activation}" if layer.activation else ""
                now += ", feature-major" if layer.feature_major else ""
            gain = ""
            if layer.gain is not None:
                gain = f"{layer.gain:.1f}x {'measured' if layer.measured else 'predicted'}"
            shape = " x ".join(map(str, layer.shape))
            rows.append((layer.name, shape, f"{layer.density:.2%}", now, gain, layer.reason))
        return table(rows)


def sparsify(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    *,
    mode: str | None = None,
    fuse: bool = True,
    feature_major: bool = True,
    batch: int | None = None,
) -> SparsifyReport:
    """Replace pruned layers of a model, in place, by `MaskedLinear` and `MaskedConv2d`.

    With `masks`, every named layer is swapped and all others stay as they are. Without, a layer is
    swapped if torch.nn.utils.prune holds a mask for it, or if so many of its weights are zero that
    the masked layer is the faster one. Create the optimizer afterwards, unless mode="dense".

    A ReLU or an exact GELU that directly follows a swapped layer in a Sequential is fused into it;
    the layer then returns activated values. `densify` takes that back. A swapped Linear whose
    result goes to another one in the same Sequential, through element-wise modules at most, hands
    it over feature-major (see `MaskedLinear`), which spares both a transposition; values stay.

    Args:
        model: any module that contains Linear or Conv2d layers.
        masks: name -> bool tensor of the weight's shape, true where it is kept. Names are those of
            parameters ("0.weight"); module names ("0") are accepted too.
        mode: "dense" or "values", see `MaskedLinear`; None takes values for layers with at most
            half of their entries kept.
        fuse: fuse activations.
        feature_major: hand results over feature-major.
        batch: samples per call (for a convolution, pixels of one image); each layer in question is
            then timed before and after the swap, on random input. None predicts for 128 samples
            and 4096 pixels.

    Returns:
        A report with one entry per Linear and Conv2d layer.

    Raises:
        ValueError: an unknown name (close or known names are listed), a mask of another shape, an
            unknown mode, a mask for a weight without data (lazy, or on the meta device), a batch
            below 1, or a model that is itself a Linear or Conv2d. The model is unchanged then.
        TypeError: a mask that is not boolean, or arguments of other types.
    """
    if mode is not None and mode not in MODES:
        raise ValueError(f"expected mode to be None or one of {', '.join(MODES)}, got {mode!r}")
    if batch is not None and batch < 1:
        raise ValueError(f"expected a batch of at least 1, got {batch}")
    if isinstance(model, nn.Linear | nn.Conv2d):
        kind = type(model).__name__
        raise ValueError(f"expected a model that contains {kind} layers, got a {kind} itself")
    resolved = resolve(model, {} if masks is None else masks)
    named = {name: _pattern(model, name, mask) for name, mask in resolved.items()}
    users = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    fused = {layer: name for _, layer, _, name in fusible(model)} if fuse else {}
    layers: list[LayerReport] = []
    swaps: dict[nn.Module, _Swap] = {}
    sparse: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, MaskedLayer) and name in named:
            kind = type(module).__name__
            raise ValueError(f"{name!r} is a {kind} already; use nn.update_masks")
        if not isinstance(module, nn.Linear | nn.Conv2d) or not _is_materialised(module.weight):
            continue
        pattern, reason = _candidate(module, named.get(name), masks is not None, users)
        if pattern is None:
            layers.append(_report(name, module, None, reason))
            continue
        chosen = "dense" if _reads_weights(model, name) else mode or _mode_for(pattern)
        swap = _Swap(pattern, chosen, fused.get(module, "none"))
        gain = _gain(module, swap, batch)
        if reason != ZEROS or gain >= WORTHWHILE:
            swaps[module] = swap
            if isinstance(module, nn.Linear) and gain >= WORTHWHILE:
                sparse[module] = name
        else:
            reason = f"dense is as fast with {pattern.density:.1%} of its weights not zero"
        report = _report(name, module, swaps.get(module), reason, gain, batch is not None)
        layers.append(report)
    handing = feature_major_layers(model, sparse.keys()) if feature_major else set()
    swaps.update({layer: swaps[layer]._replace(feature_major=True) for layer in handing})
    _apply_swaps(model, swaps)
    names = {sparse[layer] for layer in handing}
    return SparsifyReport(tuple(replace(e, feature_major=e.name in names) for e in layers))


class _Swap(NamedTuple):
    pattern: SparsityPattern
    mode: str
    activation: str
    feature_major: bool = False


def _apply_swaps(model: nn.Module, swaps: Mapping[nn.Module, _Swap]) -> None:
    for parent, layer, after, _ in list(fusible(model)):
        if layer in swaps and swaps[layer].activation != "none":
            parent._modules[after] = FusedActivation(parent.get_submodule(after))
    _replace(model, lambda module: _masked(module, swaps[module]) if module in swaps else None)


def _masked(module: nn.Module, swap: _Swap) -> MaskedLayer:
    if prune.is_pruned(module):
        prune.remove(module, "weight")
    pattern, mode, activation, feature_major = swap
    if isinstance(module, nn.Conv2d):
        return MaskedConv2d.from_conv(module, pattern, mode, activation=activation)
    assert isinstance(module, nn.Linear)
    return MaskedLinear.from_linear(
        module, pattern, mode, activation=activation, feature_major=feature_major
    )


def _gain(module: nn.Module, swap: _Swap, batch: int | None) -> float:
    if batch is None:
        pattern = swap.pattern
        op = MaskedConv2d.op if isinstance(module, nn.Conv2d) else MaskedLinear.op
        return predicted_gain(op, pattern.shape, pattern.nnz, swap.mode == "values")
    plain = copy.deepcopy(module)
    masked = _masked(copy.deepcopy(module), swap._replace(activation="none"))
    return measured_gain(plain, masked, batch)


def _mode_for(pattern: SparsityPattern) -> str:
    return "values" if pattern.density <= VALUES_DENSITY else "dense"


def _report(
    name: str,
    module: nn.Linear | nn.Conv2d,
    swap: _Swap | None,
    reason: str,
    gain: float | None = None,
    measured: bool = False,
) -> LayerReport:
    return LayerReport(
        name=name,
        kind=type(module).__name__,
        shape=tuple(module.weight.shape),
        density=swap.pattern.density if swap else _density(module.weight),
        mode=swap.mode if swap else None,
        reason=reason,
        gain=gain,
        measured=measured,
        activation=swap.activation if swap and swap.activation != "none" else None,
    )


def densify(model: nn.Module) -> None:
    """Replace every masked layer of a model, in place, by torch's own with the same weights.

    Activations that `sparsify` fused are modules of their own again.

    Args:
        model: any module; a model without masked layers stays as it is.

    Raises:
        ValueError: the model is itself a masked layer (use its `to_linear` or `to_conv`), or a
            layer has an activation that is not `sparsify`'s doing.
        TypeError: not a module.
    """
    check_module(model)
    if isinstance(model, MaskedLayer):
        kind, use = type(model).__name__, _PLAIN[type(model)].__name__
        raise ValueError(f"expected a model that contains {kind}, got one; use {use}()")
    fused = fused_layers(model)
    for name, module in model.named_modules():
        if isinstance(module, MaskedLayer) and module.activation != "none" and module not in fused:
            raise ValueError(
                f"{name!r} computes {module.activation} itself, which torch's own layer cannot; "
                f"use its {_PLAIN[type(module)].__name__}() and add the activation"
            )
    _replace(model, _plain)


def _plain(module: nn.Module) -> nn.Module | None:
    if isinstance(module, FusedActivation):
        return module.original
    return _PLAIN[type(module)](module) if isinstance(module, MaskedLayer) else None


def update_masks(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Change the masks of masked layers, carrying weights and optimizer state over.

    Kept entries keep their weight, gradient and state (momentum, moments); pruned ones lose them;
    grown ones start at zero with zero state. Parameters stay the same objects.

    Args:
        model: a model with MaskedLinear or MaskedConv2d layers.
        masks: name -> new bool mask, names as for `sparsify`. Layers not named keep theirs.
        optimizer: the optimizer that holds the layers' weights.

    Raises:
        ValueError: an unknown name, a layer that is not masked, or a mask of another shape. Nothing
            is changed then.
        TypeError: a mask that is not boolean, or arguments of other types.
    """
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
    layers = []
    for name, mask in resolve(model, masks).items():
        layer = model.get_submodule(name)
        if not isinstance(layer, MaskedLayer):
            raise ValueError(
                f"expected {name!r} to be a masked layer, got {type(layer).__name__}; "
                "run nn.sparsify with its mask first"
            )
        layer._check_weight()
        layers.append((layer, _pattern(model, name, mask).to(layer.pattern.device)))
    for layer, pattern in layers:
        shape = layer.weight.shape
        carry = layer._take_pattern(pattern)
        if isinstance(optimizer, MaskedOptimizer):
            continue
        state = optimizer.state.get(layer.weight, {}) if optimizer is not None else {}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == shape:
                state[key] = carry(value)
    if isinstance(optimizer, MaskedOptimizer):
        optimizer.follow_masks()


def _pattern(model: nn.Module, name: str, mask: Tensor) -> SparsityPattern:
    """The pattern of a named mask, with errors that tell the name."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear | nn.Conv2d | MaskedLayer)
    if not isinstance(module, MaskedLayer) and not _is_materialised(module.weight):
        raise ValueError(f"mask of {name!r}: expected a weight with data, got a lazy or meta one")
    shape = module.pattern.shape if isinstance(module, MaskedLayer) else tuple(module.weight.shape)
    try:
        pattern = SparsityPattern.from_mask(mask)
    except (TypeError, ValueError) as error:
        raise type(error)(f"mask of {name!r}: {error}") from error
    if pattern.shape != shape:
        raise ValueError(f"mask of {name!r}: expected shape {shape}, got {pattern.shape}")
    return pattern


def _candidate(
    module: nn.Linear | nn.Conv2d,
    given: SparsityPattern | None,
    only_named: bool,
    users: Mapping[int, int],
) -> tuple[SparsityPattern | None, str]:
    """The pattern that the layer could be swapped to, or None, and the reason."""
    if only_named and given is None:
        return None, "no mask was given"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return None, f"its padding is {module.padding_mode}, not of zeros"
    pruned = {name.removesuffix("_mask") for name in module._buffers if name.endswith("_mask")}
    if type(module) not in (nn.Linear, nn.Conv2d):
        return None, f"{type(module).__name__} is a class of its own"
    if has_hooks(module, pruned=len(pruned)) or pruned - {"weight"}:
        return None, "hooks or a pruned bias hang on it"
    weight = module.get_parameter("weight_orig" if pruned else "weight")
    if users[id(weight)] > 1:
        return None, "its weight is shared with another layer"
    if given is not None:
        return given, "mask given"
    if pruned:
        mask = module.get_buffer("weight_mask") != 0
        return SparsityPattern.from_mask(mask), "mask of torch.nn.utils.prune"
    density = _density(weight)
    if density == 0:
        return None, "all of its weights are zero, as before training; give a mask to prune it"
    if density == 1:
        return None, "none of its weights is zero"
    return SparsityPattern.from_mask(weight.detach() != 0), ZEROS


def _is_materialised(weight: Tensor) -> bool:
    return not nn.parameter.is_lazy(weight) and not weight.is_meta


def _density(weight: Tensor) -> float:
    return int(weight.count_nonzero()) / max(1, weight.numel())


def _reads_weights(model: nn.Module, name: str) -> bool:
    """Whether the parent passes its children's weights on itself, which then must be dense."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return isinstance(parent, nn.TransformerEncoderLayer)


def _replace(model: nn.Module, new: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put new(module) in the place of every submodule for which it is not None, once per module."""
    made: dict[nn.Module, nn.Module | None] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is None:
                continue
            if child not in made:
                made[child] = new(child)
            replacement = made[child]
            if replacement is not None:
                parent._modules[name] = replacement
