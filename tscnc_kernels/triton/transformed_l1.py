"""Triton kernels of transformed_l1; formula and source: tscnc_kernels/ops/transformed_l1.py.

One launch per tensor. Every program writes the float64 sum over its block to a workspace, which
torch adds up; no atomics, so results do not depend on scheduling. Nothing synchronises with the
host.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tscnc_kernels.triton import Variant

NUM_WARPS = 4
# Every thread loads four times 128 bits.
BLOCK_BYTES = 4 * 16 * 32 * NUM_WARPS


@triton.jit
def transformed_l1_kernel(
    input,
    grad,
    block_sums,
    grad_output,
    a: tl.float64,
    numel,
    WITH_VALUE: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    MATH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Value and gradient of one block; `grad_output`, if given, scales the gradient."""
    block = tl.program_id(0).to(tl.int64)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    t = tl.load(input + offsets, mask=mask, other=0.0).to(MATH)
    a = tl.full([], a, MATH)
    magnitude = tl.abs(t)
    # As in csrc/include/transformed_l1.h: dividing first keeps large arguments from overflowing.
    scale = 1.0 / (a + magnitude)
    if WITH_VALUE:
        values = (a + 1.0) * (magnitude * scale)
        tl.store(block_sums + block, tl.sum(values, axis=0).to(tl.float64))
    if WITH_GRADIENT:
        slope = (a * scale) * ((a + 1.0) * scale)
        if grad_output is not None:
            slope *= tl.load(grad_output)
        gradient = tl.where(t == 0.0, 0.0, tl.where(t < 0.0, -slope, slope))
        tl.store(grad + offsets, gradient.to(grad.dtype.element_ty), mask=mask)


def block_size(dtype: torch.dtype) -> int:
    """Elements per program."""
    return BLOCK_BYTES // dtype.itemsize


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
    first = 0
    with torch.cuda.device_of(tensors[0]):
        for index, (tensor, count) in enumerate(zip(tensors, block_counts, strict=True)):
            if count == 0:
                continue
            transformed_l1_kernel[(count,)](
                input=tensor,
                grad=None if grads is None else grads[index],
                block_sums=block_sums[first : first + count] if with_value else None,
                grad_output=grad_output,
                a=a,
                numel=tensor.numel(),
                WITH_VALUE=with_value,
                WITH_GRADIENT=grads is not None,
                MATH=tl.float64 if dtype == torch.float64 else tl.float32,
                BLOCK=block,
                num_warps=NUM_WARPS,
            )
            first += count
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
    shared: dict[str, object] = {"MATH": math, "BLOCK": block_size(dtype)}
    value = {"input": kind, "block_sums": "*fp64", "a": "fp64", "numel": "i32"}
    gradient = {"input": kind, "grad": kind, "a": "fp64", "numel": "i32"}
    options = [
        (value, {"grad": None, "grad_output": None, "WITH_VALUE": True, "WITH_GRADIENT": False}),
        (
            gradient | {"grad_output": value_kind},
            {"block_sums": None, "WITH_VALUE": False, "WITH_GRADIENT": True},
        ),
        (value | gradient, {"grad_output": None, "WITH_VALUE": True, "WITH_GRADIENT": True}),
    ]
    return [
        Variant(
            transformed_l1_kernel, arguments, constants | shared, ("numel",), num_warps=NUM_WARPS
        )
        for arguments, constants in options
    ]


VARIANTS = [
    *_variants(torch.float32, "*fp32", tl.float32),
    *_variants(torch.float64, "*fp64", tl.float64),
    *_variants(torch.bfloat16, "*bf16", tl.float32),
    *_variants(torch.float16, "*fp16", tl.float32),
]
