import math

import numpy as np
import pytest
import torch

from benchmarks.spectra import exact, gaussian, with_spectrum
from tests.op_suite import OpSpec, OpSuite, check_close
from tscnc_kernels import SparsityPattern, extreme_singular_values
from tscnc_kernels._spectral import CAP_REACHED, RANK_DEFICIENT, REFACTORED
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
    pattern = SparsityPattern.from_mask(masks[0])
    nothing = torch.empty(0, dtype=torch.int32)
    rows = [pattern.row_pointers, nothing], [pattern.columns, nothing]
    plain = (matrices, [], [], [], [], None, False, 1e-4, False, False, False)
    full = (matrices, masks, structures, *rows, state, True, 1e-4, True, True, False)
    largest = (matrices, [], [], [], [], state, False, 1e-4, False, False, True)
    sigma, left, right, block, *rest = ops.extreme_singular_values(*plain)
    backward = (torch.ones_like(sigma), matrices, [], sigma, left, right, block, rest[4])
    return [
        (ops.structural_rank.default, (masks[0],)),
        (ops.extreme_singular_values.default, plain),
        (ops.extreme_singular_values.default, full),
        (ops.extreme_singular_values.default, largest),
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


def spectra(kappa, n=96):
    one_small = np.linspace(1, 1.2, n)
    one_small[0] = 1 / kappa
    cluster = np.linspace(1, 2, n)
    cluster[:8] = np.linspace(1, 1.01, 8) / kappa
    tail = np.linspace(1, 1.5, n)
    tail[:20] = np.geomspace(1 / kappa, 1, 20)
    shapes = {"one_small": one_small, "cluster": cluster, "flat_and_tail": tail}
    return {"geometric": np.geomspace(1 / kappa, 1, n), **shapes}


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
        (ValueError, "tie_tol <= 0.999999, got 1.0", ([GOLDEN],), {"tie_tol": 1.0}),
        (TypeError, "tie_tol to be a number, got NoneType", ([GOLDEN],), {"tie_tol": None}),
        (TypeError, "patterns to be a list .* got int", ([GOLDEN], 5), {}),
        (ValueError, "got 0 patterns for 1", ([GOLDEN], []), {}),
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
