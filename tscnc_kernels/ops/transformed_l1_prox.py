"""Proximal map of the transformed l1 penalty, element-wise.

Formula, with ρ_a(|t|) = (a + 1)|t| / (a + |t|) and w = λ (a + 1):

    prox(x) = argmin_y (y − x)² / 2 + λ ρ_a(|y|)
            = 0                                                where |x| ≤ t*
            = sign(x) (|x| − (4/3)(a + |x|) sin²(asin(√s)/3))  elsewhere
    s       = 27 w a / (4 (a + |x|)³)
    t*      = w / a            if w ≤ a²/2
            = √(2 w) − a/2     otherwise

The second branch is the largest root of a cubic, usually written with (2/3)(a + |x|) cos(φ/3), φ =
arccos(1 − 2s); the form above is the same number without its cancellation.

Source: Zhang, Xin, arXiv 1412.5240; checked against brute force on random (x, λ, a).
"""

import math

import torch
from torch import Tensor

from tscnc_kernels._checks import SMALLEST, check_floating, check_number

# Below it the first two terms of the series of sin²(asin(√s)/3) are exact to 1e-15, and √s has no
# finite slope at 0.
_SMALL = 1e-8


def _check(input: Tensor, lambda_: float, a: float) -> None:
    check_floating("input", input)
    check_number("lambda_", lambda_, 0)
    check_number("a", a, SMALLEST)


def _relative_step(s: Tensor) -> Tensor:
    """(4/3) sin²(asin(√s)/3) for 0 ≤ s ≤ 1."""
    small = s < _SMALL
    angle = torch.asin(torch.where(small, 0.5, s).sqrt()) / 3
    return torch.where(small, s * (4 / 27) * (1 + s * (8 / 27)), angle.sin() ** 2 * (4 / 3))


def transformed_l1_prox(input: Tensor, lambda_: float, a: float = 1.0) -> Tensor:
    """Proximal map argmin_y (y − x)²/2 + λ ρ_a(|y|) of the transformed l1 penalty, element-wise.

    Args:
        input: floating tensor x of any shape (float32, float64, bfloat16, float16).
        lambda_: weight λ of the penalty, in [0, 1e15]; with 0 the map is the identity.
        a: shape parameter, in [1e-15, 1e15].

    Returns:
        Tensor of input's shape and dtype; half types are computed in float32. Elements with |x| up
        to the threshold are exactly 0; NaN and infinite ones give NaN.

    Raises:
        ValueError: λ or a out of range, or a tensor that is not strided.
        TypeError: not a tensor, or a dtype that is not supported.

    Autograd: any order, 0 below the threshold.

    Source: arXiv 1412.5240.
    """
    _check(input, lambda_, a)
    x = input if input.dtype == torch.float64 else input.float()
    weight = lambda_ * (a + 1)
    threshold = weight / a if weight <= a * a / 2 else math.sqrt(2 * weight) - a / 2
    zero = x.abs() <= threshold
    # Below the threshold the root may not exist: a harmless value keeps NaN out of the gradient.
    reach = a + torch.where(zero, threshold + a, x.abs())
    # The cube root first: (a + |x|)³ of a large x overflows.
    s = (((27 / 4) * weight * a) ** (1 / 3) / reach) ** 3
    step = _relative_step(s.clamp(max=1.0)) * reach
    return torch.where(zero, 0.0, x - x.sign() * step).to(input.dtype)
