"""Triton kernels of transformed_l1; formula and source: tscnc_kernels/ops/transformed_l1.py.

One launch for up to `TENSORS` tensors, whose addresses and sizes are its arguments. Every program
writes the float64 sum over its block to a workspace, which torch adds up; no atomics, so results do
not depend on scheduling. Nothing synchronises with the host.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tscnc_kernels.triton import Variant

NUM_WARPS = 4
# Every thread loads four times 128 bits, twice in half types, for which it would lack registers.
BLOCK_BYTES = 4 * 16 * 32 * NUM_WARPS


# Tensors of one launch.
TENSORS = 16
Types = dict[str, str | tuple[str, ...]]


@triton.jit
def block_terms(
    input,
    grad,
    offsets,
    mask,
    a,
    scale,
    WITH_VALUE: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    MATH: tl.constexpr,
):
    """Sum of the penalty over one block, whose gradient times `scale` is stored."""
    t = tl.load(input + offsets, mask=mask, other=None if mask is None else 0.0).to(MATH)
    magnitude = tl.abs(t)
    # As in csrc/include/transformed_l1.h: dividing first keeps large arguments from overflowing.
    reach = 1.0 / (a + magnitude)
    if WITH_GRADIENT:
        slope = (a * reach) * ((a + 1.0) * reach) * scale
        gradient = tl.where(t == 0.0, 0.0, tl.where(t < 0.0, -slope, slope))
        tl.store(grad + offsets, gradient.to(grad.dtype.element_ty), mask=mask)
    total = tl.full([], 0.0, MATH)
    if WITH_VALUE:
        total = tl.sum((a + 1.0) * (magnitude * reach), axis=0)
    return total


@triton.jit
def transformed_l1_kernel(
    inputs,
    grads,
    block_sums,
    grad_output,
    a: tl.float64,
    firsts,
    sizes,
    COUNT: tl.constexpr,
    WITH_VALUE: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    MATH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Value and gradient of one block of one tensor; `grad_output`, if given, scales the gradient.

    firsts: for every tensor, the blocks of those before it; `sizes` its elements. Both as `odd`.
    """
    program = tl.program_id(0)
    input, first, size = inputs[0], firsts[0], sizes[0]
    grad = grads[0] if WITH_GRADIENT else None
    for index in tl.static_range(1, COUNT):
        is_later = program * 2 + 3 >= firsts[index]
        input = tl.where(is_later, inputs[index], input)
        first = tl.where(is_later, firsts[index], first)
        size = tl.where(is_later, sizes[index], size)
        if WITH_GRADIENT:
            grad = tl.where(is_later, grads[index], grad)
    begin = (program - (first - 3) // 2).to(tl.int64) * BLOCK
    size = (size - 3) // 2
    offsets = begin + tl.arange(0, BLOCK)
    a = tl.full([], a, MATH)
    scale = tl.full([], 1.0, MATH)
    if grad_output is not None:
        scale = tl.load(grad_output).to(MATH)
    # Without a mask, whatever the size is, a thread's loads and stores are 128 bits wide.
    if begin + BLOCK <= size:
        total = block_terms(input, grad, offsets, None, a, scale, WITH_VALUE, WITH_GRADIENT, MATH)
    else:
        mask = offsets < size
        total = block_terms(input, grad, offsets, mask, a, scale, WITH_VALUE, WITH_GRADIENT, MATH)
    if WITH_VALUE:
        tl.store(block_sums + program, total.to(tl.float64))


def block_size(dtype: torch.dtype) -> int:
    """Elements per program."""
    return BLOCK_BYTES // max(dtype.itemsize, 4)


def odd(number: int) -> int:
    """A code that is neither 1 nor a multiple of 16, for each of which Triton would compile anew:
    inside a tuple nothing can switch that off.
    """
    return 2 * number + 3


def _launch(
    tensors: Sequence[Tensor],
    a: float,
    grads: Sequence[Tensor] | None,
    grad_output: Tensor | None,
    with_value: bool,
) -> Tensor:
    """Runs the kernel on every tensor. Returns the block sums, none if the value is not wanted."""
    dtype = tensors[0].dtype
    block = block_size(dtype)
    block_counts = [triton.cdiv(tensor.numel(), block) for tensor in tensors]
    block_sums = tensors[0].new_empty(sum(block_counts) if with_value else 0, dtype=torch.float64)
    filled = [index for index, count in enumerate(block_counts) if count > 0]
    first = 0
    with torch.cuda.device_of(tensors[0]):
        for begin in range(0, len(filled), TENSORS):
            chosen = filled[begin : begin + TENSORS]
            firsts = list(itertools.accumulate([block_counts[i] for i in chosen], initial=0))
            blocks = firsts[-1]
            # Whatever their number, one kernel: the last tensor fills up, from the last block on.
            padding = TENSORS - len(chosen)
            chosen += chosen[-1:] * padding
            transformed_l1_kernel[(blocks,)](
                inputs=tuple(tensors[index] for index in chosen),
                grads=None if grads is None else tuple(grads[index] for index in chosen),
                block_sums=block_sums[first : first + blocks] if with_value else None,
                grad_output=grad_output,
                a=a,
                firsts=tuple(odd(number) for number in (*firsts[:-1], *[blocks] * padding)),
                sizes=tuple(odd(tensors[index].numel()) for index in chosen),
                COUNT=TENSORS,
                WITH_VALUE=with_value,
                WITH_GRADIENT=grads is not None,
                MATH=tl.float64 if dtype == torch.float64 else tl.float32,
                BLOCK=block,
                num_warps=NUM_WARPS,
            )
            first += blocks
    return block_sums


def _value(block_sums: Tensor, dtype: torch.dtype) -> Tensor:
    return block_sums.sum().to(torch.float64 if dtype == torch.float64 else torch.float32)


def transformed_l1(tensors: Sequence[Tensor], a: float) -> Tensor:
    """Sum of ρ_a(|t|) over contiguous tensors of one dtype.

    Args:
        tensors: contiguous tensors of one dtype (float32, float64, bfloat16, float16) and device.
        a: shape parameter > 0.

    Returns:
        0-d tensor, float32 (float64 for float64 tensors).
    """
    return _value(_launch(tensors, a, None, None, with_value=True), tensors[0].dtype)


def transformed_l1_backward(
    grad_output: Tensor, tensors: Sequence[Tensor], a: float
) -> list[Tensor]:
    """Gradients of `transformed_l1`, times `grad_output`.

    Args:
        grad_output: 0-d tensor of the value's dtype.
        tensors: as for `transformed_l1`.
        a: as for `transformed_l1`.

    Returns:
        One gradient per tensor, of its shape and dtype.
    """
    grads = [torch.empty_like(tensor) for tensor in tensors]
    _launch(tensors, a, grads, grad_output.contiguous(), with_value=False)
    return grads


def transformed_l1_value_and_grad(
    tensors: Sequence[Tensor], a: float
) -> tuple[Tensor, list[Tensor]]:
    """`transformed_l1` and its gradients in one pass over memory.

    Args:
        tensors: as for `transformed_l1`.
        a: as for `transformed_l1`.

    Returns:
        The 0-d value, and one gradient per tensor.
    """
    grads = [torch.empty_like(tensor) for tensor in tensors]
    block_sums = _launch(tensors, a, grads, None, with_value=True)
    return _value(block_sums, tensors[0].dtype), grads


def _variants(dtype: torch.dtype, kind: str, math: tl.dtype) -> list[Variant]:
    value_kind = "*fp64" if dtype == torch.float64 else "*fp32"
    shared: dict[str, object] = {"MATH": math, "BLOCK": block_size(dtype), "COUNT": TENSORS}
    tensors, integers = (kind,) * TENSORS, ("i32",) * TENSORS
    always: Types = {"inputs": tensors, "a": "fp64", "firsts": integers, "sizes": integers}
    options: list[tuple[Types, dict[str, object]]] = [
        ({"block_sums": "*fp64"}, {"grads": None, "grad_output": None}),
        ({"grads": tensors, "grad_output": value_kind}, {"block_sums": None}),
        ({"block_sums": "*fp64", "grads": tensors}, {"grad_output": None}),
    ]
    return [
        Variant(
            transformed_l1_kernel,
            {**always, **arguments},
            absent
            | {"WITH_VALUE": "block_sums" in arguments, "WITH_GRADIENT": "grads" in arguments}
            | shared,
            num_warps=NUM_WARPS,
        )
        for arguments, absent in options
    ]


# Float16 differs from bfloat16 in its conversions alone.
VARIANTS = [
    *_variants(torch.float32, "*fp32", tl.float32),
    *_variants(torch.float64, "*fp64", tl.float64),
    *_variants(torch.bfloat16, "*bf16", tl.float32),
]
