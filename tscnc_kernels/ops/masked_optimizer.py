"""Optimizer steps in place, over a list of parameters, that touch only kept weights.

A parameter with a pattern is a dense weight of which the kept entries are stepped; gradient and
weight are read and written there alone, and the state (momentum, moments) has one entry per kept
weight. Parameters without one (biases, flat values, dense layers) are stepped wholly.

Formulas, element by element, with g the gradient (negated to maximize) and θ the parameter:

    SGD    g ← g + λθ;   b ← μ b + (1 − τ) g, at the first step b ← g
           θ ← θ − η (g + μ b) with Nesterov's rule, else θ ← θ − η b (η g without momentum)
    AdamW  θ ← (1 − ηλ) θ;   m ← m + (1 − β₁)(g − m),   v ← β₂ v + (1 − β₂) g²
           θ ← θ − η / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε),   AMSGrad: v's maximum in place of v
    Adam   the same with g ← g + λθ in place of the first line

Source: as torch.optim computes them; Loshchilov and Hutter, arXiv 1711.05101 (AdamW); Reddi et al.,
arXiv 1904.09237 (AMSGrad). Deviations: half types are computed in float32 and rounded once a step.

Why the state has one entry per kept weight: at 99 % a state of the weight's shape would be a
hundred times larger, and each entry a cache line of its own to fetch and write back.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tscnc_kernels import _backend
from tscnc_kernels._checks import LARGEST, check_floating, check_floating_list, check_number
from tscnc_kernels._in_place import Patterns, pattern_indices, run_in_place
from tscnc_kernels.sparsity import SparsityPattern

# Native first: benchmarks/results/*/masked_optimizer.csv.
BACKENDS = ("native", "reference")
_backend.register("masked_sgd_step", BACKENDS)
_backend.register("masked_adamw_step", BACKENDS)


class SgdConstants(NamedTuple):
    """What `masked_sgd_step` takes beside tensors, in the native op's order."""

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    first_step: bool = False


