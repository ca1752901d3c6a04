"""Gram iteration: an upper bound on the spectral norm that holds in floating point.

Formula, with A₁ the weight seen tall (m × n, n ≤ m):

    A_{t+1} = A_tᵀ A_t,   B_T = ‖A_{T+1}‖_F^(2^−T) = (Σ σ_i^p)^(1/p),   p = 2^(T+1)
    σ_1 ≤ B_T ≤ r^(1/p) σ_1,   r = rank ≤ n
    ∂B_T = W S^(2^T − 1) / B_T,   S = WᵀW / B_T²

B_T is the Schatten norm of order p: each step squares σ_i / σ_1. A step is scaled by f_t = ‖A_t‖_F,
the root of the product's trace, and the scales are undone from the last one back, σ_1(A_t) =
f_t √σ_1(A_tᵀA_t / f_t²), which needs no logarithm and cannot overflow. Large products are formed by
blocks of columns, of which those below the diagonal are copies.

Rounding: everything is computed in float64, and what the products lose, at most k u ‖A_t‖_F² for a
sum of k terms, is added under each root; the result is rounded up to the weight's precision. So the
value is at least σ_1 of the weight as stored, and above the exact B_T by a relative k r u at most
(m = 4608, n = 512: 3e-10). In float32 a Gaussian weight of that shape would be charged 4 %.

Source: Delattre, Barthélemy, Araujo, Allauzen, arXiv 2305.16173 (the iteration and its gradient);
the order of the Schatten norm and the charges are worked out here.
"""

import torch
from torch import Tensor

from tscnc_kernels import _backend
from tscnc_kernels._apply import is_eager
from tscnc_kernels._checks import check_floating

_UNIT = 2.0**-53
# From there on the bound is σ_1 to float64's last digit for any rank.
_MOST_STEPS = 60
# Sides from which products by blocks of columns are faster, and their number.
_LEAST_BLOCKED, _BLOCKS = 192, 4


def _check(weight: Tensor, n_iter: int) -> None:
    check_floating("weight", weight)
    if weight.dim() < 2 or weight.numel() == 0:
        raise ValueError(
            f"expected weight to be a non-empty (…, rows, columns) tensor, "
            f"got shape {tuple(weight.shape)}"
        )
    if isinstance(n_iter, bool) or not isinstance(n_iter, int):
        raise TypeError(f"expected n_iter to be an int, got {type(n_iter).__name__}")
    if not 0 <= n_iter <= _MOST_STEPS:
        raise ValueError(f"expected 0 <= n_iter <= {_MOST_STEPS}, got {n_iter}")


def _tall(weight: Tensor) -> Tensor:
    return weight if weight.shape[-2] >= weight.shape[-1] else weight.mT


def _divisor(scale: Tensor) -> Tensor:
    """The scale as one of matrices; 1 for a matrix of zeros."""
    return torch.where(scale == 0, 1.0, scale)[..., None, None]


