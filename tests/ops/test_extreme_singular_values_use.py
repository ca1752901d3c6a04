"""Gradients, warm starts and certificates of `extreme_singular_values`."""

import math

import numpy as np
import pytest
import torch

from benchmarks.spectra import exact, gaussian, with_spectrum
from tests.op_suite import check_close
from tscnc_kernels import SparsityPattern, extreme_singular_values
from tscnc_kernels._spectral import MAX_TIES


def test_tied_values_average_their_outer_products():
    diagonal = torch.tensor([3.0, 3.0, 3.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    turn, _ = torch.linalg.qr(gaussian(6, 6, 1, torch.float64))
    matrix = (torch.diag(diagonal) @ turn).requires_grad_()
    result = extreme_singular_values([matrix])
    (top,) = torch.autograd.grad(result.sigma_max.sum(), matrix, retain_graph=True)
    (bottom,) = torch.autograd.grad(result.sigma_min.sum(), matrix)
    third, half = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    third[:3], half[4:] = 1 / 3, 1 / 2
    check_close(top, torch.diag(third) @ turn, 1e-9, "top")
    check_close(bottom, torch.diag(half) @ turn, 1e-9, "bottom")


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_identity_has_finite_symmetric_gradient(backend, create_graph):
    eye = torch.eye(MAX_TIES - 3, dtype=torch.float64, requires_grad=True)
    result = extreme_singular_values([eye], backend=backend)
    log_kappa = result.sigma_max.log() - 2 * result.sigma_min.log()
    (gradient,) = torch.autograd.grad(log_kappa.sum(), eye, create_graph=create_graph)
    check_close(gradient, -eye / len(eye), 1e-12, "gradient")


def test_tie_tolerance_decides_what_is_tied():
    matrix = torch.diag(torch.tensor([2.0, 1.999, 1.0], dtype=torch.float64)).requires_grad_()
    for tie_tol, expected in ((1e-4, [1.0, 0, 0]), (1e-2, [0.5, 0.5, 0])):
        result = extreme_singular_values([matrix], tie_tol=tie_tol)
        (gradient,) = torch.autograd.grad(result.sigma_max.sum(), matrix)
        check_close(gradient.diag(), torch.tensor(expected), 1e-9, f"tie_tol={tie_tol}")


def test_gradient_is_zero_off_the_mask_and_ignores_what_lies_there():
    mask = torch.rand(30, 20, generator=torch.Generator().manual_seed(5)) < 0.4
    pattern = SparsityPattern.from_mask(mask)
    gradients = []
    for fill in (0.0, 7.0, math.nan):
        weight = gaussian(30, 20).masked_fill(~mask, fill).requires_grad_()
        result = extreme_singular_values([weight], [pattern], rank="structural")
        kappa = result.sigma_max.log() - result.sigma_min.log()
        gradients.append(torch.autograd.grad(kappa.sum(), weight)[0])
        assert (gradients[-1][~mask] == 0).all() and (gradients[-1][mask] != 0).any()
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("shape", [(200, 80), (80, 200), (150, 150)])
def test_gradient_is_the_directional_derivative(shape):
    weight = gaussian(*shape).requires_grad_()
    direction = gaussian(*shape, seed=9).double()
    result = extreme_singular_values([weight])
    kappa = result.sigma_max.log() - result.sigma_min.log()
    (gradient,) = torch.autograd.grad(kappa.sum(), weight)
    step = 1e-4 / shape[0]
    s = [exact(weight.detach().double() + sign * step * direction) for sign in (1, -1)]
    log_kappa = [(value[0] / value[-1]).log() for value in s]
    expected = (log_kappa[0] - log_kappa[1]) / (2 * step)
    actual = (gradient.double() * direction).sum()
    assert actual.item() == pytest.approx(expected.item(), rel=2e-3, abs=2e-3)


def test_warm_start_meets_the_warm_error_and_is_not_changed():
    shapes = [(160, 96), (96, 400), (128, 128)]
    matrices = [gaussian(*shape, seed=i) for i, shape in enumerate(shapes)]
    state = extreme_singular_values(matrices).state
    assert state.shape == (4, 96 + 96 + 128)
    for step in range(4):
        for i, matrix in enumerate(matrices):
            noise = gaussian(*matrix.shape, seed=100 * step + i)
            matrix += noise * (1e-3 * matrix.norm() / noise.norm())
        before = state.clone()
        result = extreme_singular_values(matrices, state=state)
        assert torch.equal(state, before) and result.state.data_ptr() != state.data_ptr()
        for i, matrix in enumerate(matrices):
            s = exact(matrix)
            assert abs(result.sigma_max[i].item() / s[0].item() - 1) <= 1e-5
            assert abs(result.sigma_min[i].item() / s[-1].item() - 1) <= 1e-3
        state = result.state


@pytest.mark.parametrize("fill", [0.0, math.nan, math.inf, 1e300])
def test_a_useless_state_does_no_harm(fill):
    matrix = gaussian(90, 70)
    state = torch.full((4, 70), fill, dtype=torch.float64)
    result = extreme_singular_values([matrix], state=state)
    s = exact(matrix)
    assert result.sigma_max.item() == pytest.approx(s[0].item(), rel=1e-5)
    assert result.sigma_min.item() == pytest.approx(s[-1].item(), rel=1e-5)


def test_removed_rows_can_turn_a_matrix_round():
    mask = torch.zeros(9, 7, dtype=torch.bool)
    mask[:4] = torch.rand(4, 7, generator=torch.Generator().manual_seed(2)) < 0.9
    pattern, weight = SparsityPattern.from_mask(mask), gaussian(9, 7).requires_grad_()
    s = exact(weight.detach(), mask)
    state = None
    for _ in range(2):
        result = extreme_singular_values([weight], [pattern], state, rank="structural")
        state = result.state
        assert result.rank.item() == 4
        assert result.sigma_min.item() == pytest.approx(s[3].item(), rel=1e-6)
        check_close(result.state[0].norm(), torch.tensor(1.0), 1e-9, "state")


@pytest.mark.parametrize("kappa", [1.5, 1e2, 1e4, 1e8])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_certified_bounds_hold(kappa, backend):
    matrices = [
        with_spectrum(*shape, np.geomspace(1 / kappa, 1, 24)) for shape in [(60, 24), (24, 24)]
    ]
    bounds = extreme_singular_values(matrices, certify=True, backend=backend).bounds
    for i, matrix in enumerate(matrices):
        s = exact(matrix)
        truth = {"sigma_max": s[0], "sigma_min": s[-1], "kappa": s[0] / s[-1]}
        for name, value in truth.items():
            lower, upper = getattr(bounds, name)[i].tolist()
            assert lower <= value.item() * (1 + 1e-6 / kappa) and value.item() <= upper, name
            if kappa <= 1e4:
                assert upper / lower - 1 <= (1e-3 if kappa <= 1e3 else 5e-2), name


def test_certified_bounds_of_a_deficient_matrix_are_honest():
    matrix = gaussian(20, 10)
    matrix[:, 3] = matrix[:, 4]
    bounds = extreme_singular_values([matrix], certify=True).bounds
    assert bounds.sigma_min[0, 0] == 0 and bounds.sigma_min[0, 1] < 1e-10
    assert bounds.kappa[0, 0] > 1e10 and bounds.kappa[0, 1] == math.inf
