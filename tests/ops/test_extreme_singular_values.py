import math

import numpy as np
import pytest
import torch

from tests.op_suite import OpSpec, OpSuite, check_close
from tscnc_kernels import SparsityPattern, extreme_singular_values
from tscnc_kernels._spectral import CAP_REACHED, MAX_TIES, RANK_DEFICIENT, REFACTORED
from tscnc_kernels.ops.extreme_singular_values import reference

# σ and κ of [[1, 2], [3, 4], [5, 6]].
GOLDEN = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
GOLDEN_SIGMA = (9.52551809, 0.51430058)


def values(matrices, patterns=None, **kwargs):
    result = extreme_singular_values(matrices, patterns, **kwargs)
    return result.sigma_max, result.sigma_min


def reference_values(matrices, patterns=None, **_):
    masks = [] if patterns is None else [pattern.mask for pattern in patterns]
    return tuple(reference(matrices, masks).unbind())


def several(make):
    return ([make(5, 3), make(3, 7), make(4, 4), make(1, 5), make(6, 1), make(1, 1)],), {}


def pruned(make):
    mask = torch.arange(12 * 7).reshape(12, 7) % 3 > 0
    return ([make(12, 7)], [SparsityPattern.from_mask(mask)]), {}


def raw_calls():
    ops = torch.ops.tscnc_kernels
    matrices = [torch.randn(5, 3), torch.randn(4, 6, dtype=torch.float64)]
    masks = [torch.rand(5, 3) < 0.7, torch.empty(0, dtype=torch.bool)]
    structures = [ops.structural_rank(masks[0]), torch.empty(0, dtype=torch.int64)]
    state = torch.randn(4, 7, dtype=torch.float64)
    plain = (matrices, [], [], None, False, 1e-4, False, False)
    full = (matrices, masks, structures, state, True, 1e-4, True, True)
    sigma, left, right, block, *rest = ops.extreme_singular_values(*plain)
    backward = (torch.ones_like(sigma), matrices, [], sigma, left, right, block, rest[3])
    return [
        (ops.structural_rank.default, (masks[0],)),
        (ops.extreme_singular_values.default, plain),
        (ops.extreme_singular_values.default, full),
        (ops.extreme_singular_values_backward.default, backward),
    ]


class TestExtremeSingularValues(OpSuite):
    spec = OpSpec(
        name="extreme_singular_values",
        public=values,
        reference=reference_values,
        samples={"several": several, "pruned": pruned},
        raw_calls=raw_calls,
    )


def gaussian(rows, cols, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=generator, dtype=torch.float64).to(dtype)


def with_spectrum(rows, cols, sigma, seed=0):
    left, _ = torch.linalg.qr(gaussian(rows, len(sigma), seed, torch.float64))
    right, _ = torch.linalg.qr(gaussian(cols, len(sigma), seed + 1, torch.float64))
    return ((left * torch.as_tensor(sigma)) @ right.mT).float()


def spectra(kappa, n=96):
    one_small = np.linspace(1, 1.2, n)
    one_small[0] = 1 / kappa
    cluster = np.linspace(1, 2, n)
    cluster[:8] = np.linspace(1, 1.01, 8) / kappa
    tail = np.linspace(1, 1.5, n)
    tail[:20] = np.geomspace(1 / kappa, 1, 20)
    shapes = {"one_small": one_small, "cluster": cluster, "flat_and_tail": tail}
    return {"geometric": np.geomspace(1 / kappa, 1, n), **shapes}


