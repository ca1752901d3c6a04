"""Warm starts of `extreme_singular_values`, and σ_max alone."""

import math

import numpy as np
import pytest
import torch

from benchmarks.spectra import exact, gaussian, with_spectrum
from tests.op_suite import check_close
from tscnc_kernels import SparsityPattern, extreme_singular_values
from tscnc_kernels._spectral import CAP_REACHED, RANK_DEFICIENT

# What is promised from a state, of σ_max and σ_min.
WARM_ERRORS = (1e-5, 1e-3)
SHAPES = [(400, 96), (96, 400), (77, 301), (96, 96)]


def flat_and_tail(n):
    sigma = np.linspace(1, 1.5, n)
    sigma[:6], sigma[-6:] = np.geomspace(2, 6, 6), np.geomspace(0.95, 0.3, 6)
    return sigma


def clustered(n):
    sigma = np.linspace(1, 2, n)
    sigma[:4], sigma[-4:] = 3 - 3e-3 * np.arange(4), 0.5 + 5e-4 * np.arange(4)
    return sigma


def make(spectrum, shape):
    if spectrum == "gaussian":
        return gaussian(*shape)
    values = flat_and_tail if spectrum == "flat and tail" else clustered
    return with_spectrum(*shape, values(min(shape)))


def walk(weight, size, steps, mask=None):
    """The weight after 1, 2, … steps of this relative size."""
    for step in range(steps):
        noise = gaussian(*weight.shape, seed=500 + step)
        if mask is not None:
            noise = noise * mask
        weight = weight + noise * (size * weight.norm() / noise.norm())
        yield weight


def check_errors(result, matrix, mask=None, ends="both"):
    s = exact(matrix, mask)
    assert abs(result.sigma_max.item() / s[0].item() - 1) <= WARM_ERRORS[0]
    if ends == "both":
        assert abs(result.sigma_min.item() / s[-1].item() - 1) <= WARM_ERRORS[1]
    assert result.flags.item() & (CAP_REACHED | RANK_DEFICIENT) == 0


@pytest.mark.parametrize("size", [1e-3, 1e-2])
@pytest.mark.parametrize("spectrum", ["gaussian", "flat and tail", "clustered"])
@pytest.mark.parametrize("ends", ["both", "max"])
def test_warm_errors_along_steps_of_the_weights(isa, ends, spectrum, size):
    for shape in SHAPES:
        weight = make(spectrum, shape)
        state = extreme_singular_values([weight], ends=ends).state
        for moved in walk(weight, size, 6):
            before = state.clone(), moved.clone()
            result = extreme_singular_values([moved], state=state, ends=ends)
            assert torch.equal(state, before[0]) and torch.equal(moved, before[1])
            check_errors(result, moved, ends=ends)
            state = result.state


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(300, 72), (72, 300)])
def test_warm_errors_of_other_dtypes(isa, dtype, shape):
    weight = gaussian(*shape)
    state = extreme_singular_values([weight.to(dtype)]).state
    for moved in walk(weight, 1e-3, 3):
        result = extreme_singular_values([moved.to(dtype)], state=state)
        check_errors(result, moved.to(dtype))
        state = result.state


@pytest.mark.parametrize("density", [0.05, 0.2, 0.6])
@pytest.mark.parametrize("shape", [(600, 64), (64, 600)])
@pytest.mark.parametrize("ends", ["both", "max"])
def test_warm_errors_of_pruned_matrices(isa, ends, shape, density):
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(1)) < density
    pattern = SparsityPattern.from_mask(mask)
    rank = "structural" if density == 0.2 else "full"
    weight = gaussian(*shape) * mask
    state = extreme_singular_values([weight], [pattern], rank=rank, ends=ends).state
    for moved in walk(weight, 1e-3, 4, mask):
        hidden = moved.masked_fill(~mask, math.nan)
        result = extreme_singular_values([hidden], [pattern], state, rank=rank, ends=ends)
        check_errors(result, moved, mask, ends)
        state = result.state


