"""Swap the pruned layers of a model to sparse kernels, back, and to other masks."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from tscnc_kernels import _backend
from tscnc_kernels._masked_algorithms import PANEL_DENSITY, choose
from tscnc_kernels.nn._names import check_module, resolve
from tscnc_kernels.nn.masked_layer import MODES
from tscnc_kernels.nn.masked_linear import MaskedLinear
from tscnc_kernels.sparsity import SparsityPattern

# Values mode is the faster one for layers that are at least half empty.
VALUES_DENSITY = 0.5


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
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    density: float
    mode: str | None
    reason: str


@dataclass(frozen=True)
class SparsifyReport:
    """One entry per Linear and Conv2d layer; `print(report)` shows them as a table."""

    layers: tuple[LayerReport, ...]

    @property
    def swapped(self) -> list[str]:
        """Names of the layers that run sparse now."""
        return [layer.name for layer in self.layers if layer.mode is not None]

    def __str__(self) -> str:
        rows = [("layer", "shape", "density", "now", "reason")]
        for layer in self.layers:
            now = f"MaskedLinear {layer.mode}" if layer.mode else f"{layer.kind}, unchanged"
            shape = " x ".join(map(str, layer.shape))
            rows.append((layer.name, shape, f"{layer.density:.2%}", now, layer.reason))
        return _table(rows)


def sparsify(
    model: nn.Module, masks: Mapping[str, Tensor] | None = None, *, mode: str | None = None
) -> SparsifyReport:
    """Replace pruned Linear layers of a model, in place, by `MaskedLinear`.

    With `masks`, every named layer is swapped and all others stay as they are. Without, a layer is
    swapped if torch.nn.utils.prune holds a mask for it, or if so many of its weights are zero that
    the sparse kernel is the faster one. Create the optimizer afterwards, unless mode="dense".

    Args:
        model: any module that contains Linear layers.
        masks: name -> bool tensor of the weight's shape, true where it is kept. Names are those of
            parameters ("0.weight"); module names ("0") are accepted too.
        mode: "dense" or "values", see `MaskedLinear`; None takes values for layers with at most
            half of their entries kept.

    Returns:
        A report with one entry per Linear and Conv2d layer. Conv2d layers are never swapped; the
        report says so where a mask was given for one.

    Raises:
        ValueError: an unknown name (close or known names are listed), a mask of another shape, an
            unknown mode, a mask for a weight without data (lazy, or on the meta device), or a model
            that is itself a Linear. The model is unchanged then.
        TypeError: a mask that is not boolean, or arguments of other types.
    """
    if mode is not None and mode not in MODES:
        raise ValueError(f"expected mode to be None or one of {', '.join(MODES)}, got {mode!r}")
    if isinstance(model, nn.Linear):
        raise ValueError("expected a model that contains Linear layers, got a Linear itself")
    resolved = resolve(model, {} if masks is None else masks)
    named = {name: _pattern(model, name, mask) for name, mask in resolved.items()}
    users = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    layers, swaps = [], {}
    for name, module in model.named_modules():
        if isinstance(module, MaskedLinear) and name in named:
            raise ValueError(f"{name!r} is a MaskedLinear already; use nn.update_masks")
        if not isinstance(module, nn.Linear | nn.Conv2d) or not _is_materialised(module.weight):
            continue
        pattern, reason = _decide(module, named.get(name), masks is not None, users)
        density = pattern.density if pattern else _density(module.weight)
        chosen = None
        if pattern is not None:
            chosen = mode or ("values" if density <= VALUES_DENSITY else "dense")
            if _reads_weights(model, name):
                chosen = "dense"
            swaps[module] = (pattern, chosen)
        shape = tuple(module.weight.shape)
        kind = type(module).__name__
        layers.append(LayerReport(name, kind, shape, density, chosen, reason))

    def swap(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, nn.Linear) or module not in swaps:
            return None
        if prune.is_pruned(module):
            prune.remove(module, "weight")
        return MaskedLinear.from_linear(module, *swaps[module])

    _replace(model, swap)
    return SparsifyReport(tuple(layers))


def densify(model: nn.Module) -> None:
    """Replace every `MaskedLinear` of a model, in place, by a Linear with the same weights.

    Args:
        model: any module; a model without MaskedLinear stays as it is.

    Raises:
        ValueError: the model is itself a MaskedLinear (use its `to_linear`).
        TypeError: not a module.
    """
    check_module(model)
    if isinstance(model, MaskedLinear):
        raise ValueError("expected a model that contains MaskedLinear, got one; use to_linear()")
    _replace(model, lambda m: m.to_linear() if isinstance(m, MaskedLinear) else None)


def update_masks(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Change the masks of `MaskedLinear` layers, carrying weights and optimizer state over.

    Kept entries keep their weight, gradient and state (momentum, moments); pruned ones lose them;
    grown ones start at zero with zero state. Parameters stay the same objects.

    Args:
        model: a model with MaskedLinear layers.
        masks: name -> new bool mask, names as for `sparsify`. Layers not named keep theirs.
        optimizer: the optimizer that holds the layers' weights.

    Raises:
        ValueError: an unknown name, a layer that is not a MaskedLinear, or a mask of another shape.
            Nothing is changed then.
        TypeError: a mask that is not boolean, or arguments of other types.
    """
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
    layers = []
    for name, mask in resolve(model, masks).items():
        layer = model.get_submodule(name)
        if not isinstance(layer, MaskedLinear):
            raise ValueError(
                f"expected {name!r} to be a MaskedLinear, got {type(layer).__name__}; "
                "run nn.sparsify with its mask first"
            )
        _pattern(model, name, mask)
        layers.append((layer, mask))
    for layer, mask in layers:
        shape = layer.weight.shape
        carry = layer.set_mask(mask)
        state = optimizer.state.get(layer.weight, {}) if optimizer is not None else {}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == shape:
                state[key] = carry(value)


