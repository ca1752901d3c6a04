import math

import pytest
import torch

from benchmarks.spectra import gaussian
from tests.op_suite import check_close
from tscnc_kernels import SparsityPattern
from tscnc_kernels.ops.nuclear_norm import nuclear_norm, nuclear_norm_prox

GOLDEN = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_golden_value(dtype):
    for matrix in (GOLDEN.to(dtype), GOLDEN.T.to(dtype)):
        norm = nuclear_norm([matrix])
        assert norm.item() == pytest.approx(9.52551809 + 0.51430058, rel=1e-7)
        assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_list_adds_up_and_mixes_kernels_with_matrices():
    matrices = [gaussian(8, 3), gaussian(4, 18, seed=1).reshape(4, 2, 3, 3)]
    expected = sum(torch.linalg.svdvals(m.flatten(1)).sum().item() for m in matrices)
    assert nuclear_norm(matrices).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(5, 3), (2, 4), (3, 3), (1, 4)])
def test_derivatives_of_first_and_second_order(shape):
    matrix = gaussian(*shape, dtype=torch.float64).requires_grad_()

    def function(w):
        return nuclear_norm([w])

    assert torch.autograd.gradcheck(function, matrix)
    assert torch.autograd.gradgradcheck(function, matrix)


def test_repeated_and_zero_singular_values_have_a_gradient():
    columns = torch.linalg.qr(gaussian(4, 3, dtype=torch.float64))[0]
    repeated = (2 * columns).requires_grad_()
    (gradient,) = torch.autograd.grad(nuclear_norm([repeated]), repeated, create_graph=True)
    check_close(gradient, columns, 1e-12, "gradient")
    (curvature,) = torch.autograd.grad(gradient.square().sum(), repeated)
    assert curvature.isfinite().all()
    singular = torch.tensor([[3.0, 0.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(nuclear_norm([singular]), singular)
    assert gradient.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_pattern_keeps_the_gradient_on_the_mask():
    weight = gaussian(4, 3, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
    norm = nuclear_norm([weight], [SparsityPattern.from_mask(mask)])
    assert norm.item() == pytest.approx(torch.linalg.svdvals(weight * mask).sum().item())
    assert torch.equal(torch.autograd.grad(norm, weight)[0] != 0, mask)


def test_vmap_of_grad_is_the_gradient_of_each():
    batch = torch.stack([gaussian(5, 3, seed, torch.float64) for seed in range(3)])
    mapped = torch.func.vmap(torch.func.grad(lambda w: nuclear_norm([w])))(batch)
    for weight, gradient in zip(batch, mapped, strict=True):
        u, _, vh = torch.linalg.svd(weight, full_matrices=False)
        check_close(gradient, u @ vh, 1e-10, "gradient")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_weights_give_nan(bad):
    weight = torch.tensor([[1.0, bad], [0.0, 1.0]], requires_grad=True)
    norm = nuclear_norm([weight])
    assert norm.isnan() and torch.autograd.grad(norm, weight)[0].isnan().any()
    assert nuclear_norm_prox(weight.detach(), 0.1).isnan().all()


@pytest.mark.parametrize("lambda_", [0.0, 0.3, 2.0, 100.0])
@pytest.mark.parametrize("shape", [(6, 4), (3, 2, 3, 3)])
def test_prox_softens_the_singular_values(shape, lambda_):
    weight = gaussian(shape[0], math.prod(shape[1:]), dtype=torch.float64).reshape(shape)
    result = nuclear_norm_prox(weight, lambda_)
    assert result.shape == weight.shape
    values = torch.linalg.svdvals(weight.flatten(1))
    expected = (values - lambda_).clamp(min=0)
    check_close(torch.linalg.svdvals(result.flatten(1)), expected, 1e-10, "singular values")


def test_prox_is_the_minimiser():
    weight, lambda_ = gaussian(4, 3, dtype=torch.float64), 0.7
    result = nuclear_norm_prox(weight, lambda_)

    def cost(matrix):
        norm = torch.linalg.svdvals(matrix).sum()
        return ((matrix - weight).square().sum() / 2 + lambda_ * norm).item()

    for seed in range(50):
        step = 1e-3 * gaussian(4, 3, seed, torch.float64)
        assert cost(result) <= cost(result + step)


def test_prox_refuses_to_lose_a_gradient():
    weight = torch.eye(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="carries no gradient"):
        nuclear_norm_prox(weight, 0.5)
    with torch.no_grad():
        check_close(nuclear_norm_prox(weight, 0.5), 0.5 * torch.eye(2), 1e-6, "prox")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nuclear_norm([]), ValueError, "got an empty list"),
        (lambda: nuclear_norm([torch.ones(3)]), ValueError, r"got shape \(3,\)"),
        (lambda: nuclear_norm([torch.eye(2)], []), ValueError, "0 patterns for 1"),
        (lambda: nuclear_norm_prox([1.0], 1.0), TypeError, "got list"),
        (lambda: nuclear_norm_prox(torch.ones(3), 1.0), ValueError, r"got shape \(3,\)"),
        (lambda: nuclear_norm_prox(torch.eye(2), -1.0), ValueError, "got -1.0"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
