import math

import pytest
import torch

from tests.op_suite import OpSpec, OpSuite, check_close
from tscnc_kernels.ops.logdet_gram import (
    factor_on_device,
    factor_on_device_backward,
    logdet_gram,
    reference,
    reference_backward,
)

GOLDEN = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]


def raw_calls():
    ops = torch.ops.tscnc_kernels
    weights = [torch.randn(5, 3), torch.randn(2, 4)]
    _, factors = ops.logdet_gram(weights, 1e-3)
    grad_output = torch.tensor([1.0, -2.0], dtype=torch.float64)
    return [
        (ops.logdet_gram.default, (weights, 1e-3)),
        (ops.logdet_gram_backward.default, (grad_output, weights, factors, 1e-3)),
    ]


class TestLogdetGram(OpSuite):
    spec = OpSpec(
        name="logdet_gram",
        public=logdet_gram,
        reference=reference,
        samples={
            "tall_wide_and_kernel": lambda make: (
                ([make(5, 3), make(2, 4), make(3, 2, 2, 2)],),
                {"ridge": 0.1},
            ),
            "one_tensor": lambda make: ((make(4, 4),), {"ridge": 1e-3}),
            "vector": lambda make: (([make(1, 7), make(1, 1)],), {}),
        },
        raw_calls=raw_calls,
    )


def value_and_gradients(function, weights, **kwargs):
    weights = [w.detach().clone().requires_grad_() for w in weights]
    values = function(weights, **kwargs)
    scale = torch.linspace(0.5, 1.5, len(weights), dtype=values.dtype)
    return values.detach(), torch.autograd.grad((values * scale).sum(), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_blocked_sizes_match_reference(isa, dtype):
    """Sizes around the kernels' tiles, panels and chunks, and two that all threads share."""
    torch.manual_seed(0)
    shapes = [(63, 130), (129, 65), (64, 64), (1031, 12), (23, 600), (2, 1), (260, 257), (200, 777)]
    weights = [torch.randn(*shape, dtype=dtype) for shape in shapes]
    values, gradients = value_and_gradients(logdet_gram, weights)
    exact = [w.double() for w in weights]
    expected, expected_gradients = value_and_gradients(reference, exact)
    # Square Gaussian matrices have gradients of the order of their condition number, some 1e3 here.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    check_close(values, expected, tolerance, "value")
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        check_close(actual, wanted, tolerance, "gradient")


def test_large_matrices_have_the_same_bits_for_any_thread_count():
    torch.manual_seed(0)
    weights = [torch.randn(300, 257), torch.randn(257, 400), *[torch.randn(90, 60)] * 5]
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(value_and_gradients(logdet_gram, weights))
    finally:
        torch.set_num_threads(threads)
    for values, gradients in runs[1:]:
        assert torch.equal(values, runs[0][0])
        for a, b in zip(gradients, runs[0][1], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_golden_value_and_hand_worked_gradient(backend, dtype):
    # WᵀW = [[35, 44], [44, 56]] with determinant 24: logdet(WᵀW/2) = log 6, gradient 2 W (WᵀW)⁻¹.
    weight = torch.tensor(GOLDEN, dtype=dtype, requires_grad=True)
    value = logdet_gram(weight, ridge=0.0, backend=backend)
    assert value.item() == pytest.approx(1.79175947, abs=1e-6)
    (gradient,) = torch.autograd.grad(value, weight)
    expected = torch.tensor([[-32.0, 26.0], [-8.0, 8.0], [16.0, -10.0]]) / 12
    check_close(gradient, expected, 1e-6 if dtype.itemsize > 2 else 1e-2, "gradient")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_relative_ridge_by_hand(backend):
    # tr = 1, n = 2: G = diag(1 + 1/4, 1/4), G/2 has the determinant 5/64. d/dw₀₀ of log((1 + r/2)
    # r/2 w⁴) = 4/w.
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    value = logdet_gram(weight, ridge=0.5, backend=backend)
    assert value.item() == pytest.approx(math.log(5 / 64), abs=1e-12)
    (gradient,) = torch.autograd.grad(value, weight)
    check_close(gradient, torch.tensor([[4.0, 0.0], [0.0, 0.0]]), 1e-12, "gradient")


def test_scaling_a_weight_adds_its_logarithm_with_any_ridge():
    torch.manual_seed(0)
    weight = torch.randn(9, 5, dtype=torch.float64)
    for ridge in (0.0, 1e-6, 0.3):
        difference = logdet_gram(1e-3 * weight, ridge) - logdet_gram(weight, ridge)
        assert difference.item() == pytest.approx(2 * 5 * math.log(1e-3), abs=1e-9)


def test_many_small_singular_values_do_not_underflow(isa):
    # The determinant itself is about exp(-400), which float32 cannot hold.
    torch.manual_seed(0)
    weight = torch.randn(640, 100) * (2 / 640) ** 0.5
    exact = 2 * torch.linalg.svdvals(weight.double()).log().sum() - 100 * math.log(100)
    assert exact < -300
    assert logdet_gram(weight, ridge=0.0).item() == pytest.approx(exact.item(), rel=1e-6)


def test_condition_number_of_a_million_keeps_four_digits(isa):
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))[0] for _ in range(2))
    sigma = torch.logspace(0, -6, 64, dtype=torch.float64)
    value = logdet_gram(left @ sigma.diag() @ right, ridge=0.0)
    assert value.item() == pytest.approx(
        (2 * sigma.log().sum() - 64 * math.log(64)).item(), abs=1e-3
    )


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_singular_weight_without_ridge_is_minus_infinity(backend, isa):
    torch.manual_seed(0)
    low_rank = (torch.randn(70, 40) @ torch.randn(40, 90)).double()
    dead_column = torch.eye(4, dtype=torch.float64) * torch.tensor([1.0, 1.0, 0.0, 1.0])
    fine = torch.eye(2, dtype=torch.float64)
    weights = [low_rank, fine, dead_column, torch.zeros(3, 2, dtype=torch.float64)]
    values, gradients = value_and_gradients(
        lambda w: logdet_gram(w, ridge=0.0, backend=backend), weights
    )
    assert values.tolist() == pytest.approx([-math.inf, -2 * math.log(2), -math.inf, -math.inf])
    assert torch.isnan(gradients[0]).all() and torch.isnan(gradients[2]).all()
    check_close(gradients[1], 2 * torch.linspace(0.5, 1.5, 4)[1] * fine, 1e-7, "gradient")


