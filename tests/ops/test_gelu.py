"""The fused gelu and its derivative, relative to their own size: their left tail is far below 1."""

import math

import mpmath
import pytest
import torch

from tscnc_kernels import SparsityPattern, masked_linear

ONE = SparsityPattern.from_mask(torch.ones(1, 1, dtype=torch.bool))
# Relative error promised by csrc/cpu/gelu.h, and the end of the normal range of z Phi(z).
PROMISED = {torch.float32: (5e-7, -12.9), torch.float64: (1e-15, -37.4)}


def gelu(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and derivatives out of a 1 x 1 layer of weight one."""
    column = z[:, None].clone().requires_grad_()
    output = masked_linear(
        column, torch.ones(1, 1, dtype=z.dtype), ONE, activation="gelu", algorithm="panel"
    )
    (gradient,) = torch.autograd.grad(output.sum(), column)
    return output.detach()[:, 0], gradient[:, 0]


@pytest.mark.parametrize("dtype", PROMISED, ids=str)
def test_gelu_is_accurate_in_both_tails(isa, dtype):
    tolerance, end = PROMISED[dtype]
    small = torch.logspace(-12, 0, 60, dtype=torch.float64)
    z = torch.cat([torch.linspace(end, -end, 301, dtype=torch.float64), small, -small]).to(dtype)
    values, gradients = gelu(z)
    with mpmath.workdps(40):
        for at, value, gradient in zip(
            z.tolist(), values.tolist(), gradients.tolist(), strict=True
        ):
            distribution, slope = mpmath.ncdf(at), at * mpmath.npdf(at)
            exact = at * distribution
            assert abs(value - exact) <= tolerance * abs(exact), f"gelu({at})"
            size = distribution + abs(slope)
            assert abs(gradient - distribution - slope) <= tolerance * size, f"gelu'({at})"


@pytest.mark.parametrize("dtype", PROMISED, ids=str)
def test_gelu_of_extreme_arguments(isa, dtype):
    largest = torch.finfo(dtype).max
    values, gradients = gelu(
        torch.tensor([0.0, 40.0, largest, -40.0, -largest, math.inf, math.nan], dtype=dtype)
    )
    assert values[:6].tolist() == [0.0, 40.0, largest, 0.0, 0.0, math.inf]
    assert gradients[:5].tolist() == [0.5, 1.0, 1.0, 0.0, 0.0]
    assert values[6].isnan() and gradients[6].isnan()
