import itertools

import pytest
import torch

from tests.ops.test_masked_linear import pattern
from tscnc_kernels import masked_linear
from tscnc_kernels._masked_algorithms import ALGORITHMS, PANEL_DENSITY, Algorithms, choose
from tscnc_kernels.ops import masked_linear as op


def test_rule_is_sparse_below_the_stated_density():
    below, above = pattern(100, 100), pattern(20, 20, "full")
    assert below.density < PANEL_DENSITY < above.density
    assert choose("op", below, "native", 8) == ("panel",) * 3
    assert choose("op", above, "native", 8) == ("dense",) * 3
    assert choose("op", below, "reference", 8) == ("dense",) * 3
    assert choose("op", above, "native", 8, "panel") == ("panel",) * 3


@pytest.mark.parametrize("algorithms", list(itertools.product(ALGORITHMS, repeat=3)))
def test_every_direction_runs_its_own_algorithm(algorithms, monkeypatch):
    monkeypatch.setattr(op, "choose", lambda *_: Algorithms(*algorithms))
    generator = torch.Generator().manual_seed(0)
    sizes = (7, 5), (6, 5), (6,)
    leaves = [torch.randn(size, generator=generator).requires_grad_() for size in sizes]
    kept = pattern(6, 5)
    results = []
    for call in (masked_linear, op.reference):
        output = call(leaves[0], leaves[1], kept, leaves[2], "gelu")
        results.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
