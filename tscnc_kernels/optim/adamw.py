"""AdamW and Adam on the kept entries of masked layers."""

from typing import Any

import torch
from torch import Tensor, nn

from tscnc_kernels._checks import check_number
from tscnc_kernels.ops.masked_optimizer import LARGEST_BETA, AdamwConstants, run_adamw
from tscnc_kernels.optim.masked_optimizer import (
    MaskedOptimizer,
    Params,
    Patterns,
    state_tensors,
    stepped,
)


class MaskedAdamW(MaskedOptimizer):
    """torch.optim.AdamW on kept entries: θ ← (1 − ηλ) θ − η m̂ / (√v̂ + ε).

    Args:
        params: parameters, named parameters or parameter groups, as for torch.optim.AdamW.
        lr: learning rate η ≥ 0.
        betas: β₁ and β₂ in [0, 1).
        eps: ε ≥ 0.
        weight_decay: λ ≥ 0.
        amsgrad: divide by the root of the largest second moment so far.
        maximize: ascend.
        decoupled_weight_decay: False makes it torch.optim.Adam, whose decay joins the gradient.
        capturable: count steps on the parameters' device, so that a CUDA graph can replay `step`.
        model: the module whose masked layers hold some of the parameters.

    Raises:
        ValueError: a number out of range, or two layers that share a weight under different masks.
        TypeError: arguments of other types.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = True,
        capturable: bool = False,
        model: nn.Module,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "capturable": capturable,
        }
        super().__init__(params, defaults, model)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_number("eps", group["eps"], 0)
        beta1, beta2 = group["betas"]
        check_number("betas[0]", beta1, 0, LARGEST_BETA)
        check_number("betas[1]", beta2, 0, LARGEST_BETA)

    def _step(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], patterns: Patterns
    ) -> None:
        constants = AdamwConstants(
            group["lr"],
            group["betas"][0],
            group["betas"][1],
            group["eps"],
            group["weight_decay"],
            group["decoupled_weight_decay"],
            group["maximize"],
        )
        states = [self.state[param] for param in params]
        capturable = group.get("capturable", False)
        for state, param in zip(states, params, strict=True):
            if "step" not in state:
                state["step"] = torch.zeros((), device=param.device if capturable else "cpu")
        maxima = []
        if group["amsgrad"]:
            maxima = state_tensors("max_exp_avg_sq", states, params, patterns)
        run_adamw(
            params,
            grads,
            state_tensors("exp_avg", states, params, patterns),
            state_tensors("exp_avg_sq", states, params, patterns),
            maxima,
            [state["step"] for state in states],
            stepped(params, patterns),
            constants,
        )
