"""Square matrices in `extreme_singular_values`: elimination in float32, and that it gives way."""

import numpy as np
import pytest
import torch

from benchmarks.spectra import exact, gaussian, with_spectrum
from tscnc_kernels import SparsityPattern, extreme_singular_values
from tscnc_kernels._spectral import CAP_REACHED, RANK_DEFICIENT

# Sides from which elimination is used from a state and from a random start, and beside them.
SIDES = [16, 17, 31, 40, 97, 256, 257, 300]


def check(matrix, mask=None, state=None, rel=1e-5, **kwargs):
    patterns = None if mask is None else [SparsityPattern.from_mask(mask)]
    result = extreme_singular_values([matrix], patterns, state, **kwargs)
    s = exact(matrix, mask)
    assert result.sigma_max.item() == pytest.approx(s[0].item(), rel=rel)
    assert result.sigma_min.item() == pytest.approx(s[-1].item(), rel=max(rel, 1e-4))
    assert result.flags.item() & (CAP_REACHED | RANK_DEFICIENT) == 0
    return result, s


def moved(matrix, seed):
    noise = gaussian(*matrix.shape, seed=seed)
    return matrix + noise * (1e-3 * matrix.norm() / noise.norm())


@pytest.mark.parametrize("side", SIDES)
def test_gaussian_squares_from_no_and_from_a_state(isa, side):
    matrix = gaussian(side, side, seed=side)
    state = None
    for step in range(4):
        result, s = check(matrix, state=state)
        u, v = result.u_min[0].double(), result.v_min[0].double()
        assert (matrix.double() @ v - result.sigma_min.double() * u).norm() <= 1e-6 * s[0]
        assert result.residual[0].max() <= 1e-2 * s[0]
        matrix, state = moved(matrix, 40 + step), result.state


@pytest.mark.parametrize("kappa", [1, 30, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("side", [60, 280])
def test_every_condition_number_that_is_promised(kappa, side):
    for sigma in (
        np.geomspace(1, 1 / kappa, side),
        np.r_[np.linspace(1.2, 1, side - 1), 1 / kappa],
        np.r_[1, np.full(side - 1, 1 / kappa)],
        np.r_[np.linspace(2, 1, side - 4), np.full(4, 1 / kappa)],
    ):
        matrix = with_spectrum(side, side, np.sort(sigma)[::-1].copy())
        state = extreme_singular_values([matrix]).state
        for start in (None, state):
            check(matrix, state=start, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("side", [48, 270])
def test_other_dtypes(isa, dtype, side):
    matrix = gaussian(side, side).to(dtype)
    result, _ = check(matrix)
    check(matrix, state=result.state)


@pytest.mark.parametrize("density", [0.1, 0.6])
@pytest.mark.parametrize("side", [90, 320])
def test_masked_squares(isa, density, side):
    mask = torch.rand(side, side, generator=torch.Generator().manual_seed(3)) < density
    matrix = gaussian(side, side)
    result, _ = check(matrix, mask)
    check(moved(matrix, 9), mask, result.state)


@pytest.mark.parametrize("side", [40, 300])
def test_tied_values_keep_all_their_vectors_from_a_state(side):
    turn, _ = torch.linalg.qr(gaussian(side, side, 3, torch.float64))
    sigma = torch.linspace(1, 2, side, dtype=torch.float64)
    sigma[:2], sigma[-3:] = 0.5, 3
    matrix = (turn * sigma).float().requires_grad_()
    state = extreme_singular_values([matrix.detach()]).state
    found = extreme_singular_values([matrix], state=state)
    (largest,) = torch.autograd.grad(found.sigma_max.sum(), matrix, retain_graph=True)
    (smallest,) = torch.autograd.grad(found.sigma_min.sum(), matrix)
    expected = torch.zeros(2, side, side, dtype=torch.float64)
    expected[0, :, -3:] = turn[:, -3:] / 3
    expected[1, :, :2] = turn[:, :2] / 2
    torch.testing.assert_close(largest.double(), expected[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(smallest.double(), expected[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", [40, 300])
def test_singular_squares_are_told(isa, side):
    matrix = gaussian(side, side)
    state = extreme_singular_values([matrix]).state
    matrix[:, 3] = matrix[:, 5]
    for start in (None, state):
        result = extreme_singular_values([matrix], state=start)
        assert result.flags.item() & RANK_DEFICIENT and result.sigma_min.item() == 0
    matrix[2, 1] = torch.nan
    assert extreme_singular_values([matrix], state=state).sigma_min.isnan().all()
    zero = extreme_singular_values([torch.zeros(side, side)], state=state)
    assert zero.sigma_max.item() == 0 and zero.flags.item() & RANK_DEFICIENT


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-9, 1e9, 1e14, 1e17])
@pytest.mark.parametrize("side", [40, 300])
def test_any_scale(side, scale):
    matrix = gaussian(side, side)
    state = extreme_singular_values([matrix]).state
    for start in (None, state):
        check(matrix * scale, state=start)


@pytest.mark.parametrize("side", [64, 300])
def test_a_state_of_another_matrix_costs_no_accuracy(side):
    state = extreme_singular_values([gaussian(side, side, seed=1)]).state
    for start in (state, torch.zeros_like(state), torch.ones_like(state)):
        result, _ = check(gaussian(side, side, seed=2), state=start)
        again = extreme_singular_values([gaussian(side, side, seed=2)], state=start)
        assert torch.equal(result.state, again.state)
        assert torch.equal(result.sigma_min, again.sigma_min)


def test_steep_layers_leave_the_tridiagonal_way_before_it_starts():
    for sigma in (np.geomspace(1, 1e-3, 300), np.r_[np.linspace(1.2, 1, 299), 3e-4]):
        for certify in (False, True):
            check(with_spectrum(700, 300, sigma), certify=certify)
