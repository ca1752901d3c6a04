"""W ∘ M in plain torch, from a dense weight or from its kept values."""

import torch
from torch import Tensor

from tscnc_kernels._apply import is_eager
from tscnc_kernels._checks import FLOATING
from tscnc_kernels.sparsity import SparsityPattern

_native = torch.ops.tscnc_kernels
_has_key = torch._C._dispatch_has_kernel_for_dispatch_key
DEVICES = {"cpu", "cuda"} if _has_key("tscnc_kernels::sparsity_mask", "CUDA") else {"cpu"}


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
        if not _is_native(weight):
            return pattern.scatter(weight)
        index = pattern.row_pointers, pattern.columns, pattern.matrix_shape[1]
        return _native.sparsity_scatter(weight.contiguous(), *index).view(pattern.shape)  # type: ignore[no-any-return]
    if held:
        return weight
    if dense_grad:
        return _KeepGradient.apply(weight, pattern.mask)  # type: ignore[no-any-return,no-untyped-call]
    return masked(weight, pattern)


def masked(matrix: Tensor, pattern: SparsityPattern, own: bool = False) -> Tensor:
    """A tensor of the mask's shape, zero off the mask even where it is not finite.

    `own` promises that nobody else reads the tensor, which may then change itself.
    """
    if not _is_native(matrix):
        return matrix.where(pattern.mask, matrix.new_zeros(()))
    if own and matrix.is_cpu and matrix.is_contiguous():
        _native.sparsity_mask_(matrix, pattern.bits)
        return matrix
    return _native.sparsity_mask(matrix.contiguous(), pattern.bits)  # type: ignore[no-any-return]


def kept_values(matrix: Tensor, pattern: SparsityPattern) -> Tensor:
    """The entries at the mask, of a tensor of the mask's shape."""
    if not _is_native(matrix):
        return pattern.gather(matrix)
    flat = matrix.reshape(pattern.matrix_shape)
    return _native.sparsity_gather(flat, pattern.row_pointers, pattern.columns)  # type: ignore[no-any-return]


def _is_native(tensor: Tensor) -> bool:
    """Whether the compiled loop may run: it needs no index tensors, but has no derivative."""
    if tensor.device.type not in DEVICES or tensor.dtype not in FLOATING:
        return False
    return is_eager() and not (torch.is_grad_enabled() and tensor.requires_grad)


@torch.library.register_fake("tscnc_kernels::sparsity_gather")
def _(matrix: Tensor, row_pointers: Tensor, columns: Tensor) -> Tensor:
    return matrix.new_empty(columns.shape)


@torch.library.register_fake("tscnc_kernels::sparsity_scatter")
def _(values: Tensor, row_pointers: Tensor, columns: Tensor, width: int) -> Tensor:
    return values.new_empty((row_pointers.shape[0] - 1, width))


@torch.library.register_fake("tscnc_kernels::sparsity_mask")
def _(matrix: Tensor, bits: Tensor) -> Tensor:
    return torch.empty_like(matrix)


@torch.library.register_fake("tscnc_kernels::sparsity_mask_")
def _(matrix: Tensor, bits: Tensor) -> None:
    pass