class AdamwConstants(NamedTuple):
    """What `masked_adamw_step` takes beside tensors, in the native op's order."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = True
    maximize: bool = False


LARGEST_BETA = math.nextafter(1.0, 0.0)


def _check(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: dict[str, Sequence[Tensor]],
    patterns: Patterns,
) -> None:
    check_floating_list("params", params)
    for name, tensors in {"grads": grads, **states, "patterns": patterns}.items():
        if not isinstance(tensors, Sequence):
            raise TypeError(f"expected {name} to be a list, got {type(tensors).__name__}")
        if len(tensors) != len(params):
            raise ValueError(
                f"expected {name} to hold one entry per parameter, "
                f"got {len(tensors)} for {len(params)} parameters"
            )
    for index, (param, grad, pattern) in enumerate(zip(params, grads, patterns, strict=True)):
        size = param.shape
        if pattern is not None:
            if not isinstance(pattern, SparsityPattern):
                raise TypeError(
                    f"expected patterns[{index}] to be a SparsityPattern or None, "
                    f"got {type(pattern).__name__}"
                )
            if pattern.shape != tuple(param.shape) or pattern.device != param.device:
                raise ValueError(
                    f"expected patterns[{index}] of shape {tuple(param.shape)} on {param.device} "
                    f"as its parameter, got {pattern.shape} on {pattern.device}"
                )
            size = torch.Size((pattern.nnz,))
        _check_like(f"grads[{index}]", grad, param, param.shape)
        for name, tensors in states.items():
            _check_like(f"{name}[{index}]", tensors[index], param, size)


def _check_like(name: str, tensor: Tensor, param: Tensor, shape: torch.Size) -> None:
    check_floating(name, tensor)
    if tensor.shape != shape:
        raise ValueError(f"expected {name} of shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != param.dtype:
        raise TypeError(
            f"expected {name} of its parameter's dtype {param.dtype}, got {tensor.dtype}"
        )
    if tensor.device != param.device:
        raise ValueError(
            f"expected {name} on its parameter's device {param.device}, got {tensor.device}"
        )


def _check_steps(steps: Sequence[Tensor], count: int) -> None:
    if not isinstance(steps, Sequence) or len(steps) != count:
        raise ValueError(f"expected steps to be a list of {count} tensors, one per parameter")
    for index, step in enumerate(steps):
        check_floating(f"steps[{index}]", step)
        if step.dim() != 0 or step.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"expected steps[{index}] to be a float32 or float64 scalar, "
                f"got {step.dtype} of shape {tuple(step.shape)}"
            )


def _kept(tensor: Tensor, pattern: SparsityPattern | None) -> Tensor:
    """The entries to step, in the dtype to compute in."""
    entries = tensor if pattern is None else pattern.gather(tensor)
    return entries if entries.dtype == torch.float64 else entries.float()


def _put(param: Tensor, entries: Tensor, pattern: SparsityPattern | None) -> None:
    """Writes stepped entries back; pruned ones keep what they hold."""
    entries = entries.to(param.dtype)
    if pattern is not None:
        entries = torch.where(pattern.mask, pattern.scatter(entries), param)
    param.copy_(entries)


def reference_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    patterns: Patterns,
    constants: SgdConstants,
) -> None:
    """Plain torch, in place."""
    lr, momentum, dampening, weight_decay, nesterov, maximize, first_step = constants
    for index, (param, pattern) in enumerate(zip(params, patterns, strict=True)):
        p, g = _kept(param, pattern), _kept(grads[index], pattern)
        g = -g if maximize else g
        if weight_decay != 0:
            g = g + weight_decay * p
        if momentum != 0:
            held = momentum_buffers[index]
            b = g if first_step else momentum * held.to(g.dtype) + (1 - dampening) * g
            held.copy_(b)
            g = g + momentum * b if nesterov else b
        _put(param, p - lr * g, pattern)


def reference_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    patterns: Patterns,
    constants: AdamwConstants,
) -> None:
    """Plain torch, in place."""
    lr, beta1, beta2, eps, weight_decay, decoupled, maximize = constants
    for index, (param, pattern) in enumerate(zip(params, patterns, strict=True)):
        t = steps[index].add_(1).item()
        p, g = _kept(param, pattern), _kept(grads[index], pattern)
        g = -g if maximize else g
        if decoupled:
            p = p * (1 - lr * weight_decay)
        elif weight_decay != 0:
            g = g + weight_decay * p
        m = torch.lerp(exp_avgs[index].to(g.dtype), g, 1 - beta1)
        v = beta2 * exp_avg_sqs[index].to(g.dtype) + (1 - beta2) * g * g
        exp_avgs[index].copy_(m)
        exp_avg_sqs[index].copy_(v)
        if max_exp_avg_sqs:
            v = torch.maximum(max_exp_avg_sqs[index].to(g.dtype), v)
            max_exp_avg_sqs[index].copy_(v)
        root = v.sqrt() / (1 - beta2**t) ** 0.5 + eps
        _put(param, p - lr / (1 - beta1**t) * (m / root), pattern)


@torch.library.register_fake("tscnc_kernels::masked_sgd_step")
def _(params: list[Tensor], *rest: object) -> None:
    return None


@torch.library.register_fake("tscnc_kernels::masked_adamw_step")
def _(params: list[Tensor], *rest: object) -> None:
    return None


_native = torch.ops.tscnc_kernels


def run_sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    patterns: Patterns,
    constants: SgdConstants,
    backend: str | None = None,
) -> None:
    """`masked_sgd_step` less the checks, for lists that fit by construction."""
    if _backend.select("masked_sgd_step", params[0].device, backend) == "native":
        written, rest = (params, momentum_buffers), (*pattern_indices(patterns), *constants)
        run_in_place(_native.masked_sgd_step, written, grads, patterns, *rest)
    else:
        reference_sgd(params, grads, momentum_buffers, patterns, constants)


def run_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    patterns: Patterns,
    constants: AdamwConstants,
    backend: str | None = None,
) -> None:
    """`masked_adamw_step` less the checks, for lists that fit by construction."""
    moments = exp_avgs, exp_avg_sqs, max_exp_avg_sqs
    if _backend.select("masked_adamw_step", params[0].device, backend) == "native":
        rest = steps, *pattern_indices(patterns), *constants
        run_in_place(_native.masked_adamw_step, (params, *moments), grads, patterns, *rest)
    else:
        reference_adamw(params, grads, *moments, steps, patterns, constants)


@torch.no_grad()
def masked_sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    patterns: Patterns,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first_step: bool = False,
    backend: str | None = None,
) -> None:
    """One step of SGD, in place: θ ← θ − η b with b ← μ b + (1 − τ)(g + λθ), on kept entries only.

    Args:
        params: list of tensors of any shape, float32, float64, bfloat16 or float16; changed.
        grads: list of gradients, each of its parameter's shape and dtype. Only kept positions are
            read.
        momentum_buffers: list of states, changed: the parameter's shape, or (nnz,) with a pattern;
            an empty list without momentum.
        patterns: list of SparsityPattern of the parameter's shape, or None for a parameter that is
            stepped wholly.
        lr: learning rate η ≥ 0.
        momentum: μ ≥ 0.
        dampening: τ.
        weight_decay: λ ≥ 0, the l2 penalty.
        nesterov: Nesterov's momentum.
        maximize: ascend.
        first_step: the buffers hold nothing yet: b ← g.
        backend: "native" or "reference"; None chooses.

    Returns:
        None; the parameters and their state are changed in place.

    Raises:
        ValueError: lists, shapes or devices that do not fit, or constants out of range.
        TypeError: what is not a list of tensors, or dtypes that differ.
        RuntimeError: the backend cannot run here.

    Source: torch.optim.SGD.
    """
    buffered = {"momentum_buffers": momentum_buffers} if momentum != 0 else {}
    _check(params, grads, buffered, patterns)
    check_number("lr", lr, 0)
    check_number("momentum", momentum, 0)
    check_number("dampening", dampening, -LARGEST)
    check_number("weight_decay", weight_decay, 0)
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(
            "Nesterov's rule needs momentum and no dampening, "
            f"got momentum {momentum} and dampening {dampening}"
        )
    constants = SgdConstants(lr, momentum, dampening, weight_decay, nesterov, maximize, first_step)
    buffers = momentum_buffers if buffered else []
    run_sgd(params, grads, buffers, patterns, constants, backend)


@torch.no_grad()
def masked_adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    patterns: Patterns,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = True,
    maximize: bool = False,
    backend: str | None = None,
) -> None:
    """One step of AdamW, or Adam, in place: θ ← θ − η m̂ / (√v̂ + ε), on kept entries only.

    Args:
        params: list of tensors of any shape, float32, float64, bfloat16 or float16; changed.
        grads: list of gradients, each of its parameter's shape and dtype. Only kept positions are
            read.
        exp_avgs: list of first moments, changed: the parameter's shape, or (nnz,) with a pattern.
        exp_avg_sqs: list of second moments, in the same way.
        max_exp_avg_sqs: list of their maxima for AMSGrad, in the same way; else an empty list.
        steps: list of 0-d float32 or float64 tensors, the steps done; one is added. On the CPU, or
            on the parameters' device, as a CUDA graph needs it.
        patterns: list of SparsityPattern of the parameter's shape, or None for a parameter that is
            stepped wholly.
        lr: learning rate η ≥ 0.
        betas: β₁ and β₂ in [0, 1).
        eps: ε ≥ 0.
        weight_decay: λ ≥ 0.
        decoupled_weight_decay: shrink the parameter (AdamW); else add λθ to the gradient (Adam).
        maximize: ascend.
        backend: "native" or "reference"; None chooses.

    Returns:
        None; the parameters and their state are changed in place.

    Raises:
        ValueError: lists, shapes or devices that do not fit, or constants out of range.
        TypeError: what is not a list of tensors, or dtypes that differ.
        RuntimeError: the backend cannot run here.

    Source: torch.optim.AdamW; arXiv 1711.05101; arXiv 1904.09237.
    """
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if len(max_exp_avg_sqs) > 0:
        states["max_exp_avg_sqs"] = max_exp_avg_sqs
    _check(params, grads, states, patterns)
    _check_steps(steps, len(params))
    check_number("lr", lr, 0)
    check_number("eps", eps, 0)
    check_number("weight_decay", weight_decay, 0)
    for index, beta in enumerate(betas):
        check_number(f"betas[{index}]", beta, 0, LARGEST_BETA)
    moments = exp_avgs, exp_avg_sqs, max_exp_avg_sqs
    constants = AdamwConstants(
        lr, betas[0], betas[1], eps, weight_decay, decoupled_weight_decay, maximize
    )
    run_adamw(params, grads, *moments, steps, patterns, constants, backend)
