"""The penalties: one weighted sum, over dense and pruned layers."""

import math

import pytest
import torch
from torch import nn

from tscnc.config import TrainConfig
from tscnc.layers import dense_weight, prunable_layers
from tscnc.penalties import penalty_terms
from tscnc_kernels.nn import sparsify

WEIGHT = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
MASK = WEIGHT != 0
ONLY = {"weight_decay": 0.0, "tsc": 0.0, "cnc": 0.0}


def two_layers(pruned: bool) -> nn.Sequential:
    """Two layers with the same weight, the first one pruned to its diagonal if asked."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(WEIGHT)
    if pruned:
        sparsify(model, {"0.weight": MASK}, mode="values")
    return model


@pytest.mark.parametrize("pruned", [False, True])
def test_weight_decay_and_tsc_are_their_formulas(pruned: bool) -> None:
    config = TrainConfig(weight_decay=0.5, tsc=0.25, tsc_a=2.0, cnc=0)
    terms = penalty_terms(two_layers(pruned), config, step=0)
    # Each layer holds 3 and 1: squares 10, and (a+1)|w|/(a+|w|) = 3·3/5 + 3·1/3 with a = 2.
    assert terms.keys() == {"weight_decay", "tsc"}
    torch.testing.assert_close(terms["weight_decay"], torch.tensor(0.5 * 0.5 * 20))
    torch.testing.assert_close(terms["tsc"], torch.tensor(0.25 * 2 * (1.8 + 1.0)))


@pytest.mark.parametrize("pruned", [False, True])
def test_cnc_of_two_singular_values_is_its_formula(pruned: bool) -> None:
    config = TrainConfig(**{**ONLY, "cnc": 0.1, "cnc_every": 1})
    term = penalty_terms(two_layers(pruned), config, step=0)["cnc"]
    # Per layer n log(‖W‖²/n) − log det(WWᵀ) = 2 log 5 − log 9, up to the relative ridge of 1e-6.
    expected = 0.1 * 2 * (2 * math.log(5) - math.log(9))
    torch.testing.assert_close(term, torch.tensor(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["scale_invariant", "logdet", "log_kappa", "nenov"])
def test_cnc_sends_finite_gradients_to_the_kept_values(form: str) -> None:
    model = two_layers(pruned=True)
    config = TrainConfig(**{**ONLY, "cnc": 1.0, "cnc_every": 1, "cnc_form": form})
    sum(penalty_terms(model, config, step=0).values()).backward()
    gradients = [parameter.grad for parameter in (model[0].weight, model[1].weight)]
    assert gradients[0].shape == (2,)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


def test_cnc_every_keeps_the_mean_over_the_steps() -> None:
    model = two_layers(pruned=True)
    means = []
    for every in (1, 3):
        config = TrainConfig(**{**ONLY, "cnc": 0.1, "cnc_every": every})
        terms = [penalty_terms(model, config, step) for step in range(6)]
        assert sum("cnc" in term for term in terms) == 6 / every
        means.append(sum(term["cnc"].item() for term in terms if "cnc" in term) / 6)
    assert means[0] == pytest.approx(means[1])


def test_weights_of_0_switch_everything_off() -> None:
    assert penalty_terms(two_layers(pruned=True), TrainConfig(**ONLY), step=0) == {}


def test_layers_are_named_and_seen_the_same_before_and_after_pruning() -> None:
    dense, pruned = two_layers(pruned=False), two_layers(pruned=True)
    assert list(prunable_layers(dense)) == list(prunable_layers(pruned)) == ["0.weight", "1.weight"]
    for layer in prunable_layers(pruned).values():
        assert torch.equal(dense_weight(layer), WEIGHT)