@pytest.mark.parametrize("shape", [(400, 64), (64, 400)])
def test_warm_vectors_residuals_and_gradients(shape):
    weight = gaussian(*shape)
    state = extreme_singular_values([weight]).state
    (moved,) = walk(weight, 1e-3, 1)
    moved.requires_grad_()
    result = extreme_singular_values([moved], state=state)
    w = moved.detach().double()
    for end, sigma in enumerate((result.sigma_max, result.sigma_min)):
        u = (result.u_max, result.u_min)[end][0].double()
        v = (result.v_max, result.v_min)[end][0].double()
        check_close(u.norm(), torch.tensor(1.0), 1e-6, "|u|")
        check_close(v.norm(), torch.tensor(1.0), 1e-6, "|v|")
        value = sigma.item()
        residual = math.hypot((w @ v - value * u).norm(), (w.mT @ u - value * v).norm())
        assert residual == pytest.approx(result.residual[0, end].item(), rel=1e-2, abs=1e-4)
        (gradient,) = torch.autograd.grad(sigma.sum(), moved, retain_graph=True)
        check_close(gradient, torch.outer(u, v), 1e-6, "gradient")


def test_ties_are_averaged_from_a_state_too():
    """The passes see no more than two copies: tied ends are the factorisations'."""
    values = np.linspace(1, 2, 40)
    values[:3], values[-3:] = 0.5, 3
    matrix = with_spectrum(200, 40, values).double().requires_grad_()
    cold = extreme_singular_values([matrix], tie_tol=1e-3)
    warm = extreme_singular_values([matrix], state=cold.state, tie_tol=1e-3)
    for end in ("sigma_max", "sigma_min"):
        found = [
            torch.autograd.grad(getattr(result, end).sum(), matrix, retain_graph=True)[0]
            for result in (cold, warm)
        ]
        check_close(found[1], found[0], 1e-6, end)
        # A mean over three orthonormal pairs.
        assert found[1].norm().item() == pytest.approx(1 / math.sqrt(3), rel=1e-3)


@pytest.mark.parametrize("ends", ["both", "max"])
@pytest.mark.parametrize("shape", [(300, 64), (64, 300), (80, 80)])
def test_the_state_of_another_matrix_gives_right_values(shape, ends):
    states = {
        "another matrix": extreme_singular_values([gaussian(*shape, seed=8)]).state,
        "the ends swapped": extreme_singular_values([gaussian(*shape)]).state.roll(2, 0),
        "σ_max alone": extreme_singular_values([gaussian(*shape)], ends="max").state,
        "one vector": torch.ones(4, min(shape), dtype=torch.float64),
        "nothing": torch.full((4, min(shape)), math.nan, dtype=torch.float64),
    }
    for name, state in states.items():
        result = extreme_singular_values([gaussian(*shape)], state=state, ends=ends)
        s = exact(gaussian(*shape))
        assert result.sigma_max.item() == pytest.approx(s[0].item(), rel=1e-5), name
        if ends == "both":
            assert result.sigma_min.item() == pytest.approx(s[-1].item(), rel=1e-3), name


@pytest.mark.parametrize("rows", [300, 60])
def test_a_disconnected_block_that_outgrows_the_state_is_found(rows):
    half = rows // 2
    blocks = torch.zeros(rows, 60)
    blocks[:half, :30], blocks[half:, 30:] = gaussian(half, 30), 0.8 * gaussian(half, 30, 1)
    state = extreme_singular_values([blocks]).state
    for _ in range(120):
        blocks[half:, 30:] *= 1.005
        result = extreme_singular_values([blocks], state=state)
        state = result.state
    s = exact(blocks)
    assert s[0].item() == pytest.approx(exact(blocks[half:, 30:])[0].item())
    assert result.sigma_max.item() == pytest.approx(s[0].item(), rel=1e-5)


