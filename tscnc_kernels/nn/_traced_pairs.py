"""Which children of a module a ReLU directly follows, found by tracing the module's forward."""

from __future__ import annotations

import torch.fx
from torch import nn


class _Children(torch.fx.Tracer):
    """Records calls of children without looking into them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def traced_pairs(
    module: nn.Module, first: tuple[type[nn.Module], ...]
) -> dict[str, frozenset[str]]:
    """Names of children of the types `first` whose result is read by nn.ReLU modules alone, each
    with the names of those.

    Traced in training and in evaluation, and what is not the same in both does not count. Empty
    where the forward cannot be traced, as with control flow that depends on data.
    """
    state = dict(vars(module))
    try:
        found = []
        for training in (True, False):
            module.training = training
            found.append(_pairs(_Children().trace(module), module, first))
    except Exception:
        # A forward may raise anything when it is given proxies.
        return {}
    finally:
        # A forward may have kept some of them.
        vars(module).clear()
        vars(module).update(state)
    return {name: relus for name, relus in found[0].items() if found[1].get(name) == relus}


def _pairs(
    graph: torch.fx.Graph, module: nn.Module, first: tuple[type[nn.Module], ...]
) -> dict[str, frozenset[str]]:
    calls = [node for node in graph.nodes if node.op == "call_module"]
    modules = {node: module.get_submodule(str(node.target)) for node in calls}
    pairs = {}
    for node in calls:
        again = sum(other is modules[node] for other in modules.values()) > 1
        if type(modules[node]) not in first or again or not node.users:
            continue
        if all(type(modules.get(user)) is nn.ReLU for user in node.users):
            pairs[str(node.target)] = frozenset(str(user.target) for user in node.users)
    return pairs