def exact(matrix, mask=None):
    return torch.linalg.svdvals(matrix.double() if mask is None else matrix.double() * mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", ["auto", "power"])
def test_golden_values(isa, dtype, transposed, method):
    matrix = (GOLDEN.mT if transposed else GOLDEN).to(dtype)
    result = extreme_singular_values([matrix], method=method)
    assert result.sigma_max.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.sigma_max.item() == pytest.approx(GOLDEN_SIGMA[0], rel=1e-7)
    assert result.sigma_min.item() == pytest.approx(GOLDEN_SIGMA[1], rel=1e-7)
    assert (result.sigma_max / result.sigma_min).item() == pytest.approx(18.52130534, rel=1e-6)
    assert result.rank.tolist() == [2] and result.flags.tolist() == [0] and result.bounds is None


@pytest.mark.parametrize("kappa", [1e3, 1e5, 1e6, 1e7])
@pytest.mark.parametrize("shape", [(300, 96), (96, 300), (96, 96)])
def test_spectra_meet_the_promised_error(isa, kappa, shape):
    for name, sigma in spectra(kappa).items():
        matrix = with_spectrum(*shape, sigma)
        result = extreme_singular_values([matrix])
        s = exact(matrix)
        assert abs(result.sigma_max.item() / s[0].item() - 1) <= 1e-5, name
        assert abs(result.sigma_min.item() / s[-1].item() - 1) <= 1e-5, name
        assert result.flags.item() & (CAP_REACHED | RANK_DEFICIENT) == 0, name
        assert bool(result.flags.item() & REFACTORED) == (s[0] / s[-1] > 2e6), name


@pytest.mark.parametrize("shape", [(257, 257), (130, 600), (512, 65)])
def test_gaussian_vectors_and_residuals(shape):
    matrix = gaussian(*shape)
    result = extreme_singular_values([matrix])
    s = exact(matrix)
    ends = zip(
        (result.sigma_max, result.sigma_min),
        (result.u_max[0], result.u_min[0]),
        (result.v_max[0], result.v_min[0]),
        (s[0], s[-1]),
        strict=True,
    )
    for end, (sigma, u, v, expected) in enumerate(ends):
        assert sigma.item() == pytest.approx(expected.item(), rel=1e-5)
        check_close(u.norm(), torch.tensor(1.0), 1e-6, "|u|")
        check_close(v.norm(), torch.tensor(1.0), 1e-6, "|v|")
        right = (matrix.double() @ v.double() - sigma.double() * u.double()).norm()
        left = (matrix.double().mT @ u.double() - sigma.double() * v.double()).norm()
        assert math.hypot(left, right) == pytest.approx(result.residual[0, end].item(), abs=1e-4)
        assert result.residual[0, end] <= 0.05 * s[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odd_sizes_beyond_the_krylov_basis_match_the_reference(isa, dtype):
    matrices = [gaussian(63, 129, 1, dtype), gaussian(131, 1, 2, dtype), gaussian(77, 67, 3, dtype)]
    found = []
    for backend in ("native", "reference"):
        inputs = [matrix.clone().requires_grad_() for matrix in matrices]
        result = extreme_singular_values(inputs, backend=backend)
        loss = (result.sigma_max / result.sigma_min).sum()
        found.append([result.sigma_max, result.sigma_min, *torch.autograd.grad(loss, inputs)])
    # Without a flat spectrum's small gaps the float32 vectors would agree to 1e-6.
    tolerance = 1e-10 if dtype == torch.float64 else 2e-2
    for actual, expected in zip(*found, strict=True):
        check_close(actual, expected, tolerance, "value or gradient")


@pytest.mark.parametrize("density", [0.1, 0.05, 0.01])
@pytest.mark.parametrize("shape", [(200, 64), (64, 200), (128, 128)])
def test_pruned_matrices_equal_their_dense_product(density, shape):
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(3)) < density
    weight = gaussian(*shape).masked_fill(~mask, math.nan)
    pattern = SparsityPattern.from_mask(mask)
    s = exact(weight.nan_to_num(), mask)
    numerical_rank = int((s > 1e-12 * s[0]).sum())
    structural = extreme_singular_values([weight], [pattern], rank="structural")
    assert structural.rank.item() == numerical_rank
    assert structural.sigma_max.item() == pytest.approx(s[0].item(), rel=1e-6)
    assert structural.sigma_min.item() == pytest.approx(s[numerical_rank - 1].item(), rel=1e-4)
    assert (structural.u_min[0][~mask.any(1)] == 0).all()
    assert (structural.v_max[0][~mask.any(0)] == 0).all()
    full = extreme_singular_values([weight], [pattern], rank="full")
    assert full.rank.item() == min(shape)
    if numerical_rank < min(shape):
        assert full.sigma_min.item() == 0 and full.flags.item() & RANK_DEFICIENT
        assert (full.u_min[0] == 0).all()
    else:
        assert full.sigma_min.item() == pytest.approx(s[-1].item(), rel=1e-4)


def test_structural_rank_counts_what_any_values_can_reach():
    mask = torch.zeros(4, 5, dtype=torch.bool)
    # Rows 0 to 2 share columns 0 and 1; row 3 and column 4 are dead.
    mask[:3, :2] = True
    found = torch.ops.tscnc_kernels.structural_rank(mask)
    assert found.tolist() == [2, 1, 1, 1, 0, 1, 1, 0, 0, 0]
    scipy = pytest.importorskip("scipy.sparse")
    for seed in range(20):
        mask = torch.rand(60, 45, generator=torch.Generator().manual_seed(seed)) < 0.04
        matching = scipy.csgraph.maximum_bipartite_matching(scipy.csr_matrix(mask.numpy()))
        expected = int((matching >= 0).sum())
        assert torch.ops.tscnc_kernels.structural_rank(mask)[0].item() == expected


@pytest.mark.parametrize("rank", ["full", "structural"])
def test_all_pruned_matrix_is_zero(rank):
    weight, mask = gaussian(4, 6).requires_grad_(), torch.zeros(4, 6, dtype=torch.bool)
    result = extreme_singular_values(
        [weight], [SparsityPattern.from_mask(mask)], rank=rank, certify=True
    )
    assert result.sigma_max.item() == 0 and result.sigma_min.item() == 0
    assert result.rank.item() == (4 if rank == "full" else 0)
    assert result.flags.item() & RANK_DEFICIENT
    (result.sigma_max + result.sigma_min).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(4, 6))


