"""The tridiagonal way of `extreme_singular_values`: where it applies, and that it falls back."""

import numpy as np
import pytest
import torch

from benchmarks.spectra import exact, gaussian, with_spectrum
from tscnc_kernels import SparsityPattern, extreme_singular_values
from tscnc_kernels._spectral import CAP_REACHED


def check(matrix, rel, mask=None, **kwargs):
    patterns = None if mask is None else [SparsityPattern.from_mask(mask)]
    result = extreme_singular_values([matrix], patterns, **kwargs)
    s = exact(matrix, mask)
    assert result.sigma_max.item() == pytest.approx(s[0].item(), rel=rel)
    assert result.sigma_min.item() == pytest.approx(s[-1].item(), rel=rel)
    assert result.flags.item() & CAP_REACHED == 0
    return result, s


# Around the sizes and aspects at which fp32 sets in and ends, and the direct way ends.
@pytest.mark.parametrize(
    "shape", [(31, 80), (32, 41), (33, 90), (256, 256), (257, 700), (645, 900)]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_sizes_around_the_limits(shape, transposed):
    matrix = gaussian(*shape)
    check(matrix.mT.contiguous() if transposed else matrix, 3e-6)


@pytest.mark.parametrize("kappa", [1, 5, 19, 21, 200, 3e4])
def test_condition_numbers_around_the_limit_of_float32(isa, kappa):
    for name, sigma in {
        "geometric": np.geomspace(1 / kappa, 1, 70),
        "one small": np.r_[1 / kappa, np.linspace(1, 1.2, 69)],
        "flat": np.r_[np.full(69, 1 / kappa), 1],
    }.items():
        result, s = check(with_spectrum(300, 70, sigma), 3e-6)
        assert result.residual[0].max() <= 1e-3 * s[0], name


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-10, 1e10, 1e17])
def test_squares_beyond_float32_are_summed_in_float64(isa, scale):
    check(gaussian(50, 160) * scale, 3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.1, 0.6])
@pytest.mark.parametrize("shape", [(60, 700), (700, 60)])
def test_masked_matrices_in_float32(isa, dtype, density, shape):
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(6)) < density
    check(gaussian(*shape, dtype=dtype), 3e-6, mask)


def test_repeated_values_keep_all_their_vectors():
    turn, _ = torch.linalg.qr(gaussian(120, 40, 3, torch.float64))
    for copies in (2, 3):
        sigma = torch.linspace(1, 2, 40, dtype=torch.float64)
        sigma[-copies:] = 3
        matrix = (turn * sigma).requires_grad_()
        found = extreme_singular_values([matrix])
        (gradient,) = torch.autograd.grad(found.sigma_max.sum(), matrix)
        expected = torch.zeros_like(turn)
        expected[:, -copies:] = turn[:, -copies:] / copies
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(130, 600), (48, 48), (300, 900)])
def test_bounds_hold_where_float32_would_do(shape):
    result, s = check(gaussian(*shape), 3e-6, certify=True)
    for bound, value in ((result.bounds.sigma_max, s[0]), (result.bounds.sigma_min, s[-1])):
        lower, upper = bound[0].tolist()
        assert lower <= value.item() * (1 + 1e-12) and value.item() <= upper * (1 + 1e-12)
        assert upper / lower - 1 <= 5e-2
