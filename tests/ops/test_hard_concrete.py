import math

import pytest
import torch

from tests.op_suite import OpSpec, OpSuite, check_close
from tscnc_kernels.ops.hard_concrete import (
    hard_concrete,
    hard_concrete_active_probability,
    reference,
)


def sampled(make):
    """An odd number of gates, some of them clipped, and noise."""
    log_alpha = make(37, 3)
    noise = torch.linspace(0.01, 0.99, 111).reshape(37, 3).to(log_alpha)
    return (2 * log_alpha, Noise(noise)), {}


class Noise:
    """Hides the noise from the suite, which differentiates every tensor it finds."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def with_noise(function):
    def call(log_alpha, noise=None, **kwargs):
        uniform = None if noise is None else noise.tensor.to(log_alpha)
        return function(log_alpha, uniform, **kwargs)

    return call


def raw_calls():
    ops = torch.ops.tscnc_kernels
    log_alpha, uniform, grad = torch.randn(5, 3), torch.rand(5, 3), torch.randn(5, 3)
    constants = (2 / 3, -0.1, 1.1)
    return [
        (ops.hard_concrete.default, (log_alpha, uniform, *constants)),
        (ops.hard_concrete.default, (log_alpha, None, *constants)),
        (ops.hard_concrete_backward.default, (grad, log_alpha, uniform, *constants)),
        (ops.hard_concrete_backward.default, (grad, log_alpha, None, *constants)),
    ]


class TestHardConcrete(OpSuite):
    spec = OpSpec(
        name="hard_concrete",
        public=with_noise(hard_concrete),
        reference=with_noise(reference),
        samples={
            "test_time": lambda make: ((make(67),), {}),
            "test_time_constants": lambda make: ((make(5, 2),), {"gamma": -0.4, "zeta": 1.7}),
            "sample": sampled,
            "empty": lambda make: ((make(0),), {}),
        },
        raw_calls=raw_calls,
    )


SIGMOID = {0.0: 0.5, math.log(3): 0.75, -math.log(3): 0.25}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("log_alpha", "s"), SIGMOID.items())
def test_hand_worked_test_time_gates(backend, log_alpha, s):
    gate = hard_concrete(torch.tensor([log_alpha]), backend=backend)
    assert gate.item() == pytest.approx(1.2 * s - 0.1, abs=1e-6)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_hand_worked_samples_and_slopes(backend):
    # With β = 1, log_alpha = log 3 and u = 1/2: s = 3/4. With u = 1/4, logit(u) = −log 3: s = 1/2.
    log_alpha = torch.full((2,), math.log(3), dtype=torch.float64, requires_grad=True)
    uniform = torch.tensor([0.5, 0.25], dtype=torch.float64)
    gates = hard_concrete(log_alpha, uniform, beta=1.0, backend=backend)
    assert gates.tolist() == pytest.approx([0.8, 0.5], abs=1e-12)
    (gradient,) = torch.autograd.grad(gates.sum(), log_alpha)
    assert gradient.tolist() == pytest.approx([1.2 * 3 / 16, 1.2 / 4], abs=1e-12)


def test_sampled_gates_follow_their_law():
    log_alpha = torch.full((200_000,), 0.5, dtype=torch.float64)
    uniform = torch.rand(200_000, dtype=torch.float64)
    gates = hard_concrete(log_alpha, uniform)
    active = hard_concrete_active_probability(log_alpha[:1]).item()
    assert (gates > 0).double().mean().item() == pytest.approx(active, abs=5e-3)
    # By the symmetry u → 1 − u, log_alpha → −log_alpha, γ → 1 − ζ a gate is open as often as its
    # mirror is closed.
    mirrored = hard_concrete_active_probability(-log_alpha[:1]).item()
    assert (gates == 1).double().mean().item() == pytest.approx(1 - mirrored, abs=5e-3)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_extremes_are_exact_and_have_no_gradient(backend, dtype, isa):
    big = torch.finfo(dtype).max
    cases = [  # log_alpha, u, gate
        (5.0, 0.0, 0.0),
        (-5.0, 1.0, 1.0),
        (big, 0.5, 1.0),
        (-big, 0.5, 0.0),
        (math.inf, 0.0, 1.0),
        (-math.inf, 1.0, 0.0),
        (80.0, 0.25, 1.0),
        (-80.0, 0.75, 0.0),
    ]
    log_alpha, uniform, expected = (torch.tensor(c, dtype=dtype) for c in zip(*cases, strict=True))
    log_alpha.requires_grad_()
    gates = hard_concrete(log_alpha, uniform, backend=backend)
    assert torch.equal(gates, expected)
    (gradient,) = torch.autograd.grad(gates.sum(), log_alpha)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    at_test_time = hard_concrete(log_alpha, backend=backend)
    assert at_test_time[2:].tolist() == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_nan_and_noise_outside_its_range_give_nan(backend, isa):
    log_alpha = torch.tensor([math.nan, 0.0, 0.0, 0.0, 0.0], requires_grad=True)
    uniform = torch.tensor([0.5, math.nan, -0.25, 1.5, 0.5])
    gates = hard_concrete(log_alpha, uniform, backend=backend)
    assert gates.isnan().tolist() == [True, True, True, True, False]
    (gradient,) = torch.autograd.grad(gates.sum(), log_alpha)
    assert gradient.isnan().tolist() == [True, True, True, True, False]


def test_accurate_over_the_whole_range_of_noise(isa):
    log_alpha = torch.linspace(-6, 6, 4001).repeat(25)
    uniform = torch.rand(log_alpha.shape[0]).pow(3)
    gates = hard_concrete(log_alpha, uniform)
    check_close(gates, reference(log_alpha.double(), uniform.double()), 1e-6, "gates")


def test_active_probability_golden_value():
    # Initialisation with drop rate 0.3, math: P(z ≠ 0) = 0.92026072.
    log_alpha = torch.tensor(math.log(0.7 / 0.3), dtype=torch.float64, requires_grad=True)
    active = hard_concrete_active_probability(log_alpha)
    assert active.item() == pytest.approx(0.92026072, abs=1e-8)
    (gradient,) = torch.autograd.grad(active, log_alpha)
    assert gradient.item() == pytest.approx(active.item() * (1 - active.item()))


@pytest.mark.parametrize(
    ("log_alpha", "uniform", "constants", "error", "message"),
    [
        (1.0, None, {}, TypeError, "log_alpha to be a tensor, got float"),
        (torch.zeros(3, dtype=torch.int32), None, {}, TypeError, "got torch.int32"),
        (torch.zeros(3), torch.zeros(4), {}, ValueError, r"shape \(3,\), got \(4,\)"),
        (torch.zeros(3), torch.zeros(3).double(), {}, TypeError, "got torch.float64"),
        (torch.zeros(3), torch.zeros(3, device="meta"), {}, ValueError, "device cpu, got meta"),
        (torch.zeros(3).to_sparse(), None, {}, ValueError, "torch.sparse_coo"),
        (torch.zeros(3), None, {"beta": 0.0}, ValueError, "beta <= 1e.15, got 0.0"),
        (torch.zeros(3), None, {"gamma": 0.1}, ValueError, "gamma <= -1e-15, got 0.1"),
        (torch.zeros(3), None, {"gamma": -1e300}, ValueError, "-1e.15 <= gamma .* got -1e.300"),
        (torch.zeros(3), None, {"zeta": math.nan}, ValueError, "zeta <= 1e.15, got nan"),
        (torch.zeros(3), None, {"zeta": 1.0}, ValueError, "zeta <= 1e.15, got 1.0"),
        (torch.zeros(3), None, {"beta": "1"}, TypeError, "beta to be a number, got str"),
    ],
)
def test_bad_input_is_named(log_alpha, uniform, constants, error, message):
    with pytest.raises(error, match=message):
        hard_concrete(log_alpha, uniform, **constants)
