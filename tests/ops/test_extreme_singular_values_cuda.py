"""What extreme_singular_values does on CUDA; its way for large matrices runs on the CPU too."""

import math

import numpy as np
import pytest
import torch

from benchmarks.spectra import exact, gaussian, with_spectrum
from tests.op_suite import check_capture, check_close
from tscnc_kernels import SparsityPattern, _spectral_large, extreme_singular_values
from tscnc_kernels._spectral import CAP_REACHED, RANK_DEFICIENT, unpack
from tscnc_kernels._spectral_cuda import extreme_singular_values as solve

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def call(matrices, masks=(), state=None, **settings):
    """The function that is registered for CUDA, with the defaults of the public op."""
    structures = [torch.ops.tscnc_kernels.structural_rank(mask) for mask in masks]
    defaults = dict(structural=False, tie_tol=1e-4, power=False, certify=False, largest_only=False)
    raw = solve(matrices, list(masks), structures, [], [], state, **(defaults | settings))
    return raw, unpack(raw, matrices, settings.get("largest_only", False))


def check_vectors(matrix, result, index, tolerance):
    a = matrix.double()
    s = exact(a)
    for sigma, u, v, expected in (
        (result.sigma_max[index], result.u_max[index], result.v_max[index], s[0]),
        (result.sigma_min[index], result.u_min[index], result.v_min[index], s[-1]),
    ):
        assert sigma.item() == pytest.approx(expected.item(), rel=tolerance)
        check_close(torch.stack([u.norm(), v.norm()]), torch.ones(2), 1e-6, "|u|, |v|")
        assert (a @ v.double() - sigma.double() * u.double()).norm() <= 1e-4 * s[0]


def test_large_and_small_matrices_come_back_in_order():
    shapes = (130, 140), (7, 5), (300, 150), (1, 4), (129, 400)
    matrices = [gaussian(*shape, seed) for seed, shape in enumerate(shapes)]
    raw, result = call(matrices, certify=True)
    for index, matrix in enumerate(matrices):
        check_vectors(matrix, result, index, 1e-5)
        s = exact(matrix)
        values = s[0], s[-1], s[0] / s[-1]
        for value, bound in zip(values, result.bounds, strict=True):
            assert bound[index, 0] <= value * (1 + 1e-9) and value <= bound[index, 1] * (1 + 1e-9)
    assert result.flags.bitwise_and(CAP_REACHED | RANK_DEFICIENT).tolist() == [0] * 5
    fakes = torch.ops.tscnc_kernels.extreme_singular_values
    expected = fakes(matrices, [], [], [], [], None, False, 1e-4, False, True, False)
    assert [part.shape for part in raw] == [part.shape for part in expected]
    assert [part.dtype for part in raw] == [part.dtype for part in expected]


@pytest.mark.parametrize("kappa", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(200, 140), (140, 140), (150, 260)])
def test_large_spectra_meet_the_promised_error(shape, kappa):
    matrix = with_spectrum(*shape, np.geomspace(1 / kappa, 1, min(shape)))
    _, result = call([matrix])
    s = exact(matrix)
    assert result.sigma_max.item() == pytest.approx(s[0].item(), rel=1e-5)
    assert result.sigma_min.item() == pytest.approx(s[-1].item(), rel=1e-3)
    assert result.flags.item() & (CAP_REACHED | RANK_DEFICIENT) == 0


@pytest.mark.parametrize("density", [0.2, 0.02, 0.006])
@pytest.mark.parametrize("transposed", [False, True])
def test_large_pruned_matrices(density, transposed):
    mask = torch.rand(180, 150, generator=torch.Generator().manual_seed(3)) < density
    mask = mask.mT.contiguous() if transposed else mask
    weight = gaussian(*mask.shape).masked_fill(~mask, math.nan)
    s = exact(weight.nan_to_num(), mask)
    numerical_rank = int((s > 1e-12 * s[0]).sum())
    _, result = call([weight], [mask], structural=True)
    assert result.rank.item() == numerical_rank
    assert result.sigma_max.item() == pytest.approx(s[0].item(), rel=1e-6)
    assert result.sigma_min.item() == pytest.approx(s[numerical_rank - 1].item(), rel=1e-3)
    assert not result.u_min[0][~mask.any(1)].any() and not result.v_max[0][~mask.any(0)].any()
    pattern = SparsityPattern.from_mask(mask)
    expected = extreme_singular_values([weight], [pattern], rank="structural")
    kinds = RANK_DEFICIENT | CAP_REACHED
    assert result.flags.item() & kinds == expected.flags.item() & kinds
    _, full = call([weight], [mask])
    assert full.rank.item() == 150
    if numerical_rank < 150:
        assert full.sigma_min.item() == 0 and full.flags.item() & RANK_DEFICIENT


