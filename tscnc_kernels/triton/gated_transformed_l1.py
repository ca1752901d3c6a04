"""Triton kernels of gated_transformed_l1; formula: tscnc_kernels/ops/gated_transformed_l1.py.

A program takes one gate with the weights behind it, and one launch the gates of up to `TENSORS`
weights. The forward pass reads every weight once and leaves two slopes per gate; the backward pass
scales the weights by one of them. No atomics; nothing synchronises with the host.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tscnc_kernels.triton import Variant
from tscnc_kernels.triton._tiles import math_type
from tscnc_kernels.triton.transformed_l1 import TENSORS, Types, odd

NUM_WARPS = 4
# Weights that a program takes at once: 128 bits per thread in half types, twice that in float32.
BLOCK = 8 * 32 * NUM_WARPS
# Rows of as many weights as a multiple of this begin at 128 bits, in every type.
ALIGNED = 16


@triton.jit
def own_weight(tensors, firsts, widths, COUNT: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """The weight that this program's gate closes a row of, its number, the row and its length.

    firsts: for every weight, the gates of those before it; `widths`: its row's length. Both are
    coded by `odd`.
    """
    program = tl.program_id(0)
    tensor, first, width, index = tensors[0], firsts[0], widths[0], 0
    for i in tl.static_range(1, COUNT):
        is_later = program * 2 + 3 >= firsts[i]
        tensor = tl.where(is_later, tensors[i], tensor)
        first = tl.where(is_later, firsts[i], first)
        width = tl.where(is_later, widths[i], width)
        index = tl.where(is_later, i, index)
    width = (width - 3) // 2
    if IS_ALIGNED:
        width = tl.multiple_of(width, 16)
    return tensor, index, program - (first - 3) // 2, width


@triton.jit
def gated_cost_kernel(
    weights,
    log_alphas,
    values,
    slopes,
    gate_slopes,
    a: tl.float64,
    half_rho: tl.float64,
    cost: tl.float64,
    shift: tl.float64,
    firsts,
    widths,
    COUNT: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    PUBLISHED: tl.constexpr,
    MATH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The value of one gate, its derivative by log_alpha, and that by a weight over the weight."""
    weight, index, row, width = own_weight(weights, firsts, widths, COUNT, IS_ALIGNED)
    log_alpha = log_alphas[0]
    for i in tl.static_range(1, COUNT):
        log_alpha = tl.where(index == i, log_alphas[i], log_alpha)
    weight += row.to(tl.int64) * width
    sums = tl.zeros((BLOCK,), dtype=MATH)
    for begin in range(0, width, BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        w = tl.load(weight + offsets, mask=offsets < width, other=0.0).to(MATH)
        sums += w * w
    a, half_rho = tl.full([], a, MATH), tl.full([], half_rho, MATH)
    total = half_rho * tl.sum(sums, axis=0) + tl.full([], cost, MATH) * width.to(MATH)
    x = tl.load(log_alpha + row).to(MATH) - tl.full([], shift, MATH)
    e = tl.exp(-tl.abs(x))
    active = tl.where(x >= 0, 1.0, e) / (1.0 + e)
    slope_of_active = e / ((1.0 + e) * (1.0 + e))
    if PUBLISHED:
        margin = tl.full([], 1e-6, MATH)
        is_inside = (active >= margin) & (active <= 1.0 - margin)
        slope_of_active = tl.where(is_inside, slope_of_active, 0.0)
        active = tl.minimum(tl.maximum(active, margin), 1.0 - margin)
    t = active * total
    reach = a + (-t if PUBLISHED else t)
    slope = ((a + 1.0) / reach) * (a / reach)
    program = tl.program_id(0)
    tl.store(values + program, ((a + 1.0) * t / reach).to(tl.float64))
    tl.store(slopes + program, slope * active * (2.0 * half_rho))
    tl.store(gate_slopes + program, slope * total * slope_of_active)


@triton.jit
def gated_gradient_kernel(
    weights,
    gradients,
    slopes,
    grad_output,
    firsts,
    widths,
    COUNT: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    MATH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of the weights of one gate."""
    weight, index, row, width = own_weight(weights, firsts, widths, COUNT, IS_ALIGNED)
    gradient = gradients[0]
    for i in tl.static_range(1, COUNT):
        gradient = tl.where(index == i, gradients[i], gradient)
    start = row.to(tl.int64) * width
    slope = tl.load(slopes + tl.program_id(0)) * tl.load(grad_output)
    for begin in range(0, width, BLOCK):
        offsets = begin + tl.arange(0, BLOCK)
        mask = offsets < width
        scaled = tl.load(weight + start + offsets, mask=mask, other=0.0).to(MATH) * slope
        if gradient.dtype.element_ty != tl.float64:
            scaled = scaled.to(tl.float32)  # the interpreter cannot round float64 to half types
        tl.store(gradient + start + offsets, scaled.to(gradient.dtype.element_ty), mask=mask)


class Constants(NamedTuple):
    """Of the formula; `shift` is β log(−γ/ζ), and `published` the form of the published code."""

    a: float
    rho: float
    lambda_: float
    shift: float
    published: bool


class _Launch(NamedTuple):
    """Weights of one kind, padded to `TENSORS`; their gates are [begin, end) of all."""

    chosen: tuple[int, ...]
    begin: int
    end: int
    options: dict[str, object]


def _launches(weights: Sequence[Tensor], log_alphas: Sequence[Tensor]) -> Iterator[_Launch]:
    """All gates: by kind, then in the order of the list."""
    kinds: dict[tuple[torch.dtype, torch.dtype, bool], list[int]] = {}
    for index, (weight, log_alpha) in enumerate(zip(weights, log_alphas, strict=True)):
        if len(weight):
            aligned = weight[0].numel() % ALIGNED == 0 and weight.data_ptr() % ALIGNED == 0
            kinds.setdefault((weight.dtype, log_alpha.dtype, aligned), []).append(index)
    begin = 0
    for (_, _, aligned), indices in kinds.items():
        for first in range(0, len(indices), TENSORS):
            chosen = indices[first : first + TENSORS]
            counts = [len(weights[i]) for i in chosen]
            firsts = list(itertools.accumulate(counts, initial=0))
            # Whatever their number, one kernel: the last weight fills up, from the last gate on.
            padding = TENSORS - len(chosen)
            chosen += chosen[-1:] * padding
            options = {
                "firsts": tuple(odd(number) for number in (*firsts, *[firsts[-1]] * padding)[:-1]),
                "widths": tuple(odd(weights[i][0].numel()) for i in chosen),
                **_fixed(aligned),
            }
            yield _Launch(tuple(chosen), begin, begin + firsts[-1], options)
            begin += firsts[-1]


def _fixed(aligned: bool) -> dict[str, object]:
    return {"COUNT": TENSORS, "IS_ALIGNED": aligned, "BLOCK": BLOCK, "num_warps": NUM_WARPS}


def costs(
    weights: Sequence[Tensor],
    log_alphas: Sequence[Tensor],
    constants: Constants,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The value and what its gradient takes.

    Args:
        weights: contiguous (out, …) tensors of any floating dtypes.
        log_alphas: contiguous (out,) tensors.
        constants: of the formula.
        dtype: float32, or float64 if a tensor is.

    Returns:
        The 0-d value; per gate, in the order of the launches, the derivative by a weight over the
        weight, and the one by log_alpha.
    """
    gates = sum(len(weight) for weight in weights)
    values = weights[0].new_empty(gates, dtype=torch.float64)
    slopes, gate_slopes = (values.new_empty(gates, dtype=dtype) for _ in range(2))
    a, rho, lambda_, shift, published = constants
    with torch.cuda.device_of(values):
        for launch in _launches(weights, log_alphas):
            part = slice(launch.begin, launch.end)
            gated_cost_kernel[(launch.end - launch.begin,)](
                weights=tuple(weights[i] for i in launch.chosen),
                log_alphas=tuple(log_alphas[i] for i in launch.chosen),
                values=values[part],
                slopes=slopes[part],
                gate_slopes=gate_slopes[part],
                a=a,
                half_rho=rho / 2,
                cost=lambda_,
                shift=shift,
                PUBLISHED=published,
                MATH=math_type(dtype),
                **launch.options,
            )
    return values.sum().to(dtype), slopes, gate_slopes


def gradients(
    grad_output: Tensor,
    weights: Sequence[Tensor],
    log_alphas: Sequence[Tensor],
    slopes: Tensor,
    gate_slopes: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of weights and log_alphas.

    Args:
        grad_output: 0-d tensor of the slopes' dtype.
        weights: as for `costs`.
        log_alphas: as for `costs`.
        slopes: what `costs` returned.
        gate_slopes: likewise.
    """
    found = [torch.empty_like(weight) for weight in weights]
    of_gates = [torch.empty_like(log_alpha) for log_alpha in log_alphas]
    scaled = gate_slopes * grad_output
    with torch.cuda.device_of(grad_output):
        for launch in _launches(weights, log_alphas):
            gated_gradient_kernel[(launch.end - launch.begin,)](
                weights=tuple(weights[i] for i in launch.chosen),
                gradients=tuple(found[i] for i in launch.chosen),
                slopes=slopes[launch.begin : launch.end],
                grad_output=grad_output,
                MATH=math_type(slopes.dtype),
                **launch.options,
            )
            begin = launch.begin
            for i in dict.fromkeys(launch.chosen):
                of_gates[i].copy_(scaled[begin : begin + len(weights[i])])
                begin += len(weights[i])
    return found, of_gates


def gate_shift(beta: float, gamma: float, zeta: float) -> float:
    """By how much log_alpha has to exceed 0 for P(z ≠ 0) = 1/2."""
    return beta * math.log(-gamma / zeta)


def _variants(dtype: torch.dtype, kind: str, aligned: bool) -> list[Variant]:
    math_kind = "*fp64" if dtype == torch.float64 else "*fp32"
    tensors, integers = (kind,) * TENSORS, ("i32",) * TENSORS
    lists: Types = {"weights": tensors, "firsts": integers, "widths": integers}
    slopes: Types = {"slopes": math_kind}
    numbers: Types = dict.fromkeys(("a", "half_rho", "cost", "shift"), "fp64")
    fixed = _fixed(aligned) | {"MATH": math_type(dtype)}
    warps = fixed.pop("num_warps")
    assert isinstance(warps, int)
    forward: Types = {**lists, "log_alphas": tensors, "values": "*fp64", "gate_slopes": math_kind}
    backward: Types = {**lists, "gradients": tensors, "grad_output": math_kind}
    return [
        Variant(
            gated_cost_kernel,
            {**forward, **slopes, **numbers},
            fixed | {"PUBLISHED": False},
            num_warps=warps,
        ),
        Variant(gated_gradient_kernel, {**backward, **slopes}, fixed, num_warps=warps),
    ]


# Float16 differs from bfloat16 in its conversions alone.
VARIANTS = [
    *_variants(torch.float32, "*fp32", True),
    *_variants(torch.float32, "*fp32", False),
    *_variants(torch.bfloat16, "*bf16", True),
    *_variants(torch.float64, "*fp64", True),
]
