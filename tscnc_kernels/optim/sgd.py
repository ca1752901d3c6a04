"""SGD on the kept entries of masked layers."""

from typing import Any

from torch import Tensor, nn

from tscnc_kernels._checks import LARGEST, check_number
from tscnc_kernels.ops.masked_optimizer import SgdConstants, run_sgd
from tscnc_kernels.optim.masked_optimizer import (
    MaskedOptimizer,
    Params,
    Patterns,
    state_tensors,
    stepped,
)


class MaskedSGD(MaskedOptimizer):
    """torch.optim.SGD on kept entries: θ ← θ − η b, b ← μ b + (1 − τ)(g + λθ).

    Args:
        params: parameters, named parameters or parameter groups, as for torch.optim.SGD.
        lr: learning rate η ≥ 0.
        momentum: μ ≥ 0.
        dampening: τ.
        weight_decay: λ ≥ 0.
        nesterov: Nesterov's momentum.
        maximize: ascend.
        model: the module whose masked layers hold some of the parameters.

    Raises:
        ValueError: a number out of range, or two layers that share a weight under different masks.
        TypeError: arguments of other types.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        model: nn.Module,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, model)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_number("momentum", group["momentum"], 0)
        check_number("dampening", group["dampening"], -LARGEST)
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                "Nesterov's rule needs momentum and no dampening, got momentum "
                f"{group['momentum']} and dampening {group['dampening']}"
            )

    def _step(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], patterns: Patterns
    ) -> None:
        constants = SgdConstants(
            group["lr"],
            group["momentum"],
            group["dampening"],
            group["weight_decay"],
            group["nesterov"],
            group["maximize"],
        )
        if constants.momentum == 0:
            run_sgd(params, grads, [], stepped(params, patterns), constants)
            return
        states = [self.state[param] for param in params]
        empty = [state.get("momentum_buffer") is None for state in states]
        for first_step in (True, False):
            places = [place for place, first in enumerate(empty) if first == first_step]
            if not places:
                continue
            chosen = [params[place] for place in places]
            held = [states[place] for place in places]
            run_sgd(
                chosen,
                [grads[place] for place in places],
                state_tensors("momentum_buffer", held, chosen, patterns),
                stepped(chosen, patterns),
                constants._replace(first_step=first_step),
            )