def test_large_degenerate_matrices():
    spoiled, copied = gaussian(131, 130), gaussian(131, 130)
    spoiled[3, 4] = math.inf
    copied[:, 5] = copied[:, 9]
    nothing = torch.zeros(130, 140)
    raw, result = call([spoiled, copied, nothing, torch.eye(130)], certify=True)
    assert result.sigma_max.isnan().tolist() == [True, False, False, False]
    assert raw[1][:, :131].isnan().all() and raw[9][0].isnan().all()
    assert result.sigma_min[1:].tolist() == [0, 0, pytest.approx(1)]
    assert result.sigma_max[2] == 0 and not result.u_max[2].any()
    assert (result.flags & RANK_DEFICIENT).tolist() == [0, 1, 1, 0]
    assert not result.u_min[1].any() and result.v_min[1].norm() == pytest.approx(1)
    assert result.state.isfinite().all()


def test_large_largest_alone_power_and_warm_start():
    matrix = with_spectrum(200, 140, np.geomspace(1, 1e2, 140))
    s = exact(matrix)
    raw, result = call([matrix], largest_only=True)
    assert result.sigma_max.item() == pytest.approx(s[0].item(), rel=1e-6)
    assert result.sigma_min.isnan().all() and not raw[3][16:].any()
    _, result = call([matrix], power=True)
    assert result.sigma_max.item() == pytest.approx(s[0].item(), rel=1e-3)
    assert result.sigma_min.item() == pytest.approx(s[-1].item(), rel=1e-3)
    moved = matrix + 1e-3 * gaussian(200, 140)
    for state in (result.state, torch.zeros_like(result.state)):
        _, again = call([moved], state=state)
        check_vectors(moved, again, 0, 1e-5)


@pytest.mark.parametrize("passes", [False, True])
def test_warm_starts_of_large_and_small_matrices(passes):
    shapes = (300, 140), (7, 5), (140, 420), (64, 64), (130, 130)
    dtypes = torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64
    matrices = [gaussian(*shape, seed) for seed, shape in enumerate(shapes)]
    matrices = [matrix.to(dtype) for matrix, dtype in zip(matrices, dtypes, strict=True)]
    state = call(matrices)[1].state
    moved = [m + 1e-3 * gaussian(*m.shape, seed=9).to(m.dtype) for m in matrices]
    for _ in range(2):
        raw, result = call(moved, state=state, passes=passes)
        state = result.state
        for index, matrix in enumerate(moved):
            s = exact(matrix.double())
            assert result.sigma_max[index].item() == pytest.approx(s[0].item(), rel=1e-5)
            assert result.sigma_min[index].item() == pytest.approx(s[-1].item(), rel=1e-3)
            u, v = result.u_max[index], result.v_max[index]
            a, sigma = matrix.double(), result.sigma_max[index].double()
            rest = math.hypot(
                (a @ v.double() - sigma * u).norm(), (a.mT @ u.double() - sigma * v).norm()
            )
            assert rest <= 1e-3 * s[0] and u.norm().item() == pytest.approx(1)
        assert not (result.flags & CAP_REACHED).any() and (raw[8] == 1).all()


@pytest.mark.parametrize("passes", [False, True])
def test_large_degenerate_matrices_from_a_state(passes):
    spoiled, nothing, copied = gaussian(300, 140), torch.zeros(140, 300), gaussian(300, 140)
    state = call([copied] * 3)[1].state
    spoiled[3, 4] = math.nan
    copied[:, 5] = copied[:, 9]
    _, result = call([spoiled, nothing, copied], state=state, passes=passes)
    assert result.sigma_max.isnan().tolist() == [True, False, False]
    assert result.sigma_max[1] == 0 and result.sigma_min[1:].tolist() == [0, 0]
    assert (result.flags & RANK_DEFICIENT).tolist() == [0, 1, 1]
    assert result.state.isfinite().all()


