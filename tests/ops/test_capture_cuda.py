"""Ops without a suite of their own on a GPU: nothing waits for it, and graphs replay steps."""

import functools

import pytest
import torch

from tests.op_suite import check_capture
from tests.ops.test_masked_linear import pattern
from tscnc_kernels import (
    condition_number_penalty,
    gated_transformed_l1,
    gram_iteration,
    hard_concrete_active_probability,
    transformed_l1_prox,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SHAPES = [(24, 16), (5, 40), (130, 150)]


def weights():
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(shape, generator=generator).cuda().requires_grad_() for shape in SHAPES]


@functools.cache
def on_gpu():
    return KEPT.to("cuda")


def gates(found):
    return [torch.zeros(len(weight), device="cuda", requires_grad=True) for weight in found]


KEPT = pattern(*SHAPES[0])  # a GPU's pattern is built there, which waits


CALLS = {
    "gated_transformed_l1": lambda w: gated_transformed_l1(w, gates(w), rho=2.0),
    "transformed_l1_prox": lambda w: sum(transformed_l1_prox(t, 0.1).sum() for t in w),
    "gram_iteration": lambda w: sum(gram_iteration(t, 4) for t in w),
    "active_probability": lambda w: sum(hard_concrete_active_probability(t).sum() for t in w),
    "logdet": lambda w: condition_number_penalty(w, form="logdet"),
    "scale_invariant": lambda w: condition_number_penalty(w),
    "pattern": lambda w: on_gpu().scatter(on_gpu().gather(w[0])).sum(),
}


@pytest.mark.parametrize("name", CALLS)
def test_cuda_steps_never_wait_and_replay_from_a_graph(name):
    found = weights()
    if name == "pattern":
        del found[1:]

    def step():
        value = CALLS[name](found)
        return [value.detach(), *torch.autograd.grad(value, found)]

    check_capture(step)
