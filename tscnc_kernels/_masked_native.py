"""Calls of masked_linear's raw ops with the form of the index that each algorithm reads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tscnc_kernels._feature_major import in_layout
from tscnc_kernels._masked_algorithms import SPARSE
from tscnc_kernels._masked_bitmap import BITMAP, bitmap_product, has_kernel
from tscnc_kernels._masked_semi_structured import SEMI_STRUCTURED, semi_structured_product
from tscnc_kernels.sparsity import SparsityPattern

_native = torch.ops.tscnc_kernels
# Of the raw ops; where a bitmap has no kernel, the one for few samples takes its place.
_CODES = {**SPARSE, BITMAP: SPARSE["small_batch"]}
# Features of one sample that fit into any GPU's shared memory in a half type.
_NARROW = 1 << 15


def columns_for(algorithm: str, input: Tensor, weight: Tensor, pattern: SparsityPattern) -> Tensor:
    """The columns of the kept entries, as an algorithm reads them.

    Products whose time is that of reading index and values take 16-bit columns: on the CPU those of
    one sample with kept values, on CUDA those of few samples of a half type.
    """
    if algorithm == "blocked":
        return pattern.blocked_rows
    if input.is_cuda:
        is_short = input.dtype.itemsize == 2 and pattern.matrix_shape[1] <= _NARROW
        is_narrow = algorithm != "panel" and is_short
    else:
        is_narrow = algorithm == "spmv" and weight.dim() == 1
    return pattern.narrow_columns if is_narrow else pattern.columns


def native_product(
    algorithm: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pattern: SparsityPattern,
    activation: int,
    save: bool,
    feature_major: bool = False,
) -> tuple[Tensor, Tensor]:
    """Y for a 2-d input, and Z if it has to be saved (else a tensor of no rows)."""
    if algorithm == BITMAP and has_kernel(pattern.matrix_shape, input.dtype):
        how = activation, save, feature_major
        return bitmap_product(input, weight, bias, pattern, *how)
    if algorithm == SEMI_STRUCTURED:
        found = semi_structured_product(input, weight, bias, pattern, activation, save)
        return in_layout(found[0], feature_major), in_layout(found[1], feature_major)
    kept = columns_for(algorithm, input, weight, pattern)
    codes = activation, _CODES[algorithm], save, feature_major
    return _native.masked_linear.default(  # type: ignore[no-any-return]
        input, weight, bias, pattern.row_pointers, kept, *codes
    )


def native_gradients(
    for_input: str,
    for_weight: str,
    grad_output: Tensor,
    saved: Tensor,
    input: Tensor,
    weight: Tensor,
    pattern: SparsityPattern,
    activation: int,
    needs: Sequence[bool],
) -> Sequence[Tensor]:
    """The gradients of input, weight and bias by sparse algorithms; those not needed are empty.

    A call reads one form of the index, so that a blocked direction and another are two calls.
    """
    tensors = grad_output, saved, input, weight
    blocked_input = needs[0] and for_input == "blocked"
    blocked_weight = (needs[1] or needs[2]) and for_weight == "blocked"
    if needs[0] and (needs[1] or needs[2]) and blocked_input != blocked_weight:
        rest = pattern, activation
        (first, _, _) = native_gradients(
            for_input, for_weight, *tensors, *rest, (True, False, False)
        )
        (_, *others) = native_gradients(for_input, for_weight, *tensors, *rest, (False, *needs[1:]))
        return first, *others
    rows = pattern.blocked_rows if blocked_weight else pattern.columns
    columns = pattern.blocked_columns if blocked_input else pattern.column_rows
    order = pattern.blocked_permutation if blocked_input else pattern.permutation
    index = pattern.row_pointers, rows, pattern.column_pointers, columns, order
    codes = activation, _CODES.get(for_input, 0), _CODES.get(for_weight, 0)
    return _native.masked_linear_backward.default(  # type: ignore[no-any-return]
        *tensors,
        *index,
        *codes,
        *needs,
    )