def _gram(matrix: Tensor) -> Tensor:
    """AᵀA."""
    n = matrix.shape[-1]
    if n < _LEAST_BLOCKED:
        return matrix.mT @ matrix
    width = -(-n // _BLOCKS)
    gram = matrix.new_empty(*matrix.shape[:-2], n, n)
    for first in range(0, n, width):
        block = matrix[..., first : first + width].mT @ matrix[..., first:]
        gram[..., first : first + width, first:] = block
        gram[..., first + width :, first : first + width] = block[..., width:].mT
    return gram


def reference(weight: Tensor, n_iter: int) -> Tensor:
    """(…) float64 bounds with the rounding charged, written for its value."""
    power = _tall(weight.double())
    size = torch.ones((), dtype=power.dtype, device=power.device)
    if weight.dtype == torch.float64:
        # Of narrower types no square leaves the range.
        size = power.abs().amax(dim=(-2, -1))
        power = power / _divisor(size)
    squares, charges = [], []
    for _ in range(n_iter):
        # The trace, the division and the roots below cost a few units beside the product's sums.
        charges.append(1.01 * (power.shape[-2] + 16) * _UNIT)
        power = _gram(power)
        squares.append(power.diagonal(dim1=-2, dim2=-1).sum(dim=-1))
        power = power / _divisor(squares[-1])
    entries = power.shape[-2] * power.shape[-1]
    bound = torch.linalg.matrix_norm(power) * (1 + (entries + 16) * _UNIT)
    for square, charge in zip(reversed(squares), reversed(charges), strict=True):
        bound = (square * (bound + charge)).sqrt() * (1 + 4 * _UNIT)
    return size * bound * (1 + 4 * _UNIT)


def _scaled(matrix: Tensor) -> Tensor:
    """The matrix over its norm as a constant."""
    return matrix / _divisor(torch.linalg.matrix_norm(matrix.detach()))


def reference_backward(grad_output: Tensor, weight: Tensor, bound: Tensor, n_iter: int) -> Tensor:
    """Gradient of the bound, itself differentiable if `bound` is.

    The bound is homogeneous, ⟨W, ∂B⟩ = B: that gives the length of the gradient, where the powers
    of the formula would multiply every rounding error of B by p.
    """
    tall = _tall(weight.double()) / _divisor(bound)
    gradient = tall
    if n_iter > 0:
        square = _scaled(_gram(tall))
        # After t rounds the power is 2^t − 1.
        power = square
        for _ in range(n_iter - 1):
            power = _scaled(square @ (power @ power))
        gradient = tall @ power
    length = (tall * gradient).sum(dim=(-2, -1))
    gradient = gradient * (grad_output / torch.where(length == 0, 1.0, length))[..., None, None]
    gradient = gradient if weight.shape[-2] >= weight.shape[-1] else gradient.mT
    return gradient.to(weight.dtype)


class GramIterationFunction(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, n_iter: int) -> Tensor:
        if is_eager() and _backend.uses_triton("gram_iteration", weight.device):
            from tscnc_kernels.triton import gram_iteration as triton

            return triton.bound(weight, n_iter)
        return reference(weight, n_iter)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        weight, ctx.n_iter = inputs
        ctx.save_for_backward(weight, output)

    @staticmethod
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        weight, bound = ctx.saved_tensors
        return reference_backward(grad_output, weight, bound, ctx.n_iter), None


def round_up(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest number of the dtype that is not below the value, with the value's gradient."""
    if dtype == value.dtype:
        return value
    nearest = value.to(dtype)
    above = torch.nextafter(nearest.detach(), torch.full_like(nearest, torch.inf))
    missing = torch.where(nearest.detach().double() < value.detach(), above - nearest.detach(), 0)
    return nearest + missing


def gram_iteration(weight: Tensor, n_iter: int = 6) -> Tensor:
    """Certified upper bound on the spectral norm of every matrix of a batch.

    B_T = (Σ σ_i^p)^(1/p), p = 2^(T+1): σ_1 ≤ B_T ≤ rank^(1/p) σ_1. What rounding may have taken is
    added, so the bound also holds for the computed value.

    Args:
        weight: (…, rows, columns) tensor of float32, float64, bfloat16 or float16; the leading
            dimensions are a batch. A convolution's operator is that of `conv_singular_values`.
        n_iter: number of steps T, in [0, 60]. 0 is the Frobenius norm; 6 is within 5 % of
            σ_1 for any matrix of rank up to 500.

    Returns:
        (…) tensor, float64 for a float64 weight, else float32. 0 for a matrix of zeros; NaN where
        the matrix holds NaN or infinite entries.

    Raises:
        ValueError: fewer than two dimensions, no elements, or n_iter out of range.
        TypeError: not a tensor, a dtype that is not supported, or n_iter that is not an int.

    Autograd: any order. Autocast changes nothing.

    Source: arXiv 2305.16173.
    """
    _check(weight, n_iter)
    with torch.autocast(weight.device.type, enabled=False):
        bound = GramIterationFunction.apply(weight, n_iter)  # type: ignore[no-untyped-call]
    return round_up(bound, torch.float64 if weight.dtype == torch.float64 else torch.float32)
