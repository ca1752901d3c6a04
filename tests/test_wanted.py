"""Which gradients a pass wants is asked without torch's refusals where that is possible."""

from collections.abc import Iterator

import pytest
import torch

from tscnc_kernels import SparsityPattern, _wanted, masked_linear
from tscnc_kernels.ops import masked_linear as op


class Spy:
    """Counts what torch is asked, and what it refuses to answer."""

    def __init__(self) -> None:
        self.asked = self.refused = 0
        self.ask = _wanted._will_run
        self.needs: list[list[bool]] = []

    def __call__(self, node) -> bool:
        self.asked += 1
        try:
            return self.ask(node)
        except RuntimeError:
            self.refused += 1
            raise


@pytest.fixture
def spy(monkeypatch) -> Iterator[Spy]:
    spy = Spy()

    def remember(*args):
        spy.needs.append(_wanted.wanted_gradients(*args))
        return spy.needs[-1]

    monkeypatch.setattr(_wanted, "_will_run", spy)
    monkeypatch.setattr(op, "wanted_gradients", remember)
    monkeypatch.setattr(_wanted._Refusals, "last", -1)
    monkeypatch.setattr(_wanted._Refusals, "last_for_leaf_input", -_wanted.PATIENCE)
    return spy


@pytest.fixture
def network():
    """Two masked layers: the parameters and the function of an input."""
    torch.manual_seed(0)
    patterns = [SparsityPattern.from_mask(torch.rand(8, 8) < 0.5) for _ in range(2)]
    weights = [torch.randn(p.nnz, requires_grad=True) for p in patterns]
    biases = [torch.randn(8, requires_grad=True) for _ in range(2)]

    def loss(x: torch.Tensor) -> torch.Tensor:
        for pattern, weight, bias in zip(patterns, weights, biases, strict=True):
            x = masked_linear(x, weight, pattern, bias, "relu")
        return x.square().sum()

    return [*weights, *biases], loss


def test_an_attack_computes_the_input_s_gradient_alone_and_is_never_refused(spy, network) -> None:
    _, loss = network
    x = torch.randn(4, 8, requires_grad=True)
    (found,) = torch.autograd.grad(loss(x), x)
    assert spy.needs == [[True, False, False]] * 2 and spy.refused == 0
    loss(x).backward()
    torch.testing.assert_close(found, x.grad)
    assert spy.needs[2:] == [[True, True, True]] * 2 and spy.refused == 0


def test_one_refusal_is_enough_for_a_pass(spy, network) -> None:
    parameters, loss = network
    x = torch.randn(4, 8)
    found = torch.autograd.grad(loss(x), parameters)
    assert spy.refused == 1
    loss(x).backward()
    for gradient, parameter in zip(found, parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_a_layer_that_is_refused_over_and_over_asks_seldom(spy) -> None:
    pattern = SparsityPattern.from_mask(torch.eye(5, dtype=torch.bool))
    x, w, b = torch.randn(3, 5), torch.randn(5), torch.randn(5)
    tensors = [t.requires_grad_() for t in (x, w, b)]
    for _ in range(2 * _wanted.PATIENCE):
        output = masked_linear(x, w, pattern, b)
        assert None not in torch.autograd.grad(output, tensors, torch.ones(3, 5))
    assert spy.asked == spy.refused == 2


def test_impatience_costs_time_but_never_a_gradient(spy) -> None:
    pattern = SparsityPattern.from_mask(torch.eye(5, dtype=torch.bool))
    x, w, b = (torch.randn(size).requires_grad_() for size in ((3, 5), (5,), (5,)))

    def ask_for(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(masked_linear(x, w, pattern, b), tensors, torch.ones(3, 5))

    every = ask_for(x, w, b)
    torch.testing.assert_close(ask_for(x)[0], every[0])
    torch.testing.assert_close(ask_for(b)[0], every[2])
    assert spy.needs == [[True, True, True]] * 3 and spy.asked == 1
