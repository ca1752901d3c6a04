import itertools

import pytest
import torch

from tests.ops.test_masked_linear import pattern
from tscnc_kernels import masked_linear
from tscnc_kernels._masked_algorithms import ALGORITHMS, Algorithms, choose
from tscnc_kernels.ops import masked_linear as op


def test_the_model_is_sparse_where_little_is_kept():
    sparse, dense = pattern(300, 300), pattern(300, 300, "full")
    assert choose("masked_linear", sparse, "native", None) == ("panel",) * 3
    assert sparse.blocked_rows.numel() and sparse.blocked_permutation.numel() and sparse.is_blocked
    assert choose("masked_linear", sparse, "native", None) == ("blocked",) * 3
    assert choose("masked_linear", dense, "native", None) == ("dense",) * 3
    assert choose("masked_linear", sparse, "reference", None) == ("dense",) * 3
    assert choose("masked_linear", dense, "native", None, "panel") == ("panel",) * 3


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


def test_dense_algorithm_trusts_assume_masked_and_still_masks_the_gradient():
    kept = pattern(8, 6)
    weight = torch.ones(8, 6, requires_grad=True)
    output = masked_linear(torch.ones(1, 6), weight, kept, assume_masked=True, algorithm="dense")
    assert output.tolist() == [[6.0] * 8]
    output.sum().backward()
    assert torch.equal(weight.grad != 0, kept.mask)