@pytest.mark.parametrize("copies", ["duplicate column", "zero row", "rank one"])
def test_rank_deficiency_gives_zero_never_a_plausible_number(copies):
    matrix = gaussian(40, 30)
    if copies == "duplicate column":
        matrix[:, 4] = matrix[:, 9]
    elif copies == "zero row":
        matrix = matrix.mT.contiguous()
        matrix[5] = 0
    else:
        matrix = torch.arange(1.0, 41.0)[:, None] * torch.ones(30)
    matrix.requires_grad_()
    result = extreme_singular_values([matrix])
    assert result.sigma_min.item() == 0 and result.flags.item() & RANK_DEFICIENT
    assert (result.u_min[0] == 0).all()
    (gradient,) = torch.autograd.grad(result.sigma_min.sum(), matrix)
    assert (gradient == 0).all()


def test_a_convolution_pattern_is_taken_as_its_matrix():
    mask = torch.rand(8, 3, 2, 2, generator=torch.Generator().manual_seed(4)) < 0.5
    weight, pattern = gaussian(8, 12), SparsityPattern.from_mask(mask)
    result = extreme_singular_values([weight], [pattern])
    s = exact(weight, mask.reshape(8, 12))
    assert result.sigma_max.item() == pytest.approx(s[0].item(), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_nan_in_nan_out(bad, dtype, backend):
    matrix = gaussian(7, 5, dtype=dtype)
    matrix[2, 3] = bad
    healthy = gaussian(5, 5)
    result = extreme_singular_values([matrix, healthy], certify=True, backend=backend)
    for value in (result.sigma_max, result.sigma_min, *(bound[:, 0] for bound in result.bounds)):
        assert value[0].isnan() and value[1].isfinite()
    again = extreme_singular_values([gaussian(7, 5), healthy], state=result.state, backend=backend)
    assert again.sigma_max.isfinite().all()


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_float64_range(scale):
    matrix = gaussian(9, 6, dtype=torch.float64)
    result = extreme_singular_values([matrix * scale])
    s = exact(matrix)
    assert (result.sigma_max / scale).item() == pytest.approx(s[0].item(), rel=1e-12)
    assert (result.sigma_min / scale).item() == pytest.approx(s[-1].item(), rel=1e-12)


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


def test_power_iteration_flags_what_it_does_not_reach():
    slow = with_spectrum(300, 200, np.linspace(0.99, 1, 200))
    quick = with_spectrum(60, 40, np.geomspace(1, 1e3, 40))
    result = extreme_singular_values([slow, quick], method="power")
    assert result.flags[0].item() & CAP_REACHED and result.flags[1].item() == 0
    # Never above the largest value, never below the smallest.
    s = exact(slow)
    assert 0.99 * s[0] <= result.sigma_max[0] <= s[0] * (1 + 1e-6)
    assert result.sigma_min[0] >= s[-1] * (1 - 1e-6)
    assert result.sigma_max[1].item() == pytest.approx(exact(quick)[0].item(), rel=1e-6)
    assert result.sigma_min[1].item() == pytest.approx(exact(quick)[-1].item(), rel=1e-6)


def test_mixed_list_is_float64_and_patterns_may_be_missing():
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    matrices = [gaussian(6, 4, dtype=torch.bfloat16), gaussian(5, 5, dtype=torch.float64)]
    result = extreme_singular_values(
        matrices, [None, SparsityPattern.from_mask(mask)], rank="structural"
    )
    assert result.sigma_max.dtype == torch.float64 and result.u_max[0].dtype == torch.float64
    assert [len(u) for u in result.u_max] == [6, 5] and [len(v) for v in result.v_min] == [4, 5]
    for i, s in enumerate((exact(matrices[0]), exact(matrices[1], mask))):
        assert result.sigma_max[i].item() == pytest.approx(s[0].item(), rel=1e-12)


@pytest.mark.parametrize(
    ("error", "message", "arguments", "keywords"),
    [
        (ValueError, "empty list", ([],), {}),
        (TypeError, "list of tensors, got Tensor", (torch.zeros(2, 2),), {}),
        (TypeError, "got torch.int64", ([torch.zeros(2, 2, dtype=torch.int64)],), {}),
        (ValueError, r"shape \(0, 3\)", ([torch.zeros(0, 3)],), {}),
        (ValueError, r"shape \(3,\)", ([torch.zeros(3)],), {}),
        (ValueError, "patterns=None", ([GOLDEN],), {"rank": "structural"}),
        (ValueError, "got 'best'", ([GOLDEN],), {"rank": "best"}),
        (ValueError, "got 'qr'", ([GOLDEN],), {"method": "qr"}),
        (ValueError, "got -1", ([GOLDEN],), {"tie_tol": -1}),
        (ValueError, "got 0 for 1", ([GOLDEN], []), {}),
        (
            ValueError,
            r"got \(2, 3\)",
            ([GOLDEN], [SparsityPattern.from_mask(torch.ones(2, 3).bool())]),
            {},
        ),
        (TypeError, "got object", ([GOLDEN], [object()]), {}),
        (ValueError, r"got \(4, 3\)", ([GOLDEN], None, torch.zeros(4, 3).double()), {}),
        (TypeError, "got torch.float32", ([GOLDEN], None, torch.zeros(4, 2)), {}),
    ],
)
def test_errors_quote_what_they_got(error, message, arguments, keywords):
    with pytest.raises(error, match=message):
        extreme_singular_values(*arguments, **keywords)
