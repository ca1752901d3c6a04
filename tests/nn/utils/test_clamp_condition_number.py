import math

import pytest
import torch
from torch import nn

from benchmarks.spectra import gaussian
from tscnc_kernels.nn.utils import clamp_condition_number_


@pytest.mark.parametrize("tau", [1.0, 1.1, 1.5, 10.0])
@pytest.mark.parametrize("shape", [(9, 5), (4, 7), (3, 2, 3, 3)])
def test_condition_number_is_at_most_tau_and_the_mean_stays(shape, tau):
    weight = nn.Parameter(gaussian(shape[0], math.prod(shape[1:])).reshape(shape))
    before = torch.linalg.svdvals(weight.detach().flatten(1).double())
    clamp_condition_number_(weight, tau)
    after = torch.linalg.svdvals(weight.detach().flatten(1).double())
    width = (tau - 1) / (tau + 1)
    expected = before.clamp(before.mean() * (1 - width), before.mean() * (1 + width))
    torch.testing.assert_close(after, expected, atol=1e-6, rtol=1e-6)
    assert after[0] / after[-1] <= tau * (1 + 1e-6)


def test_well_conditioned_and_zero_weights_stay():
    weights = [torch.eye(3), torch.zeros(2, 3)]
    clamp_condition_number_(weights, 1.5)
    torch.testing.assert_close(weights, [torch.eye(3), torch.zeros(2, 3)])


def test_rank_is_restored():
    weight = torch.ones(3, 3)
    clamp_condition_number_([weight], 2.0)
    values = torch.linalg.svdvals(weight)
    assert values[0] / values[-1] == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize(
    ("weights", "tau", "error", "message"),
    [
        ([], 1.5, ValueError, "got an empty list"),
        (torch.ones(3), 1.5, ValueError, r"got shape \(3,\)"),
        (torch.eye(2), 0.5, ValueError, "got 0.5"),
        (torch.eye(2).int(), 1.5, TypeError, "got torch.int32"),
    ],
)
def test_bad_input_is_named(weights, tau, error, message):
    with pytest.raises(error, match=message):
        clamp_condition_number_(weights, tau)


def test_nothing_changes_when_one_weight_is_not_finite():
    weights = [torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, math.nan]])]
    with pytest.raises(ValueError, match=r"infinity in weights\[1\]"):
        clamp_condition_number_(weights, 1.1)
    assert weights[0].tolist() == [[2.0, 0.0], [0.0, 1.0]]
