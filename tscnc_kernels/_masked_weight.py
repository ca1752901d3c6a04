"""W ∘ M in plain torch, from a dense weight or from its kept values."""

import torch
from torch import Tensor

from tscnc_kernels.sparsity import SparsityPattern


class _KeepGradient(torch.autograd.Function):
    """W ∘ M whose gradient passes the mask unchanged."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor) -> Tensor:
        return weight.where(mask, weight.new_zeros(()))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        pass

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        return grad_output, None


def masked_weight(
    weight: Tensor, pattern: SparsityPattern, dense_grad: bool = False, held: bool = False
) -> Tensor:
    """W ∘ M, zero off the mask even where W is not finite; `held` promises that a dense W is."""
    if weight.ndim == 1:
        return pattern.scatter(weight)
    if held:
        return weight
    if dense_grad:
        return _KeepGradient.apply(weight, pattern.mask)  # type: ignore[no-any-return,no-untyped-call]
    return weight.where(pattern.mask, weight.new_zeros(()))
