"""The CUDA kernel of extreme_singular_values, run on the CPU by the emulation."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.spectra import exact, gaussian, with_spectrum
from tests.cuda.spectral_calls import make_problem, solve
from tests.cuda_emulation.library import EmulatedLibrary, EmulationError
from tests.op_suite import check_close
from tscnc_kernels import SparsityPattern
from tscnc_kernels._spectral import CAP_REACHED, MAX_TIES, RANK_DEFICIENT, SHIFTED, Raw

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Relative error of sigma: float64 to rounding, narrower types far inside the promised 1e-3.
TOLERANCES = {dtype: 1e-9 for dtype in DTYPES} | {torch.float64: 1e-12}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> EmulatedLibrary:
    source = Path(__file__).parent / "extreme_singular_values_emulated.cpp"
    return EmulatedLibrary(source, tmp_path_factory.mktemp("extreme_singular_values"))


def check_matrix(
    raw: Raw, index: int, matrices: Sequence[Tensor], mask: Tensor | None = None
) -> None:
    """Values, vectors and residuals of one matrix of a call, beside its SVD."""
    sigma, left, right, _, _, rank, residual, flags, *_ = raw
    places = [sum(m.shape[side] for m in matrices[:index]) for side in (0, 1)]
    matrix = matrices[index]
    rows, cols = matrix.shape
    a = matrix.double() if mask is None else torch.where(mask, matrix.double(), 0.0)
    s = exact(a)
    tolerance = TOLERANCES[matrix.dtype]
    for end, expected in enumerate((s[0], s[rank[index] - 1])):
        u = left[end, places[0] : places[0] + rows]
        v = right[end, places[1] : places[1] + cols]
        value = sigma[end, index]
        check_close(value, expected, tolerance, "sigma")
        check_close(torch.stack([u.norm(), v.norm()]), torch.ones(2).double(), 1e-9, "|u|, |v|")
        rest = math.hypot((a @ v - value * u).norm(), (a.mT @ u - value * v).norm())
        assert rest == pytest.approx(residual[index, end].item(), abs=1e-11 * s[0].item())
        assert rest <= 1e-3 * s[0]
    assert flags[index] & (CAP_REACHED | (0 if mask is not None else RANK_DEFICIENT)) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_list_of_small_matrices_in_one_launch(
    library: EmulatedLibrary, dtype: torch.dtype
) -> None:
    shapes = (5, 3), (3, 7), (1, 1), (2, 2), (1, 5), (6, 1), (31, 17), (20, 33)
    matrices = [gaussian(*shape, dtype=dtype) for shape in shapes]
    raw = solve(library, make_problem(matrices), every_order=dtype == torch.float32)
    for index in range(len(matrices)):
        check_matrix(raw, index, matrices)
    assert raw[8].max() == 1


@pytest.mark.parametrize("shape", [(64, 64), (130, 100), (127, 127), (128, 128), (128, 200)])
def test_sizes_up_to_the_largest(library: EmulatedLibrary, shape: tuple[int, int]) -> None:
    matrices = [gaussian(*shape)]
    check_matrix(solve(library, make_problem(matrices)), 0, matrices)


def test_more_matrices_than_one_launch_takes(library: EmulatedLibrary) -> None:
    matrices = [gaussian(1 + index % 3, 2, index) for index in range(83)]
    raw = solve(library, make_problem(matrices))
    for index in range(len(matrices)):
        check_matrix(raw, index, matrices)


@pytest.mark.parametrize("kappa", [1e3, 1e6, 1e7])
@pytest.mark.parametrize("shape", [(40, 96), (70, 40)])
def test_badly_conditioned_spectra(
    library: EmulatedLibrary, shape: tuple[int, int], kappa: float
) -> None:
    n = min(shape)
    tail = np.linspace(1, 1.5, n)
    tail[:10] = np.geomspace(1 / kappa, 1, 10)
    matrices = [
        with_spectrum(*shape, spectrum) for spectrum in (np.geomspace(1 / kappa, 1, n), tail)
    ]
    sigma, *_, flags, _, _ = solve(library, make_problem(matrices))
    for index, matrix in enumerate(matrices):
        s = exact(matrix)
        assert sigma[0, index].item() == pytest.approx(s[0].item(), rel=1e-6)
        assert sigma[1, index].item() == pytest.approx(s[-1].item(), rel=1e-5)
        assert flags[index] == 0


def test_what_the_gram_matrix_cannot_resolve_is_flagged(library: EmulatedLibrary) -> None:
    matrix = with_spectrum(40, 30, np.geomspace(1e-10, 1, 30)).double()
    *_, flags, _, _ = solve(library, make_problem([matrix]))
    assert flags[0] & (CAP_REACHED | RANK_DEFICIENT)


@pytest.mark.parametrize("copies", ["duplicate column", "zero row", "rank one"])
def test_rank_deficiency_gives_zero(library: EmulatedLibrary, copies: str) -> None:
    matrix = gaussian(24, 18)
    if copies == "duplicate column":
        matrix[:, 4] = matrix[:, 9]
    elif copies == "zero row":
        matrix = matrix.mT.contiguous()
        matrix[5] = 0
    else:
        matrix = torch.arange(1.0, 25.0)[:, None] * torch.ones(18)
    sigma, left, right, *_, residual, flags, _, _ = solve(library, make_problem([matrix]))
    assert sigma[1, 0] == 0 and residual[0, 1] == 0
    assert flags[0] == RANK_DEFICIENT | SHIFTED
    assert not left[1].any()
    assert sigma[0, 0].item() == pytest.approx(exact(matrix)[0].item(), rel=1e-9)
    if matrix.shape[0] >= matrix.shape[1]:
        assert (matrix.double() @ right[1]).norm() <= 1e-12 * sigma[0, 0]
    else:
        assert not right.any(dim=1)[1]


@pytest.mark.parametrize("density", [0.3, 0.1, 0.04])
@pytest.mark.parametrize("transposed", [False, True])
def test_pruned_matrices(library: EmulatedLibrary, transposed: bool, density: float) -> None:
    mask = torch.rand(50, 33, generator=torch.Generator().manual_seed(3)) < density
    mask = mask.mT.contiguous() if transposed else mask
    weight = gaussian(*mask.shape).masked_fill(~mask, math.nan)
    problem = make_problem([weight], [SparsityPattern.from_mask(mask)])
    s = exact(torch.where(mask, weight.double(), 0.0))
    numerical_rank = int((s > 1e-12 * s[0]).sum())
    raw = solve(library, problem, structural=True, every_order=density == 0.1)
    assert raw[5].item() == numerical_rank
    check_matrix(raw, 0, [weight], mask)
    assert not raw[1][:, ~mask.any(1)].any() and not raw[2][:, ~mask.any(0)].any()
    sigma, *_, rank, _, flags, _, _ = solve(library, problem)
    assert rank.item() == 33
    assert sigma[1, 0].item() == pytest.approx(s[-1].item(), rel=1e-6, abs=1e-12)
    assert bool(flags[0] & RANK_DEFICIENT) == (numerical_rank < 33)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_nan_out_and_zero_is_zero(
    library: EmulatedLibrary, dtype: torch.dtype, bad: float
) -> None:
    spoiled = gaussian(7, 5, dtype=dtype)
    spoiled[2, 3] = bad
    matrices = [spoiled, torch.zeros(3, 4, dtype=dtype), gaussian(5, 5, dtype=dtype)]
    raw = solve(library, make_problem(matrices), certify=True)
    sigma, left, right, _, state, _, residual, flags, _, bounds = raw
    for tensor in (sigma[:, 0], left[:, :7], right[:, :5], residual[0], bounds[0]):
        assert tensor.isnan().all()
    for tensor in (sigma[:, 1:], left[:, 7:], right[:, 5:], residual[1:], state, bounds[2]):
        assert tensor.isfinite().all()
    assert not sigma[:, 1].any() and flags.tolist() == [0, RANK_DEFICIENT, 0]
    assert bounds[1].tolist() == [[0, 0], [0, 0], [math.inf, math.inf]]


def test_ties_are_found_and_their_vectors_orthonormal(library: EmulatedLibrary) -> None:
    pair = torch.block_diag(gaussian(6, 5), gaussian(6, 5))
    rotation = torch.linalg.qr(gaussian(20, 20, dtype=torch.float64)).Q
    matrices = [pair, rotation, gaussian(9, 9)]
    *_, block, _, _, _, _, ties, _ = solve(library, make_problem(matrices))
    assert ties.tolist() == [[2, 2], [MAX_TIES, MAX_TIES], [1, 1]]
    for end in range(2):
        for begin, count, matrix in ((0, 2, pair), (10, MAX_TIES, rotation)):
            rows = block[end * MAX_TIES :, begin : begin + matrix.shape[1]][:count]
            check_close(rows @ rows.mT, torch.eye(count).double(), 1e-9, "orthonormality")
            value = exact(matrix)[-end]
            lengths = (matrix.double() @ rows.mT).norm(dim=0)
            check_close(lengths, value.expand(count), 1e-8, "A v")


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_float64_range(library: EmulatedLibrary, scale: float) -> None:
    matrix = gaussian(9, 6, dtype=torch.float64)
    sigma, *_ = solve(library, make_problem([matrix * scale]))
    s = exact(matrix)
    check_close(sigma[:, 0] / scale, torch.stack([s[0], s[-1]]), 1e-12, "sigma")


def test_bounds_hold_and_are_tight(library: EmulatedLibrary) -> None:
    matrices = [gaussian(40, 24), with_spectrum(20, 30, np.geomspace(1e-4, 1, 20))]
    *_, bounds = solve(library, make_problem(matrices), certify=True)
    for index, matrix in enumerate(matrices):
        s = exact(matrix)
        for value, (lower, upper) in zip((s[0], s[-1], s[0] / s[-1]), bounds[index], strict=True):
            assert lower <= value * (1 + 1e-12) and value <= upper * (1 + 1e-12)
            assert upper / lower < 1 + 1e-4


def test_the_largest_alone(library: EmulatedLibrary) -> None:
    matrix = gaussian(30, 22)
    problem = make_problem([matrix])
    sigma, left, right, block, state, _, residual, flags, ties, _ = solve(
        library, problem, largest_only=True
    )
    assert sigma[0, 0].item() == pytest.approx(exact(matrix)[0].item(), rel=1e-9)
    for tensor in (sigma[1], left[1], right[1], block[MAX_TIES:], state[2:], residual[:, 1]):
        assert not tensor.any()
    assert flags.tolist() == [0] and ties.tolist() == [[1, 1]]


def test_power_iteration_flags_what_it_does_not_reach(library: EmulatedLibrary) -> None:
    slow = with_spectrum(30, 20, np.linspace(0.99, 1, 20))
    quick = with_spectrum(30, 20, np.geomspace(1, 1e3, 20))
    sigma, *_, flags, _, _ = solve(library, make_problem([slow, quick]), power=True)
    assert flags[0] & CAP_REACHED and flags[1] == 0
    s = exact(quick)
    check_close(sigma[:, 1], torch.stack([s[0], s[-1]]), 1e-6, "sigma")
    assert 0.99 * exact(slow)[0] <= sigma[0, 0] <= exact(slow)[0] * (1 + 1e-6)


def test_a_warm_start_changes_no_value(library: EmulatedLibrary) -> None:
    matrices = [gaussian(30, 22), gaussian(16, 25)]
    state = solve(library, make_problem(matrices))[4]
    moved = [matrix + 1e-3 * gaussian(*matrix.shape, seed=9) for matrix in matrices]
    # A state of another matrix, of zeros, and vectors that are exact for a wrong pair.
    flipped = state.flip(0).contiguous()
    for start in (state, torch.zeros_like(state), flipped):
        raw = solve(library, make_problem(moved), state=start)
        for index in range(len(moved)):
            check_matrix(raw, index, moved)


def test_what_a_warm_launch_settled_is_left_alone(library: EmulatedLibrary) -> None:
    matrices = [gaussian(30, 22), gaussian(140, 150), gaussian(16, 25)]
    start = solve(library, make_problem([gaussian(30, 22), gaussian(16, 25)]))[4]
    state = torch.cat([start[:, :22], torch.zeros(4, 140), start[:, 22:]], dim=1)
    settled = [True, True, False]
    raw = solve(library, make_problem(matrices), state=state, settled=settled)
    assert raw[0][:, :2].isnan().all() and raw[1][:, :170].isnan().all()
    check_matrix(raw, 2, matrices)


def test_a_matrix_that_is_too_large_is_an_error(library: EmulatedLibrary) -> None:
    with pytest.raises(EmulationError, match="cudaError 1"):
        solve(library, make_problem([torch.zeros(129, 129)]))
