import math

import pytest
import torch

from tscnc_kernels.ops.gated_transformed_l1 import gated_transformed_l1

RHO = 50_000 * 5e-4 / 0.7
AT_INITIALISATION = math.log(0.7 / 0.3)


def channel(square_norm: float) -> torch.Tensor:
    """One output channel of 160x3x3 weights with this squared norm."""
    weight = torch.zeros(1, 160, 3, 3, dtype=torch.float64)
    weight[0, 7, 1, 2] = math.sqrt(square_norm)
    return weight


@pytest.mark.parametrize(
    ("square_norm", "intended", "published"),
    [
        (1.0, 3.046e-4, 4.362e-4),
        (2.0, 5.147e-4, 1.050e-3),
        (4.0, 8.108e-4, 4.112e-3),
        (6.5, 1.050e-3, -2.68e-2),
    ],
)
def test_golden_values_of_a_wide_resnet_channel(square_norm, intended, published):
    gate = torch.tensor([AT_INITIALISATION], dtype=torch.float64)
    arguments = [channel(square_norm)], [gate]
    value = gated_transformed_l1(*arguments, rho=RHO) / 50_000
    assert value.item() == pytest.approx(intended, rel=2e-3)
    published_value = gated_transformed_l1(*arguments, rho=RHO, repo_compat=True) / 50_000
    assert published_value.item() == pytest.approx(published, rel=2e-3)


def test_hand_worked_value_and_gradient():
    # π = 1/2, Σ = (4/2)(1 + 4) + 2·1 = 12, t = 6, ρ_3(t) = 4·6/9, slope 3·4/81.
    shift = 2 / 3 * math.log(0.1 / 1.1)
    weight = torch.tensor([[1.0, -2.0]], dtype=torch.float64, requires_grad=True)
    gate = torch.tensor([shift], dtype=torch.float64, requires_grad=True)
    value = gated_transformed_l1([weight], [gate], a=3.0, rho=4.0, lambda_=1.0)
    assert value.item() == pytest.approx(8 / 3)
    weight_grad, gate_grad = torch.autograd.grad(value, [weight, gate])
    slope = 12 / 81
    assert weight_grad.tolist() == [pytest.approx([slope * 0.5 * 4 * w for w in (1.0, -2.0)])]
    assert gate_grad.tolist() == pytest.approx([slope * 0.25 * 12])


def test_gradients_of_first_and_second_order():
    weights = [torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(2, dtype=torch.float64)]
    gates = [torch.randn(3, dtype=torch.float64), torch.randn(2, dtype=torch.float64)]
    inputs = tuple(t.requires_grad_() for t in (*weights, *gates))

    def function(*tensors):
        return gated_transformed_l1(tensors[:2], tensors[2:], a=5.0, rho=2.0, lambda_=0.1)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_closed_gates_and_empty_layers_cost_nothing():
    weights = [torch.randn(2, 3), torch.randn(2, 0), torch.randn(0, 3)]
    gates = [torch.full((2,), -200.0), torch.zeros(2), torch.zeros(0)]
    assert gated_transformed_l1(weights, gates, rho=25.0).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_weights_are_summed_in_float32(dtype):
    weight, gate = torch.full((2, 5000), 0.5, dtype=dtype), torch.zeros(2, dtype=dtype)
    value = gated_transformed_l1([weight], [gate], rho=25.0)
    exact = gated_transformed_l1([weight.double()], [gate.double()], rho=25.0)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)


def test_autocast_and_compile_change_nothing():
    weights, gates = [torch.randn(4, 30)], [torch.randn(4)]
    expected = gated_transformed_l1(weights, gates, rho=25.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gated_transformed_l1(weights, gates, rho=25.0), expected)
    compiled = torch.compile(gated_transformed_l1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weights, gates, rho=25.0), expected)


@pytest.mark.parametrize(
    ("weights", "log_alphas", "constants", "error", "message"),
    [
        ([], [], {}, ValueError, "weights, got an empty list"),
        ([torch.ones(2, 2)], [torch.ones(2)] * 2, {}, ValueError, "got 1 and 2"),
        (torch.ones(2, 2), [torch.ones(2)], {}, TypeError, "weights to be a list of .* got Tensor"),
        ([torch.ones(2, 2)], [3.0], {}, TypeError, r"log_alphas\[0\] .* got float"),
        (
            [torch.ones(2, 3)],
            [torch.ones(3)],
            {},
            ValueError,
            r"\(2,\) for a weight of shape \(2, 3\)",
        ),
        ([torch.ones(2, 2)], [torch.ones(2)], {"a": 0.0}, ValueError, "a <= 1e.15, got 0.0"),
        ([torch.ones(2, 2)], [torch.ones(2)], {"rho": -1.0}, ValueError, "rho <= 1e.15, got -1.0"),
        (
            [torch.ones(2, 2)],
            [torch.ones(2)],
            {"beta": -1.0},
            ValueError,
            "beta <= 1e.15, got -1.0",
        ),
        ([torch.ones(2, 2)], [torch.ones(2)], {"rho": None}, TypeError, "got NoneType"),
        ([torch.ones(2, 2).to_sparse()], [torch.ones(2)], {}, ValueError, "torch.sparse_coo"),
        ([torch.ones(2, 2)], [torch.ones(2, device="meta")], {}, ValueError, "cpu, got meta"),
    ],
)
def test_bad_input_is_named(weights, log_alphas, constants, error, message):
    with pytest.raises(error, match=message):
        gated_transformed_l1(weights, log_alphas, **{"rho": 25.0, **constants})
