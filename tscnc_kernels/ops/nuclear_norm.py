"""Nuclear norm of weight matrices, and its proximal map.

Formulas, with W = U Σ Vᵀ:

    ‖W‖_* = Σ σ_i,   ∂ = U Vᵀ over the σ_i > 0,   the subgradient of least norm
    prox(W) = argmin_Y ‖Y − W‖_F² / 2 + λ ‖Y‖_* = U max(Σ − λ, 0) Vᵀ

The derivative of the gradient is the polar factor's, with 1 / (σ_i + σ_j) where differentiating an
SVD has 1 / (σ_i − σ_j): repeated singular values are no trouble.

Source: Langenberg, Balda, Behboodi, Mathar, arXiv 1901.10371 (the norm as a regulariser); Cai,
Candès, Shen, arXiv 0810.3286 (the proximal map).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tscnc_kernels._checks import check_floating, check_kernels, check_number, check_patterns
from tscnc_kernels.sparsity import SparsityPattern

_UNIT = 2.0**-53


def _check_prox(input: Tensor, lambda_: float) -> None:
    check_floating("input", input)
    if input.dim() < 2 or input.numel() == 0:
        raise ValueError(
            f"expected input to be a non-empty matrix or (out, in, …) kernel, "
            f"got shape {tuple(input.shape)}"
        )
    check_number("lambda_", lambda_, 0)
    if input.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "expected a call under torch.no_grad() or a detached input: "
            "the proximal map carries no gradient, got an input that requires one"
        )


def _tall(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


def _decompose(tall: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U, σ and Vᵀ of a tall matrix, and which σ are above rounding."""
    u, s, vh = torch.linalg.svd(tall, full_matrices=False)
    return u, s, vh, s > tall.shape[0] * 2 * _UNIT * s[:1]


def reference(matrix: Tensor) -> Tensor:
    """0-d float64 sum of the singular values of a finite matrix."""
    return torch.linalg.svdvals(_tall(matrix.double())).sum()


def reference_backward(grad_output: Tensor, matrix: Tensor) -> Tensor:
    """Gradient of `reference`, itself differentiable once: U Vᵀ and its first-order change."""
    tall = _tall(matrix.double())
    u, s, vh, kept = _decompose(tall.detach())
    polar = (u * kept) @ vh
    moved = tall - tall.detach()
    inner = u.mT @ moved @ vh.mT
    sums = s[:, None] + s[None, :]
    both = kept[:, None] & kept[None, :]
    turned = torch.where(both, (inner - inner.mT) / torch.where(both, sums, 1.0), 0.0)
    outside = (moved @ vh.mT - u @ inner) * torch.where(kept, 1 / torch.where(kept, s, 1.0), 0.0)
    polar = polar + (u @ turned + outside) @ vh
    gradient = grad_output * (polar if matrix.shape[0] >= matrix.shape[1] else polar.mT)
    return gradient.to(matrix.dtype)


class NuclearNormFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        return reference(matrix)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        return reference_backward(grad_output, *ctx.saved_tensors)


def nuclear_norm(
    matrices: Sequence[Tensor], patterns: Sequence[SparsityPattern | None] | None = None
) -> Tensor:
    """Sum of the nuclear norms ‖W‖_* = Σ σ_i(W) over a list of matrices.

    Args:
        matrices: list of (rows, cols) tensors of any shapes, float32, float64, bfloat16 or float16,
            on one device. An (out, in, …) convolution kernel counts as the matrix (out, in·…), not
            as the operator of `conv_singular_values`.
        patterns: one SparsityPattern or None per matrix: the norm is that of W∘M.

    Returns:
        0-d tensor, float64 if any matrix is, else float32. NaN or infinite weights give NaN.

    Raises:
        ValueError: empty list, shapes or devices that do not fit.
        TypeError: not a list of floating tensors, or patterns that are not SparsityPatterns.

    Autograd: to second order. Autocast changes nothing.

    Source: arXiv 1901.10371.
    """
    check_kernels("matrices", matrices)
    if patterns is not None:
        check_patterns(patterns, matrices)
    exact = any(matrix.dtype == torch.float64 for matrix in matrices)
    total = matrices[0].new_zeros((), dtype=torch.float64)
    given = [None] * len(matrices) if patterns is None else patterns
    for matrix, pattern in zip(matrices, given, strict=True):
        flat = matrix.flatten(1)
        if pattern is not None:
            flat = torch.where(pattern.mask.reshape(flat.shape), flat, 0)
        finite = torch.isfinite(flat.detach()).all()
        blank = (flat * torch.where(finite, 0.0, torch.nan).to(flat.dtype)).double().sum()
        safe = torch.where(finite, flat, 0)
        norm = NuclearNormFunction.apply(safe)  # type: ignore[no-untyped-call]
        total = total + norm + blank
    return total if exact else total.float()


def nuclear_norm_prox(input: Tensor, lambda_: float) -> Tensor:
    """Proximal map argmin_Y ‖Y − W‖_F²/2 + λ‖Y‖_* of the nuclear norm: U max(Σ − λ, 0) Vᵀ.

    Args:
        input: (rows, cols) tensor W of float32, float64, bfloat16 or float16; an (out, in, …)
            convolution kernel counts as (out, in·…). To be called after the optimizer's step, under
            torch.no_grad().
        lambda_: weight λ of the norm, in [0, 1e15]; 0 is the identity.

    Returns:
        Tensor of input's shape and dtype, computed in float64; NaN where an entry is NaN or
        infinite. The pruned entries of a matrix are in general not zero afterwards.

    Raises:
        ValueError: fewer than two dimensions, no elements, λ out of range, not strided.
        TypeError: not a tensor, or a dtype that is not supported.
        RuntimeError: the input requires a gradient, which the map does not carry.

    Source: arXiv 0810.3286.
    """
    _check_prox(input, lambda_)
    if lambda_ == 0:
        return input.clone()
    matrix = input.flatten(1).double()
    finite = torch.isfinite(matrix).all()
    tall = _tall(torch.where(finite, matrix, 0.0))
    u, s, vh = torch.linalg.svd(tall, full_matrices=False)
    result = (u * (s - lambda_).clamp(min=0)) @ vh
    result = result if matrix.shape[0] >= matrix.shape[1] else result.mT
    return torch.where(finite, result, torch.nan).reshape(input.shape).to(input.dtype)