@pytest.mark.parametrize("ends", ["both", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_nan_zeros_and_huge_entries_from_a_state(dtype, ends):
    weight = gaussian(200, 40, dtype=dtype)
    state = extreme_singular_values([weight], ends=ends).state
    for bad in (math.nan, math.inf):
        broken = weight.clone()
        broken[3, 5] = bad
        assert extreme_singular_values([broken], state=state, ends=ends).sigma_max.isnan().all()
    zero = extreme_singular_values([weight * 0], state=state, ends=ends)
    assert zero.sigma_max.item() == 0 and zero.flags.item() & RANK_DEFICIENT
    for scale in (1e-25, 1e25):
        scaled = extreme_singular_values([weight * scale], state=state, ends=ends).sigma_max
        expected = exact(weight * scale)[0].item()
        assert scaled.item() == pytest.approx(expected, rel=1e-5)


def test_same_bits_for_any_number_of_threads():
    shapes = [(300, 64), (64, 300), (90, 90), (128, 40), (40, 500)]
    matrices = [gaussian(*shape, seed=i) for i, shape in enumerate(shapes)]
    state = extreme_singular_values(matrices).state
    moved = [next(walk(matrix, 1e-3, 1)) for matrix in matrices]
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3, 1):
            torch.set_num_threads(count)
            for ends in ("both", "max"):
                found.append(extreme_singular_values(moved, state=state, ends=ends))
    finally:
        torch.set_num_threads(threads)
    for first, again in ((0, 2), (0, 4), (1, 3), (1, 5)):
        assert torch.equal(found[first].sigma_max, found[again].sigma_max)
        assert torch.equal(found[first].state, found[again].state)
        for u, same in zip(found[first].u_max, found[again].u_max, strict=True):
            assert torch.equal(u, same)


@pytest.mark.parametrize("method", ["auto", "power"])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (50, 50), (3, 2), (1, 5), (1, 1)])
def test_largest_alone_without_a_state(shape, backend, method):
    values = np.geomspace(1, 4, min(shape))
    matrix = with_spectrum(*shape, values).requires_grad_()
    result = extreme_singular_values([matrix], ends="max", backend=backend, method=method)
    assert result.sigma_max.item() == pytest.approx(exact(matrix)[0].item(), rel=1e-5)
    assert result.sigma_min.isnan().all() and not result.sigma_min.requires_grad
    assert result.u_min == () and result.v_min == ()
    assert result.residual[0, 0] < 1e-2 and result.residual[0, 1].isnan()
    assert result.flags.tolist() == [0] and result.state.isfinite().all()
    (gradient,) = torch.autograd.grad(result.sigma_max.sum(), matrix)
    u, _, vh = torch.linalg.svd(matrix.detach().double())
    tolerance = 2e-3 if method == "auto" else 2e-2
    check_close(gradient, torch.outer(u[:, 0], vh[0]), tolerance, "gradient")


def test_largest_alone_is_zero_at_dead_columns():
    mask = torch.rand(200, 30, generator=torch.Generator().manual_seed(1)) < 0.1
    mask[:, [4, 17]] = False
    pattern, weight = SparsityPattern.from_mask(mask), gaussian(200, 30)
    state = None
    for _ in range(2):
        result = extreme_singular_values([weight], [pattern], state, rank="structural", ends="max")
        state = result.state
        assert (result.v_max[0][[4, 17]] == 0).all()
        assert result.sigma_max.item() == pytest.approx(exact(weight, mask)[0].item(), rel=1e-6)
        assert result.rank.item() == 28


def test_largest_alone_refuses_certificates():
    with pytest.raises(ValueError, match=r'certify=True .* got ends="max"'):
        extreme_singular_values([gaussian(3, 3)], certify=True, ends="max")
    with pytest.raises(ValueError, match="got 'min'"):
        extreme_singular_values([gaussian(3, 3)], ends="min")