def test_a_large_matrix_is_factored_for_its_smallest_end_alone(monkeypatch):
    starts = []

    def noted(a, end, *rest):
        starts.append(end)
        return space(a, end, *rest)

    space = _spectral_large._space
    monkeypatch.setattr(_spectral_large, "_space", noted)
    matrix = gaussian(300, 140)
    mask = torch.ones_like(matrix, dtype=torch.bool)
    state = call([matrix])[1].state
    assert starts == [0, 1]
    for expected, settings in (
        ([1], {}),
        ([], {"passes": True}),
        ([], {"largest_only": True}),
        ([0, 1], {"power": True}),
        ([0, 1], {"certify": True}),
    ):
        starts.clear()
        call([matrix], state=state, **settings)
        assert starts == expected, settings
    starts.clear()
    call([matrix.double()], state=state, passes=True)
    assert starts == [0, 1], "squares of float64 may leave the range of passes"
    # A null space that the pattern makes is found by the factor.
    mask[:, 3] = False
    starts.clear()
    call([matrix], [mask], state=state, passes=True, structural=True)
    assert starts == [1]


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_large_float64_range(scale):
    matrix = gaussian(150, 130, dtype=torch.float64)
    _, result = call([matrix * scale])
    s = exact(matrix)
    assert (result.sigma_max / scale).item() == pytest.approx(s[0].item(), rel=1e-6)
    assert (result.sigma_min / scale).item() == pytest.approx(s[-1].item(), rel=1e-6)


def on_gpu(matrices, dtype):
    return [matrix.to("cuda", dtype).requires_grad_() for matrix in matrices]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_and_gradients_agree_with_the_reference(dtype):
    shapes = (5, 3), (3, 7), (64, 64), (128, 300), (200, 150)
    found = []
    for backend in ("native", "reference"):
        inputs = on_gpu([gaussian(*shape) for shape in shapes], dtype)
        result = extreme_singular_values(inputs, backend=backend)
        loss = (result.sigma_max + result.sigma_min).sum()
        found.append([result.sigma_max, result.sigma_min, *torch.autograd.grad(loss, inputs)])
    for actual, expected in zip(*found, strict=True):
        check_close(actual, expected, 2e-2, "value or gradient")


@needs_gpu
@pytest.mark.parametrize("shape", [(64, 64), (200, 150)])
def test_nothing_waits_for_the_gpu_and_graphs_replay(shape):
    matrices = on_gpu([gaussian(*shape)], torch.float32)

    def step():
        result = extreme_singular_values(matrices)
        loss = (result.sigma_max / result.sigma_min).sum()
        return [result.sigma_max, *torch.autograd.grad(loss, matrices)]

    check_capture(step)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["auto", "passes"])
def test_warm_values_and_gradients_agree_with_the_reference(dtype, method):
    shapes = (5, 3), (16, 400), (64, 64), (128, 300), (512, 130), (140, 5000)
    matrices = on_gpu([gaussian(*shape) for shape in shapes], dtype)
    state = extreme_singular_values(matrices).state
    moved = [m.detach() + 1e-3 * gaussian(*m.shape, seed=9).to(m) for m in matrices]
    found = []
    for backend in ("native", "reference"):
        inputs = [matrix.clone().requires_grad_() for matrix in moved]
        result = extreme_singular_values(inputs, state=state, method=method, backend=backend)
        loss = (result.sigma_max + result.sigma_min).sum()
        found.append([result.sigma_max, result.sigma_min, *torch.autograd.grad(loss, inputs)])
        assert not (result.flags & CAP_REACHED).any()
    for actual, expected in zip(*found, strict=True):
        check_close(actual, expected, 2e-2, "value or gradient")


@needs_gpu
@pytest.mark.parametrize("ends", ["both", "max"])
def test_warm_passes_are_the_same_every_time(ends):
    matrices = on_gpu([gaussian(64, 576), gaussian(512, 4608), gaussian(1000, 512)], torch.float32)
    state = extreme_singular_values(matrices).state
    moved = [m.detach() + 1e-3 * gaussian(*m.shape, seed=9).to(m) for m in matrices]

    def step():
        return extreme_singular_values(moved, state=state, method="passes", ends=ends)

    first = step()
    for _ in range(20):
        again = step()
        for actual, expected in zip(
            again[:2] + again[-4:-1], first[:2] + first[-4:-1], strict=True
        ):
            assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


@needs_gpu
@pytest.mark.parametrize("method", ["auto", "passes"])
def test_nothing_waits_for_the_gpu_from_a_state(method):
    matrices = on_gpu([gaussian(64, 576), gaussian(300, 1000), gaussian(128, 128)], torch.float32)
    state = extreme_singular_values(matrices).state

    def step():
        result = extreme_singular_values(matrices, state=state, method=method)
        loss = (result.sigma_max / result.sigma_min).sum()
        return [result.sigma_max, *torch.autograd.grad(loss, matrices)]

    check_capture(step)
