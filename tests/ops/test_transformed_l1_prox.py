import math

import pytest
import torch

from tscnc_kernels.ops.transformed_l1 import transformed_l1
from tscnc_kernels.ops.transformed_l1_prox import transformed_l1_prox


@pytest.mark.parametrize(
    ("x", "lambda_", "a", "value", "threshold"),
    [
        (1.5, 0.3, 1.0, 1.3954360217, 0.5954451150),
        (0.5, 0.1, 0.5, 0.4092896695, 0.2977225576),
        (2.0, 1.0, 0.1, 1.9744381849, 1.4332396974),
        (3.0, 0.01, 100.0, 2.9904780209, 0.0101),
    ],
)
def test_golden_values_and_thresholds(x, lambda_, a, value, threshold):
    inputs = torch.tensor([x, -x, 0.0, threshold - 1e-9, 1e-9 - threshold], dtype=torch.float64)
    expected = [value, -value, 0.0, 0.0, 0.0]
    assert transformed_l1_prox(inputs, lambda_, a).tolist() == pytest.approx(expected, abs=1e-10)
    above = transformed_l1_prox(torch.tensor(threshold + 1e-8, dtype=torch.float64), lambda_, a)
    assert above.item() > 0


def objective(y, x, lambda_, a):
    return (y - x) ** 2 / 2 + lambda_ * (a + 1) * y.abs() / (a + y.abs())


def test_minimises_its_objective_on_a_grid():
    grid = torch.linspace(-4, 4, 160_001, dtype=torch.float64)
    for x, lambda_, a in (torch.rand(40, 3, dtype=torch.float64) * 3 + 0.01).tolist():
        y = transformed_l1_prox(torch.tensor([x], dtype=torch.float64), lambda_, a)
        value = objective(y, x, lambda_, a).item()
        assert value <= objective(grid, x, lambda_, a).min().item() + 1e-12
        penalty = transformed_l1([y], a).item()
        assert value == pytest.approx((y.item() - x) ** 2 / 2 + lambda_ * penalty)


def test_gradients_of_first_and_second_order():
    x = torch.tensor([0.7, -1.3, 2.0, 40.0, 0.2], dtype=torch.float64, requires_grad=True)
    for lambda_, a in ((0.3, 1.0), (0.01, 30.0), (1e-12, 0.5), (0.0, 1.0)):
        function = lambda t: transformed_l1_prox(t, lambda_, a)  # noqa: B023, E731
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


def test_no_penalty_is_the_identity():
    x = torch.tensor([-1.5, 0.0, 3e-20, 2.0])
    assert torch.equal(transformed_l1_prox(x, 0.0), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_the_rounded_float64_result(dtype):
    x = torch.linspace(-5, 5, 999).to(dtype)
    exact = transformed_l1_prox(x.double(), 0.3, 0.7)
    clear = ((x.abs() - 0.66).abs() > 0.02) | (x.abs() < 0.5)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    actual = transformed_l1_prox(x, 0.3, 0.7)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual[clear].double(), exact[clear], atol=1e-6, rtol=tolerance)


def test_extreme_inputs_stay_finite_with_finite_gradients():
    x = torch.tensor([3e38, -3e38, 1e-38, 0.0], requires_grad=True)
    y = transformed_l1_prox(x, 0.3)
    assert torch.equal(y, torch.tensor([3e38, -3e38, 0.0, 0.0]))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_non_finite_inputs_give_nan():
    assert transformed_l1_prox(torch.tensor([math.nan, math.inf, -math.inf]), 0.3).isnan().all()


def test_compiles_to_one_graph_and_maps_over_a_batch():
    x = torch.randn(7, 3)
    expected = transformed_l1_prox(x, 0.2)
    compiled = torch.compile(transformed_l1_prox, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, 0.2), expected)
    mapped = torch.func.vmap(lambda row: transformed_l1_prox(row, 0.2))(x)
    torch.testing.assert_close(mapped, expected)


@pytest.mark.parametrize(
    ("input", "lambda_", "a", "error", "message"),
    [
        ([1.0], 0.1, 1.0, TypeError, "got list"),
        (torch.zeros(2, dtype=torch.int64), 0.1, 1.0, TypeError, "got torch.int64"),
        (torch.zeros(2), -0.1, 1.0, ValueError, "lambda_ <= 1e.15, got -0.1"),
        (torch.zeros(2), math.nan, 1.0, ValueError, "lambda_ <= 1e.15, got nan"),
        (torch.zeros(2), 0.1, 0.0, ValueError, "a <= 1e.15, got 0.0"),
        (torch.zeros(2), 1e300, 1e-300, ValueError, "lambda_ <= 1e.15, got 1e.300"),
        (torch.zeros(2), "1", 1.0, TypeError, "lambda_ to be a number, got str"),
        (torch.zeros(2).to_sparse(), 0.1, 1.0, ValueError, "torch.sparse_coo"),
    ],
)
def test_bad_input_is_named(input, lambda_, a, error, message):
    with pytest.raises(error, match=message):
        transformed_l1_prox(input, lambda_, a)
