"""Checks of arguments that several ops share; every message quotes what it got."""

import math
import numbers
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tscnc_kernels.sparsity import SparsityPattern

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Constants of a formula between these bounds keep it, and its slope, inside float32's range.
SMALLEST, LARGEST = 1e-15, 1e15


def check_number(name: str, value: float, low: float, high: float = LARGEST) -> None:
    """A Python or NumPy number in [low, high]; a tensor would lose its gradient silently.

    Raises:
        TypeError: not a real number.
        ValueError: outside the interval, or NaN.
    """
    if isinstance(value, Tensor) or not isinstance(value, numbers.Real):
        raise TypeError(f"expected {name} to be a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"expected {low:g} <= {name} <= {high:g}, got {value}")


def _is_floating(tensor: object) -> bool:
    return (
        isinstance(tensor, Tensor) and tensor.dtype in FLOATING and tensor.layout == torch.strided
    )


def check_floating(name: str, tensor: Tensor) -> None:
    """A strided tensor of a dtype in `FLOATING`.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another layout.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"expected {name} to be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(
            f"expected {name} of dtype float32, float64, bfloat16 or float16, got {tensor.dtype}"
        )
    if tensor.layout != torch.strided:
        raise ValueError(f"expected {name} to be strided, got {tensor.layout}")


def check_floating_list(name: str, tensors: Sequence[Tensor]) -> None:
    """A list of at least one tensor, all as `check_floating` wants them and on one device.

    Raises:
        TypeError: not a list, or what `check_floating` raises.
        ValueError: an empty list, several devices, or what `check_floating` raises.
    """
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(f"expected {name} to be a list of tensors, got {type(tensors).__name__}")
    if not tensors:
        raise ValueError(f"expected at least one tensor in {name}, got an empty list")
    for index, tensor in enumerate(tensors):
        # Naming every tensor costs more than looking at it.
        if not _is_floating(tensor):
            check_floating(f"{name}[{index}]", tensor)
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"expected {name} on one device, got {tensors[0].device} and {tensor.device} "
                f"at {name}[{index}]"
            )


def check_kernels(name: str, tensors: Sequence[Tensor]) -> None:
    """A list as for `check_floating_list`, of non-empty matrices or (out, in, …) kernels.

    Raises:
        TypeError: what `check_floating_list` raises.
        ValueError: fewer than two dimensions, no elements, or what `check_floating_list` raises.
    """
    check_floating_list(name, tensors)
    for index, tensor in enumerate(tensors):
        if tensor.dim() < 2 or tensor.numel() == 0:
            raise ValueError(
                f"expected {name}[{index}] to be a non-empty matrix or (out, in, …) kernel, "
                f"got shape {tuple(tensor.shape)}"
            )


def check_patterns(patterns: Sequence[SparsityPattern | None], matrices: Sequence[Tensor]) -> None:
    """A list of one pattern or None per matrix, of the matrix's shape and on its device.

    A shape of more than two dimensions counts as (shape[0], rest).

    Raises:
        TypeError: not a list of patterns.
        ValueError: another number of them, another shape or another device.
    """
    if not isinstance(patterns, Sequence):
        raise TypeError(
            f"expected patterns to be a list of SparsityPattern or None, "
            f"got {type(patterns).__name__}"
        )
    if len(patterns) != len(matrices):
        raise ValueError(
            f"expected one pattern (or None) per matrix, "
            f"got {len(patterns)} patterns for {len(matrices)} matrices"
        )
    for index, (matrix, pattern) in enumerate(zip(matrices, patterns, strict=True)):
        if pattern is None:
            continue
        if not isinstance(pattern, SparsityPattern):
            raise TypeError(
                f"expected patterns[{index}] to be a SparsityPattern or None, "
                f"got {type(pattern).__name__}"
            )
        if pattern.matrix_shape != (matrix.shape[0], math.prod(matrix.shape[1:])):
            raise ValueError(
                f"expected patterns[{index}] of shape {tuple(matrix.shape)}, got {pattern.shape}"
            )
        if pattern.device != matrix.device:
            raise ValueError(
                f"expected patterns[{index}] on {matrix.device} as its matrix, got {pattern.device}"
            )


def check_masked_operands(
    input: Tensor, weight: Tensor, bias: Tensor | None, pattern: SparsityPattern
) -> None:
    """Floating tensors of the input's dtype on the pattern's device.

    Raises:
        TypeError: another dtype, or what `check_floating` raises.
        ValueError: another device, or what `check_floating` raises.
    """
    named = {"input": input, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in named.items():
        check_floating(name, tensor)
        if tensor.dtype != input.dtype:
            raise TypeError(
                f"expected {name} of the input's dtype {input.dtype}, got {tensor.dtype}"
            )
        if tensor.device != pattern.device:
            raise ValueError(
                f"expected {name} on the pattern's device {pattern.device}, got {tensor.device}"
            )


def check_name(what: str, found: str, known: Iterable[str]) -> None:
    """One of the known names.

    Raises:
        ValueError: another one.
    """
    names = tuple(known)
    if found not in names:
        raise ValueError(f"expected {what} to be one of {', '.join(names)}, got {found!r}")