def explain(module: nn.Module) -> str:
    """What each masked layer of a module runs, and why.

    Args:
        module: a module, or a model that contains some.

    Returns:
        A table with one line per `MaskedLinear`.

    Raises:
        RuntimeError: a backend was forced that cannot run here.
        TypeError: not a module.
    """
    check_module(module)
    rows = [("layer", "shape", "density", "mode", "runs", "reason")]
    for name, layer in module.named_modules():
        if not isinstance(layer, MaskedLinear):
            continue
        pattern = layer.pattern
        backend = _backend.select("masked_linear", pattern.device)
        algorithm = choose("masked_linear", pattern, backend, 1).forward
        side = "at most" if pattern.density <= PANEL_DENSITY else "above"
        reason = f"density {side} {PANEL_DENSITY:.0%}"
        if backend != "native":
            reason = "only the native backend has a sparse kernel"
        shape, density = " x ".join(map(str, pattern.shape)), f"{pattern.density:.2%}"
        name = name or type(layer).__name__
        rows.append((name, shape, density, layer.mode, f"{backend} {algorithm}", reason))
    return _table(rows) if len(rows) > 1 else "no masked layer"


def _pattern(model: nn.Module, name: str, mask: Tensor) -> SparsityPattern:
    """The pattern of a named mask, with errors that tell the name."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear | nn.Conv2d | MaskedLinear)
    if not isinstance(module, MaskedLinear) and not _is_materialised(module.weight):
        raise ValueError(f"mask of {name!r}: expected a weight with data, got a lazy or meta one")
    shape = module.pattern.shape if isinstance(module, MaskedLinear) else tuple(module.weight.shape)
    try:
        pattern = SparsityPattern.from_mask(mask)
    except (TypeError, ValueError) as error:
        raise type(error)(f"mask of {name!r}: {error}") from error
    if pattern.shape != shape:
        raise ValueError(f"mask of {name!r}: expected shape {shape}, got {pattern.shape}")
    return pattern


def _decide(
    module: nn.Linear | nn.Conv2d,
    given: SparsityPattern | None,
    only_named: bool,
    users: Mapping[int, int],
) -> tuple[SparsityPattern | None, str]:
    """The pattern to swap the layer to, or None, and the reason."""
    if only_named and given is None:
        return None, "no mask was given"
    if isinstance(module, nn.Conv2d):
        return None, "convolutions have no sparse kernel; a mask is not applied"
    pruned = {name.removesuffix("_mask") for name in module._buffers if name.endswith("_mask")}
    hooks = len(module._forward_pre_hooks) - len(pruned) + len(module._forward_hooks)
    if type(module) is not nn.Linear:
        return None, f"{type(module).__name__} is a class of its own"
    if hooks or module._backward_hooks or module._backward_pre_hooks or pruned - {"weight"}:
        return None, "hooks or a pruned bias hang on it"
    weight = module.get_parameter("weight_orig" if pruned else "weight")
    if users[id(weight)] > 1:
        return None, "its weight is shared with another layer"
    if given is not None:
        return given, "mask given"
    if pruned:
        mask = module.get_buffer("weight_mask") != 0
        return SparsityPattern.from_mask(mask), "mask of torch.nn.utils.prune"
    if _density(weight) == 0:
        return None, "all of its weights are zero, as before training; give a mask to prune it"
    if _density(weight) <= PANEL_DENSITY:
        return SparsityPattern.from_mask(weight.detach() != 0), "existing zeros"
    return None, f"more than {PANEL_DENSITY:.0%} of its weights are not zero"


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


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
