"""Which masked layers of a model may hand their result to the next one feature-major."""

from collections import Counter
from collections.abc import Callable, Iterator, Set

from torch import nn

from tscnc_kernels.nn._fuse import FusedActivation, has_hooks

# Modules that compute each element by itself, and leave the result in their input's layout.
ELEMENTWISE = (
    *(nn.ReLU, nn.GELU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU, nn.Mish, nn.Tanh),
    *(nn.Sigmoid, nn.Softplus, nn.Hardtanh, nn.ReLU6, nn.Dropout, nn.Identity, FusedActivation),
)


def feature_major_layers(model: nn.Module, sparse: Set[nn.Module]) -> set[nn.Module]:
    """The layers of `sparse` whose result another one reads, element-wise modules between at most.

    Both are in one Sequential, or in some inside each other, with no hook between them that might
    want a row-major tensor; and the first is used nowhere else.
    """
    uses = Counter(
        child for parent in model.modules() for child in parent._modules.values() if child
    )

    def joins(child: nn.Module) -> bool:
        return uses[child] == 1 and _is_plain(child)

    chains = [parent for parent in model.modules() if _is_plain(parent)]
    inner = {child for parent in chains for child in parent.children() if joins(child)}
    found = set()
    for parent in chains:
        previous = None
        for module in _flat(parent, joins) if parent not in inner else ():
            if module in sparse:
                if previous is not None:
                    found.add(previous)
                previous = None if uses[module] > 1 or has_hooks(module) else module
            elif type(module) not in ELEMENTWISE or has_hooks(module):
                previous = None
    return found


def _is_plain(module: nn.Module) -> bool:
    """Whether a module runs its children one after the other, and nothing else."""
    plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return plain and not has_hooks(module)


def _flat(parent: nn.Module, joins: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    for child in parent._modules.values():
        if child is not None and joins(child):
            yield from _flat(child, joins)
        elif child is not None:
            yield child
