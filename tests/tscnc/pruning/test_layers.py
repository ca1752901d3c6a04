"""Which weights are prunable, and that masked layers are pruned and scored like what they hold."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tscnc.pruning import (
    effective_masks,
    iterative_masks,
    masks_from_scores,
    prunable,
    scores,
    sparsity_report,
)
from tscnc_kernels.nn import sparsify

NAMES = ["0.weight", "2.weight", "4.weight"]


def dense_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)
    ).double()


def masks_of(model: nn.Module, density: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(weight.shape, generator=generator) < density
        for name, weight in prunable(model).items()
    }


def test_prunable_are_the_weights_of_linear_and_convolution_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.LayerNorm(2)),
        nn.ConvTranspose2d(2, 2, 2),
    )
    weights = prunable(model)
    assert list(weights) == ["0.weight", "2.1.weight"]
    assert weights["0.weight"] is model[0].weight
    assert list(prunable(nn.Linear(2, 2))) == ["weight"]


@pytest.mark.parametrize("mode", ["dense", "values"])
def test_masked_layers_keep_their_names_and_dense_shapes(mode: str) -> None:
    model = dense_model()
    masks = masks_of(model)
    masked = copy.deepcopy(model)
    sparsify(masked, masks, mode=mode)
    for name, weight in prunable(masked).items():
        torch.testing.assert_close(weight, model.get_parameter(name) * masks[name])
    assert list(prunable(masked)) == NAMES


@pytest.mark.parametrize("mode", ["dense", "values"])
@pytest.mark.parametrize("name", ["magnitude", "lamp", "snip", "grasp", "synflow", "random"])
def test_masked_layers_score_as_the_masked_dense_model(name: str, mode: str) -> None:
    model = dense_model()
    masks = masks_of(model)
    masked = copy.deepcopy(model)
    sparsify(masked, masks, mode=mode)
    input, target = torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 4

    def run(network: nn.Module, **arguments: dict[str, Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(2)
        score = getattr(scores, name)
        got: dict[str, Tensor] = score(
            network,
            batches=[(input, target)],
            example_input=input,
            generator=generator,
            **arguments,
        )
        return got

    expected, got = run(model, masks=masks), run(masked)
    for key in NAMES:
        torch.testing.assert_close(got[key], expected[key])


@pytest.mark.parametrize("how", ["graph", "exact"])
@pytest.mark.parametrize("mode", ["dense", "values"])
def test_masked_layers_bring_their_own_masks(mode: str, how: str) -> None:
    model = dense_model()
    masks = masks_of(model, 0.15)
    masked = copy.deepcopy(model)
    sparsify(masked, masks, mode=mode)
    example = torch.zeros(1, 6)
    expected = effective_masks(model, masks, example, how)  # type: ignore[arg-type]
    got = effective_masks(masked, {}, example, how)  # type: ignore[arg-type]
    assert all(torch.equal(got[name], expected[name]) for name in NAMES)
    assert sparsity_report(masked, {}, example) == sparsity_report(model, masks, example)
    looser = {name: torch.ones_like(mask) for name, mask in masks.items()}
    assert sparsity_report(masked, looser, example) == sparsity_report(model, masks, example)


@pytest.mark.parametrize("mode", ["dense", "values"])
def test_a_masked_model_is_pruned_further(mode: str) -> None:
    masked = dense_model()
    start = masks_from_scores(scores.magnitude(masked), 0.5, quota="uniform")
    sparsify(masked, start, mode=mode)
    before = {name: value.clone() for name, value in masked.state_dict().items()}
    masks = iterative_masks(scores.synflow, masked, 0.8, steps=5, example_input=torch.zeros(1, 6))
    assert all(not (masks[name] & ~start[name]).any() for name in NAMES)
    assert sum(int(mask.sum()) for mask in masks.values()) == 40
    assert all(torch.equal(before[name], value) for name, value in masked.state_dict().items())


def test_a_masked_layer_alone_is_a_model_too() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    mask = torch.tensor([[True, False, True], [False, False, False]])
    sparsify(model, {"0": mask}, mode="values")
    assert torch.equal(effective_masks(model[0], {}, torch.zeros(1, 3), "exact")["weight"], mask)


def test_scoring_draws_nothing_from_the_global_generator() -> None:
    model = dense_model()
    sparsify(model, masks_of(model), mode="values")
    state = torch.get_rng_state()
    scores.synflow(model, example_input=torch.zeros(1, 6))
    effective_masks(model, {}, torch.zeros(1, 6), "exact")
    assert torch.equal(torch.get_rng_state(), state)
