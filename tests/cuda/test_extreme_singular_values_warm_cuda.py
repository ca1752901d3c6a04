"""The CUDA kernel of warm extreme singular values, run on the CPU by the emulation."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.spectra import exact, gaussian, with_spectrum
from tests.cuda.spectral_calls import make_problem, solve_warm
from tests.cuda_emulation.library import EmulatedLibrary
from tests.op_suite import check_close
from tscnc_kernels import SparsityPattern
from tscnc_kernels._spectral import CAP_REACHED, MAX_TIES, RANK_DEFICIENT, Raw

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Relative errors that a warm start promises.
TOLERANCES = (1e-5, 1e-3)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> EmulatedLibrary:
    source = Path(__file__).parent / "extreme_singular_values_warm_emulated.cpp"
    return EmulatedLibrary(source, tmp_path_factory.mktemp("extreme_singular_values_warm"))


def state_of(matrices: Sequence[Tensor]) -> Tensor:
    """The two extreme vectors of each end on the smaller side, as a call returns them."""
    columns = []
    for matrix in matrices:
        a = matrix.double()
        svd = torch.linalg.svd(a if a.shape[0] >= a.shape[1] else a.mT, full_matrices=False)
        columns.append(svd.Vh[[0, 1, -1, -2]])
    return torch.cat(columns, dim=1)


def moved(matrices: Sequence[Tensor], step: float = 1e-3) -> list[Tensor]:
    """The matrices after a step of this relative length."""
    steps = [gaussian(*m.shape, seed=9).to(m.dtype) for m in matrices]
    return [m + d * (step * m.norm() / d.norm()) for m, d in zip(matrices, steps, strict=True)]


def check_matrix(raw: Raw, index: int, matrices: Sequence[Tensor], ends: int = 2) -> None:
    """Values, vectors, residuals and the next state of one matrix, beside its SVD."""
    sigma, left, right, block, state, rank, residual, flags, *_ = raw
    places = [sum(m.shape[side] for m in matrices[:index]) for side in (0, 1)]
    small = sum(min(m.shape) for m in matrices[:index])
    rows, cols = matrices[index].shape
    n = min(rows, cols)
    a = matrices[index].double()
    s = exact(a)
    for end in range(ends):
        u = left[end, places[0] : places[0] + rows]
        v = right[end, places[1] : places[1] + cols]
        value = sigma[end, index]
        assert value.item() == pytest.approx(s[-end].item(), rel=TOLERANCES[end])
        check_close(torch.stack([u.norm(), v.norm()]), torch.ones(2).double(), 1e-9, "|u|, |v|")
        rest = math.hypot((a @ v - value * u).norm(), (a.mT @ u - value * v).norm())
        assert rest == pytest.approx(residual[index, end].item(), abs=1e-10 * s[0].item())
        short = v if rows >= cols else u
        assert torch.equal(block[end * MAX_TIES, small : small + n], short)
        ahead = state[2 * end, small : small + n]
        assert ahead.norm().item() == pytest.approx(1, abs=1e-9)
        assert (ahead @ short).abs() > 0.9
    assert rank[index] == n and flags[index] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_and_tall_matrices_in_one_launch(library: EmulatedLibrary, dtype: torch.dtype) -> None:
    # Chunks of one and of several blocks, columns that several threads share and that they do not.
    shapes = (16, 40), (150, 33), (20, 300), (17, 129), (260, 130)
    matrices = [gaussian(*shape, seed, dtype) for seed, shape in enumerate(shapes)]
    after = moved(matrices)
    every_order = dtype == torch.float32
    raw, settled = solve_warm(
        library, make_problem(after), state_of(matrices), every_order=every_order
    )
    assert all(settled)
    for index in range(len(after)):
        check_matrix(raw, index, after)
    assert raw[8].max() == 1 and not raw[3][2:MAX_TIES].any()


def test_the_largest_alone_and_its_zeros_for_the_other_end(library: EmulatedLibrary) -> None:
    matrices = [gaussian(40, 40), gaussian(140, 150), gaussian(300, 24)]
    after = moved(matrices)
    raw, settled = solve_warm(library, make_problem(after), state_of(matrices), largest_only=True)
    assert all(settled)
    for index in range(len(after)):
        check_matrix(raw, index, after, ends=1)
    sigma, left, right, block, state, _, residual, _, ties, _ = raw
    for tensor in (sigma[1], left[1], right[1], block[MAX_TIES:], state[2:], residual[:, 1]):
        assert not tensor.any()
    assert ties.tolist() == [[1, 1]] * 3


def test_the_state_leads_on(library: EmulatedLibrary) -> None:
    matrices = [gaussian(30, 200)]
    state = state_of(matrices)
    for _ in range(3):
        matrices = moved(matrices)
        raw, settled = solve_warm(library, make_problem(matrices), state)
        assert settled == [True]
        check_matrix(raw, 0, matrices)
        state = raw[4]


def test_more_matrices_than_one_launch_takes(library: EmulatedLibrary) -> None:
    matrices = [gaussian(16 + index % 3, 40, index) for index in range(83)]
    after = moved(matrices, 1e-5)
    raw, settled = solve_warm(library, make_problem(after), state_of(matrices))
    assert all(settled)
    for index in (0, 79, 80, 82):
        check_matrix(raw, index, after)


def test_more_chunks_than_the_tree_of_sums_has_leaves(library: EmulatedLibrary) -> None:
    shape = 16, 256 * 128 + 5
    matrices = [gaussian(*shape)]
    after = moved(matrices)
    raw, settled = solve_warm(library, make_problem(after), state_of(matrices))
    assert settled == [True]
    check_matrix(raw, 0, after)


@pytest.mark.parametrize(
    "matrix",
    [
        pytest.param(gaussian(8, 30), id="a side too short"),
        pytest.param(gaussian(40, 40), id="square"),
        pytest.param(with_spectrum(90, 30, np.geomspace(1e-3, 1, 30)), id="badly conditioned"),
        pytest.param(torch.linalg.qr(gaussian(90, 30)).Q, id="tied"),
        pytest.param(torch.ones(90, 30), id="rank one"),
        pytest.param(torch.zeros(90, 30), id="zero"),
        pytest.param(torch.full((90, 30), math.nan), id="NaN"),
        pytest.param(torch.full((90, 30), 1e200, dtype=torch.float64), id="out of range"),
    ],
)
def test_what_is_not_proven_stays_for_the_factorisations(
    library: EmulatedLibrary, matrix: Tensor
) -> None:
    start = state_of([gaussian(*matrix.shape)])
    other = gaussian(60, 30)
    start = torch.cat([start, state_of([other])], dim=1)
    raw, settled = solve_warm(library, make_problem([matrix, other]), start)
    assert settled == [False, True]
    assert raw[0][:, 0].isnan().all(), "written although it was not settled"
    check_matrix(raw, 1, [matrix, other])


@pytest.mark.parametrize("start", ["zeros", "NaN", "equal vectors"])
def test_a_start_of_no_use_is_replaced(library: EmulatedLibrary, start: str) -> None:
    matrix = with_spectrum(200, 20, np.concatenate([[0.2], np.linspace(1, 1.1, 18), [4]]))
    state = {
        "zeros": torch.zeros(4, 20).double(),
        "NaN": torch.full((4, 20), math.nan).double(),
        "equal vectors": torch.ones(4, 20).double(),
    }[start]
    raw, settled = solve_warm(library, make_problem([matrix]), state)
    assert settled == [True]
    check_matrix(raw, 0, [matrix])


def test_larger_matrices_keep_what_was_found_and_say_so(library: EmulatedLibrary) -> None:
    n = 130
    spread = with_spectrum(270, n, np.geomspace(1e-4, 1, n))
    rotation = torch.linalg.qr(gaussian(270, n)).Q
    spoiled, nothing = gaussian(n, 270), torch.zeros(270, n)
    spoiled[100, 3] = math.inf
    matrices = [spread, rotation, spoiled, nothing]
    raw, settled = solve_warm(
        library, make_problem(matrices), state_of([gaussian(270, n)] * 4), every_order=True
    )
    sigma, left, right, _, state, _, residual, flags, ties, _ = raw
    assert all(settled)
    assert flags.tolist() == [CAP_REACHED, 0, 0, RANK_DEFICIENT]
    assert sigma[0, 0] <= exact(spread)[0] * (1 + 1e-9) and sigma[1, 0] >= exact(spread)[-1]
    check_close(sigma[:, 1], torch.ones(2).double(), 1e-6, "sigma of a rotation")
    assert ties[1].tolist() == [2, 2]
    assert sigma[:, 2].isnan().all() and residual[2].isnan().all()
    assert left[:, 540 : 540 + n].isnan().all() and right[:, 2 * n : 2 * n + 270].isnan().all()
    assert not sigma[:, 3].any() and not left[:, 540 + n :].any()
    lengths = right[:, 2 * n + 270 :].norm(dim=1)
    check_close(lengths, torch.ones(2).double(), 1e-9, "null vectors")
    assert state.isfinite().all()


@pytest.mark.parametrize("transposed", [False, True])
def test_patterns(library: EmulatedLibrary, transposed: bool) -> None:
    mask = torch.rand(160, 40, generator=torch.Generator().manual_seed(3)) < 0.3
    mask = mask.mT.contiguous() if transposed else mask
    pattern = SparsityPattern.from_mask(mask)
    weight = gaussian(*mask.shape)
    kept, after = weight * mask, moved([weight])[0] * mask
    problem = make_problem([after.masked_fill(~mask, math.nan)], [pattern])
    raw, settled = solve_warm(library, problem, state_of([kept]), structural=True)
    assert settled == [True]
    check_matrix(raw, 0, [after])


def test_null_spaces_of_patterns_are_for_the_factorisations(library: EmulatedLibrary) -> None:
    mask = torch.ones(100, 20, dtype=torch.bool)
    mask[:, 7] = False
    weight = gaussian(100, 20)
    problem = make_problem([weight], [SparsityPattern.from_mask(mask)])
    start = state_of([weight * mask])
    _, settled = solve_warm(library, problem, start, structural=True)
    assert settled == [False]
    raw, settled = solve_warm(library, problem, start, structural=True, largest_only=True)
    assert settled == [True] and raw[5].item() == 19
    assert raw[0][0, 0].item() == pytest.approx(exact(weight * mask)[0].item(), rel=1e-5)
    assert not raw[2][:, 7].any()
