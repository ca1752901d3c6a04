import math

import pytest
import torch

import tscnc_kernels
from tests.op_suite import OpSpec, OpSuite, check_close
from tscnc_kernels.ops.transformed_l1 import (
    reference,
    transformed_l1,
    transformed_l1_value_and_grad,
)


def many(make):
    """Odd sizes, a vector's tail, an empty tensor and one longer than a block of the kernel."""
    shapes = [(1,), (63,), (129, 3), (0, 4), (3, 5, 7), (2053,)]
    return ([make(*shape) * 0.3 for shape in shapes],), {"a": 0.5}


def raw_calls():
    tensors = [torch.randn(3, 5), torch.randn(7)]
    ops = torch.ops.tscnc_kernels
    return [
        (ops.transformed_l1.default, (tensors, 1.0)),
        (ops.transformed_l1_backward.default, (torch.tensor(2.0), tensors, 1.0)),
        (ops.transformed_l1_value_and_grad.default, (tensors, 1.0)),
    ]


class TestTransformedL1(OpSuite):
    spec = OpSpec(
        name="transformed_l1",
        public=transformed_l1,
        reference=reference,
        samples={
            "matrix": lambda make: (([make(5, 3), make(4)],), {"a": 2.0}),
            "small_a": lambda make: (([make(7)],), {"a": 0.01}),
            "empty_and_many": many,
        },
        raw_calls=raw_calls,
        # The float32 value is a sum over some 2,500 elements; float16's gradient at a = 0.01 has
        # slopes up to 1e2.
        tolerances={torch.float16: 4e-3, torch.float32: 2e-5},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("a", "values", "total", "slopes"),
    [
        # ρ_1(t) = 2t/(1+t), slope 2/(1+t)²
        (1.0, [1.0, -3.0, 0.0], 2.5, [0.5, -0.125, 0.0]),
        # ρ_3(t) = 4t/(3+t), slope 12/(3+t)²
        (3.0, [-1.0, 5.0], 3.5, [-0.75, 0.1875]),
    ],
)
def test_hand_worked_values(dtype, a, values, total, slopes):
    value, (gradient,) = transformed_l1_value_and_grad([torch.tensor(values, dtype=dtype)], a)
    assert value.item() == pytest.approx(total, rel=1e-6)
    assert gradient.tolist() == pytest.approx(slopes, rel=1e-2 if dtype.itemsize == 2 else 1e-6)


def test_limits_in_a_are_l0_and_l1():
    t = torch.tensor([0.5, -2.0, 0.0, 1.5], dtype=torch.float64)
    assert transformed_l1([t], a=1e-12).item() == pytest.approx(3.0, abs=1e-9)
    assert transformed_l1([t], a=1e12).item() == pytest.approx(4.0, abs=1e-9)


def test_value_and_grad_equals_autograd(isa):
    tensors = [torch.randn(1001, requires_grad=True), torch.randn(40, 33, requires_grad=True)]
    value, gradients = transformed_l1_value_and_grad(tensors, 0.7)
    direct = transformed_l1(tensors, 0.7)
    check_close(value, direct, 1e-6, "value")
    for ours, theirs in zip(gradients, torch.autograd.grad(direct, tensors), strict=True):
        assert torch.equal(ours, theirs)


def test_gradient_only_where_wanted():
    weight, frozen = torch.randn(5, requires_grad=True), torch.randn(5)
    transformed_l1([weight, frozen]).backward()
    assert weight.grad is not None and frozen.grad is None


def test_value_of_many_elements_keeps_its_digits():
    t = torch.rand(3_000_001)
    exact = transformed_l1([t.double()])
    assert transformed_l1([t]).item() == pytest.approx(exact.item(), rel=3e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_give_nan(bad, isa):
    assert transformed_l1([torch.tensor([1.0, bad])]).isnan()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_extreme_magnitudes_do_not_overflow(backend, isa):
    t = torch.tensor([3e38, -3e38, 1e-38])
    value, (gradient,) = transformed_l1_value_and_grad([t], 1.0, backend=backend)
    assert value.item() == pytest.approx(4.0)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("a", [1e-15, 1e15])
def test_extreme_shape_parameters_keep_the_accuracy(a, backend, isa):
    t = torch.tensor([0.0, 1e-38, 1e-15, -1.0, 1e15, -1e22])
    value, (gradient,) = transformed_l1_value_and_grad([t], a, backend=backend)
    exact_value, (exact,) = transformed_l1_value_and_grad([t.double()], a, backend="reference")
    assert value.item() == pytest.approx(exact_value.item(), rel=1e-6)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize(
    ("tensors", "a", "error", "message"),
    [
        ([], 1.0, ValueError, "got an empty list"),
        (torch.zeros(3), 1.0, TypeError, "list of tensors, got Tensor"),
        ([3.0], 1.0, TypeError, r"tensors\[0\] to be a tensor, got float"),
        ([torch.zeros(3, dtype=torch.int64)], 1.0, TypeError, "got torch.int64"),
        (
            [torch.zeros(3), torch.zeros(3).half()],
            1.0,
            TypeError,
            "torch.float32 and torch.float16",
        ),
        ([torch.zeros(3), torch.zeros(3, device="meta")], 1.0, ValueError, "cpu and meta"),
        ([torch.zeros(3).to_sparse()], 1.0, ValueError, "torch.sparse_coo"),
        ([torch.zeros(3)], 0.0, ValueError, "<= a <= 1e.15, got 0.0"),
        ([torch.zeros(3)], math.nan, ValueError, "<= a <= 1e.15, got nan"),
        ([torch.zeros(3)], 1e39, ValueError, "<= a <= 1e.15, got 1e.39"),
        ([torch.zeros(3)], 1e-46, ValueError, "<= a <= 1e.15, got 1e-46"),
        ([torch.zeros(3)], None, TypeError, "a to be a number, got NoneType"),
        ([torch.zeros(3)], torch.ones((), requires_grad=True), TypeError, "number, got Tensor"),
    ],
)
def test_bad_input_is_named(tensors, a, error, message):
    with pytest.raises(error, match=message):
        transformed_l1(tensors, a)


def test_explicit_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(
        "tscnc_kernels._backend.why_no_triton", lambda device: "no GPU in this test"
    )
    with pytest.raises(RuntimeError, match="'triton' cannot run on cpu: no GPU in this test"):
        tscnc_kernels.transformed_l1([torch.ones(3)], backend="triton")


def test_vmap_over_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one example, got 0"):
        torch.func.vmap(lambda t: transformed_l1([t]))(torch.zeros(0, 3))
