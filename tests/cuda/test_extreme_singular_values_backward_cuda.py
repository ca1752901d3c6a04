"""The CUDA gradient of extreme_singular_values, run on the CPU by the emulation."""

from pathlib import Path

import pytest
import torch

from benchmarks.spectra import gaussian
from tests.cuda.masked_calls import DTYPES, TOLERANCES
from tests.cuda.spectral_calls import gradients, make_problem
from tests.cuda_emulation.library import EmulatedLibrary
from tests.op_suite import check_close
from tscnc_kernels import SparsityPattern

OPS = torch.ops.tscnc_kernels


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> EmulatedLibrary:
    source = Path(__file__).parent / "extreme_singular_values_backward_emulated.cpp"
    return EmulatedLibrary(source, tmp_path_factory.mktemp("extreme_singular_values_backward"))


def check(library, matrices, patterns, grad, every_order=False):
    """The gradients beside those of the CPU kernels, from the same forward results."""
    nothing = torch.empty(0, dtype=torch.bool)
    masks = [] if patterns is None else [nothing if p is None else p.mask for p in patterns]
    raw = OPS.extreme_singular_values(
        matrices, masks, [], [], [], None, False, 1e-4, False, False, False
    )
    problem = make_problem(matrices, patterns)
    found = gradients(library, problem, matrices, grad, raw, every_order)
    sigma, left, right, block, _, _, _, _, ties, _ = raw
    expected = OPS.extreme_singular_values_backward(
        grad, [m.double() for m in matrices], masks, sigma, left, right, block, ties
    )
    for actual, wanted, matrix in zip(found, expected, matrices, strict=True):
        check_close(actual, wanted, TOLERANCES[matrix.dtype], "gradient")
    return found, ties


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_a_list(library, dtype):
    shapes = (5, 3), (3, 7), (1, 1), (40, 21), (2, 1100)
    matrices = [gaussian(*shape, dtype=dtype) for shape in shapes]
    grad = torch.randn(2, len(shapes), dtype=torch.float64)
    check(library, matrices, None, grad, every_order=dtype == torch.float32)


def test_pruned_entries_have_no_gradient(library):
    mask = torch.rand(19, 30, generator=torch.Generator().manual_seed(0)) < 0.3
    weight = gaussian(19, 30)
    patterns = [SparsityPattern.from_mask(mask), None]
    grad = torch.ones(2, 2, dtype=torch.float64)
    (found, _), _ = check(library, [weight, gaussian(4, 4)], patterns, grad)
    assert not found[~mask].any() and found[mask].any()


@pytest.mark.parametrize("transposed", [False, True])
def test_ties_are_averaged(library, transposed):
    matrix = torch.block_diag(gaussian(6, 5), gaussian(6, 5))
    matrix = matrix.mT.contiguous() if transposed else matrix
    rotation = torch.linalg.qr(gaussian(20, 20)).Q.contiguous()
    grad = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    _, ties = check(library, [matrix, rotation], None, grad, every_order=transposed)
    assert ties[0].tolist() == [2, 2] and ties[1].min() > 2


def test_a_vanishing_value_has_no_gradient_and_nan_spreads(library):
    spoiled = gaussian(4, 4)
    spoiled[1, 2] = torch.nan
    matrices = [torch.ones(3, 3), spoiled, torch.zeros(2, 3)]
    grad = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    raw = OPS.extreme_singular_values(
        matrices, [], [], [], [], None, False, 1e-4, False, False, False
    )
    singular, nan, zero = gradients(library, make_problem(matrices), matrices, grad, raw)
    assert not singular.any() and not zero.any()
    assert nan.isnan().all()


def test_more_matrices_than_one_launch_takes(library):
    matrices = [gaussian(2, 3, seed) for seed in range(34)]
    check(library, matrices, None, torch.randn(2, 34, dtype=torch.float64))