def test_ridge_makes_a_rank_deficient_weight_finite():
    torch.manual_seed(0)
    values, (gradient,) = value_and_gradients(
        logdet_gram, [torch.randn(20, 3) @ torch.randn(3, 10)]
    )
    assert torch.isfinite(values).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_weights_give_nan_for_themselves_only(backend, bad, isa):
    broken = torch.eye(3)
    broken[1, 2] = bad
    values, gradients = value_and_gradients(
        lambda w: logdet_gram(w, backend=backend), [broken, torch.eye(3)]
    )
    assert values[0].isnan() and gradients[0].isnan().all()
    assert values[1].isfinite() and gradients[1].isfinite().all()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_squares_beyond_float64_give_nan_or_minus_infinity(backend, isa):
    weights = [scale * torch.eye(3, dtype=torch.float64) for scale in (1e200, 1e-200)]
    values, gradients = value_and_gradients(lambda w: logdet_gram(w, backend=backend), weights)
    assert values[0].isnan() and values[1] == -math.inf
    assert all(gradient.isnan().all() for gradient in gradients)


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 0.3])
def test_what_runs_on_cuda_matches_the_reference(ridge):
    torch.manual_seed(0)
    weights = [torch.randn(*shape) for shape in ((5, 3), (2, 4), (1, 1), (40, 64), (130, 70))]
    values, factors = factor_on_device(weights, ridge)
    check_close(values, reference([w.double() for w in weights], ridge), 1e-12, "value")
    grad = torch.linspace(-1, 2, len(weights), dtype=torch.float64)
    found = factor_on_device_backward(grad, weights, factors, ridge)
    for actual, wanted in zip(found, reference_backward(grad, weights, ridge), strict=True):
        check_close(actual, wanted, 1e-6, "gradient")
        assert actual.dtype == torch.float32


def test_what_runs_on_cuda_names_singular_and_non_finite_weights():
    spoiled = torch.full((3, 2), math.nan)
    weights = [torch.ones(4, 2), spoiled, torch.eye(3)]
    values, factors = factor_on_device(weights, 0.0)
    assert values[0] == -math.inf and values[1].isnan() and values[2].isfinite()
    gradients = factor_on_device_backward(torch.ones(3).double(), weights, factors, 0.0)
    assert gradients[0].isnan().all() and gradients[1].isnan().all()
    check_close(gradients[2], 2 * torch.eye(3), 1e-6, "gradient")


def test_cuda_has_a_kernel_of_both_directions():
    for op in ("logdet_gram", "logdet_gram_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tscnc_kernels::{op}", "CUDA")


def test_gradient_only_where_wanted():
    torch.manual_seed(0)
    weights = [torch.randn(4, 3, requires_grad=index != 1) for index in range(3)]
    logdet_gram(weights).sum().backward()
    assert weights[1].grad is None
    for weight in (weights[0], weights[2]):
        (alone,) = torch.autograd.grad(logdet_gram(weight), weight)
        assert torch.equal(weight.grad, alone)


def test_value_is_float64_if_any_weight_is():
    mixed = [torch.eye(2), torch.eye(3, dtype=torch.float64), torch.eye(2, dtype=torch.bfloat16)]
    assert logdet_gram(mixed).dtype == torch.float64
    assert logdet_gram(mixed[::2]).dtype == torch.float32


@pytest.mark.parametrize(
    ("weights", "ridge", "error", "message"),
    [
        ([], 0.0, ValueError, "got an empty list"),
        (3.0, 0.0, TypeError, "got float"),
        ([torch.eye(2), 1], 0.0, TypeError, r"weights\[1\] to be a tensor, got int"),
        (torch.zeros(3), 0.0, ValueError, r"got shape \(3,\)"),
        ([torch.zeros(0, 4)], 0.0, ValueError, r"got shape \(0, 4\)"),
        (torch.eye(2).to(torch.int32), 0.0, TypeError, "got torch.int32"),
        (torch.eye(2).to(torch.complex64), 0.0, TypeError, "got torch.complex64"),
        (torch.eye(2).to_sparse(), 0.0, ValueError, "torch.sparse_coo"),
        ([torch.eye(2), torch.eye(2, device="meta")], 0.0, ValueError, "cpu and meta"),
        (torch.eye(2), -1e-6, ValueError, "ridge <= 1e.15, got -1e-06"),
        (torch.eye(2), math.nan, ValueError, "ridge <= 1e.15, got nan"),
        (torch.eye(2), None, TypeError, "ridge to be a number, got NoneType"),
    ],
)
def test_bad_input_is_named(weights, ridge, error, message):
    with pytest.raises(error, match=message):
        logdet_gram(weights, ridge)
