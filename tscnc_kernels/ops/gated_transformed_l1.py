"""Transformed l1 of the expected cost of gated weights: the TSC regulariser.

Formula, for output channel o with weights W_o and hard concrete gate log_alpha_o:

    π_o   = P(z_o ≠ 0) = sigmoid(log_alpha_o − β log(−γ/ζ))
    t_o   = π_o Σ_{w ∈ W_o} (ρ/2 w² + λ)
    value = Σ_o ρ_a(t_o),   ρ_a(t) = (a + 1) t / (a + t)

t_o is the expected negative log prior of the channel, with prior precision ρ = N · weight decay for
N training samples.

Source: arXiv 2503.20454 as implemented. The published code passes −t_o, whose value (a + 1) t / (a
− t) has a pole at t = a and is negative beyond; `repo_compat` gives that.

Where Triton runs on CUDA, one launch reads all weights and one scales them for the gradient;
elsewhere this is plain torch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tscnc_kernels import _backend
from tscnc_kernels._apply import is_eager
from tscnc_kernels._checks import SMALLEST, check_floating_list, check_number
from tscnc_kernels.ops.hard_concrete import _check_constants, hard_concrete_active_probability

# The published code keeps probabilities this far from 0 and 1.
_PROBABILITY_MARGIN = 1e-6


def _check(
    weights: Sequence[Tensor], log_alphas: Sequence[Tensor], a: float, rho: float, lambda_: float
) -> None:
    check_floating_list("weights", weights)
    check_floating_list("log_alphas", log_alphas)
    if len(weights) != len(log_alphas):
        raise ValueError(
            f"expected as many weights as log_alphas, got {len(weights)} and {len(log_alphas)}"
        )
    if weights[0].device != log_alphas[0].device:
        raise ValueError(
            f"expected log_alphas on the weights' device {weights[0].device}, "
            f"got {log_alphas[0].device}"
        )
    for index, (weight, log_alpha) in enumerate(zip(weights, log_alphas, strict=True)):
        if weight.dim() < 1 or log_alpha.shape != weight.shape[:1]:
            raise ValueError(
                f"expected log_alphas[{index}] of shape {tuple(weight.shape[:1])} "
                f"for a weight of shape {tuple(weight.shape)}, got {tuple(log_alpha.shape)}"
            )
    check_number("a", a, SMALLEST)
    check_number("rho", rho, 0)
    check_number("lambda_", lambda_, 0)


class Constants(NamedTuple):
    """What the formula depends on beside its tensors."""

    a: float
    rho: float
    lambda_: float
    repo_compat: bool
    beta: float
    gamma: float
    zeta: float


def _value_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    is_double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if is_double else torch.float32


def reference(
    weights: Sequence[Tensor], log_alphas: Sequence[Tensor], constants: Constants
) -> Tensor:
    """Plain torch, differentiable to any order."""
    a, rho, lambda_, repo_compat, *gate = constants
    beta, gamma, zeta = gate
    dtype = _value_dtype([*weights, *log_alphas])
    sign = -1 if repo_compat else 1
    total = torch.zeros((), dtype=dtype, device=weights[0].device)
    for weight, log_alpha in zip(weights, log_alphas, strict=True):
        active = hard_concrete_active_probability(
            log_alpha.to(dtype), beta=beta, gamma=gamma, zeta=zeta
        )
        if repo_compat:
            active = active.clamp(_PROBABILITY_MARGIN, 1 - _PROBABILITY_MARGIN)
        width = math.prod(weight.shape[1:])
        squares = weight.to(dtype).reshape(weight.shape[0], width).square().sum(1)
        t = active * (rho / 2 * squares + lambda_ * width)
        total = total + ((a + 1) * t / (a + sign * t)).sum()
    return total


class GatedTransformedL1Function(torch.autograd.Function):
    """By Triton's kernels. Tensors are the weights, then as many log_alphas."""

    @staticmethod
    def forward(ctx, constants, *tensors):  # type: ignore[no-untyped-def]
        from tscnc_kernels.triton import gated_transformed_l1 as triton

        a, rho, lambda_, repo_compat, *gate = constants
        shift = triton.gate_shift(*gate)
        contiguous = [tensor.contiguous() for tensor in tensors]
        middle = len(tensors) // 2
        value, *slopes = triton.costs(
            contiguous[:middle],
            contiguous[middle:],
            triton.Constants(a, rho, lambda_, shift, repo_compat),
            _value_dtype(tensors),
        )
        ctx.constants = constants
        ctx.save_for_backward(*slopes, *tensors)
        return value

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        slopes, gate_slopes, *tensors = ctx.saved_tensors
        middle = len(tensors) // 2
        if torch.is_grad_enabled():
            wanted = [t for t in tensors if t.requires_grad]
            value = reference(tensors[:middle], tensors[middle:], ctx.constants)
            found = iter(torch.autograd.grad(value, wanted, grad_output, create_graph=True))
            return None, *(next(found) if t.requires_grad else None for t in tensors)
        from tscnc_kernels.triton import gated_transformed_l1 as triton

        contiguous = [tensor.contiguous() for tensor in tensors]
        of_weights, of_gates = triton.gradients(
            grad_output.contiguous(), contiguous[:middle], contiguous[middle:], slopes, gate_slopes
        )
        return None, *of_weights, *of_gates


def gated_transformed_l1(
    weights: Sequence[Tensor],
    log_alphas: Sequence[Tensor],
    *,
    a: float = 100.0,
    rho: float,
    lambda_: float = 1e-3,
    repo_compat: bool = False,
    beta: float = 2 / 3,
    gamma: float = -0.1,
    zeta: float = 1.1,
) -> Tensor:
    """Sum over all gates of ρ_a(t_o), t_o the expected cost of the weights behind gate o.

    t_o = P(z_o ≠ 0) Σ (ρ/2 w² + λ), ρ_a(t) = (a + 1) t / (a + t).

    Args:
        weights: list of (out, …) floating tensors; a gate closes one slice of the first dimension.
            For gates on the input units of a linear layer pass weight.mT.
        log_alphas: list of (out,) gate parameters, one tensor per weight.
        a: shape parameter of the transformed l1, in [1e-15, 1e15].
        rho: prior precision, in [0, 1e15].
        lambda_: prior cost of an active weight, in [0, 1e15].
        repo_compat: the published value (a + 1) t / (a − t), with P clamped to [1e-6, 1 − 1e-6].
        beta: temperature of the gates, in [1e-15, 1e15].
        gamma: lower end of their stretched range, in [-1e15, -1e-15].
        zeta: upper end, in [1.000001, 1e15].

    Returns:
        0-d tensor, float32 (float64 if any tensor is). The published loss divides it by N. NaN
        where the squares of a weight overflow.

    Raises:
        ValueError: lists of different or zero length, gates that do not fit a weight, constants out
            of range.
        TypeError: not lists of floating tensors.

    Autograd: any order. Autocast does not change the dtype.

    Source: arXiv 2503.20454 as implemented.
    """
    _check(weights, log_alphas, a, rho, lambda_)
    constants = Constants(a, rho, lambda_, repo_compat, beta, gamma, zeta)
    _check_constants(beta, gamma, zeta)
    if is_eager() and _backend.uses_triton("gated_transformed_l1", weights[0].device):
        return GatedTransformedL1Function.apply(constants, *weights, *log_alphas)  # type: ignore[no-any-return,no-untyped-call]
    return reference(weights, log_alphas, constants)
