import math

import pytest
import torch

from benchmarks.spectra import gaussian
from tests.op_suite import check_close
from tscnc_kernels import SparsityPattern, extreme_singular_values
from tscnc_kernels.ops.orthogonality_penalty import orthogonality_penalty

GOLDEN = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
FORMS = ["so", "srip"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("form", "value"), [("so", 8053.0), ("srip", 89.73549491)])
def test_golden_values(form, value, dtype):
    for matrix in (GOLDEN.to(dtype), GOLDEN.T.to(dtype)):
        penalty = orthogonality_penalty([matrix], form=form)
        assert penalty.item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_orthonormal_rows_or_columns_cost_nothing(form):
    columns = torch.linalg.qr(gaussian(7, 4, dtype=torch.float64))[0]
    for matrix in (columns, columns.T):
        assert orthogonality_penalty([matrix], form=form).item() == pytest.approx(0, abs=1e-12)


def test_srip_sees_the_smaller_end_too():
    matrix = torch.diag(torch.tensor([1.1, 0.5], dtype=torch.float64)).requires_grad_()
    penalty = orthogonality_penalty([matrix])
    assert penalty.item() == pytest.approx(0.75, rel=1e-9)
    gradient = torch.autograd.grad(penalty, matrix)[0]
    check_close(gradient, torch.diag(torch.tensor([0.0, -1.0])), 1e-9, "gradient")


def test_list_adds_up_and_mixes_kernels_with_matrices():
    matrices = [gaussian(8, 3), gaussian(4, 18, seed=1).reshape(4, 2, 3, 3), gaussian(5, 5, seed=2)]
    state = extreme_singular_values([matrix.flatten(1) for matrix in matrices]).state
    for form in FORMS:
        total = orthogonality_penalty(matrices, form=form)
        alone = sum(orthogonality_penalty([m], form=form).item() for m in matrices)
        assert total.item() == pytest.approx(alone, rel=1e-5)
        warm = orthogonality_penalty(matrices, state=state, form=form)
        assert warm.item() == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_derivatives_of_first_and_second_order(form):
    matrices = (gaussian(5, 3, dtype=torch.float64), gaussian(2, 4, 1, torch.float64))
    for matrix in matrices:
        matrix.requires_grad_()

    def function(*inputs):
        return orthogonality_penalty(inputs, form=form)

    assert torch.autograd.gradcheck(function, matrices, atol=1e-5)
    assert torch.autograd.gradgradcheck(function, matrices, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_pattern_keeps_the_gradient_on_the_mask(form):
    mask = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=torch.bool)
    weight = torch.arange(1.0, 13.0, dtype=torch.float64).reshape(4, 3).requires_grad_()
    live = torch.tensor([[1.0, 0.0], [7.0, 8.0], [0.0, 11.0]], dtype=torch.float64)
    penalty = orthogonality_penalty([weight], [SparsityPattern.from_mask(mask)], form=form)
    # In SO the dead column is a σ of 0, which costs 1.
    expected = orthogonality_penalty([live], form=form) + (form == "so")
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-9)
    gradient = torch.autograd.grad(penalty, weight)[0]
    assert torch.equal(gradient != 0, mask)


def test_matrix_that_is_pruned_whole_costs_nothing_in_srip():
    weight = torch.ones(2, 3, requires_grad=True)
    pattern = SparsityPattern.from_mask(torch.zeros(2, 3, dtype=torch.bool))
    penalty = orthogonality_penalty([weight], [pattern])
    assert penalty.item() == 0
    assert torch.equal(torch.autograd.grad(penalty, weight)[0], torch.zeros(2, 3))


@pytest.mark.parametrize("form", FORMS)
def test_non_finite_weights_and_autocast(form):
    assert orthogonality_penalty([torch.tensor([[1.0, math.nan]])], form=form).isnan()
    assert not orthogonality_penalty([torch.tensor([[1.0, math.inf]])], form=form).isfinite()
    expected = orthogonality_penalty([gaussian(6, 4)], form=form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(orthogonality_penalty([gaussian(6, 4)], form=form), expected)


@pytest.mark.parametrize(
    ("matrices", "kwargs", "error", "message"),
    [
        ([], {}, ValueError, "got an empty list"),
        ([torch.ones(3)], {}, ValueError, r"got shape \(3,\)"),
        ([torch.eye(2).int()], {}, TypeError, "got torch.int32"),
        ([torch.eye(2)], {"form": "SO"}, ValueError, "got 'SO'"),
        ([torch.eye(2)], {"patterns": []}, ValueError, "got 0 patterns for 1 matrices"),
    ],
)
def test_bad_input_is_named(matrices, kwargs, error, message):
    with pytest.raises(error, match=message):
        orthogonality_penalty(matrices, **kwargs)
