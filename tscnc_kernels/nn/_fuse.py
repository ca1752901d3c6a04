"""Activations that follow a masked layer in a Sequential, computed by the layer itself."""

import itertools
from collections import Counter
from collections.abc import Iterator

from torch import nn

Child = tuple[str, nn.Module | None]


class FusedActivation(nn.Identity):
    """Stands where an activation was that the layer before it computes now; passes its input on.

    Whoever puts another layer before it has to put `original` in its place.

    Attributes:
        original: the activation, which `densify` puts back.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original


def activation_name(module: nn.Module) -> str | None:
    """The name in `ACTIVATIONS` of a module that computes one of them and nothing else."""
    if has_hooks(module):
        return None
    if type(module) is nn.ReLU:
        return "relu"
    return "gelu" if type(module) is nn.GELU and module.approximate == "none" else None


def fusible(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, str, str]]:
    """Each layer of a plain Sequential followed by an activation that it alone feeds.

    Whether hooks hang on the layer is the caller's to know.

    Yields the Sequential, the layer, and the name of the activation in the Sequential and in
    `ACTIVATIONS`.
    """
    uses = Counter(
        id(child) for parent in model.modules() for child in parent._modules.values() if child
    )
    for parent in model.modules():
        for (_, layer), (after, module) in _steps(parent):
            if layer is None or module is None or uses[id(layer)] > 1 or uses[id(module)] > 1:
                continue
            activation = activation_name(module)
            if activation is not None:
                yield parent, layer, after, activation


def has_hooks(module: nn.Module, pruned: int = 0) -> bool:
    """Whether hooks hang on a module, apart from those of torch.nn.utils.prune for its tensors."""
    after = module._forward_hooks, module._backward_hooks, module._backward_pre_hooks
    return len(module._forward_pre_hooks) > pruned or any(after)


def fused_layers(model: nn.Module) -> set[nn.Module | None]:
    """The layers that compute the activation of a `FusedActivation`."""
    return {
        layer
        for parent in model.modules()
        for (_, layer), (_, module) in _steps(parent)
        if isinstance(module, FusedActivation)
    }


def _steps(parent: nn.Module) -> Iterator[tuple[Child, Child]]:
    """Neighbours in a module that runs its children one after the other."""
    if isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward:
        yield from itertools.pairwise(list(parent._modules.items()))
