"""Effective masks on networks small enough to follow by hand, and what random pruning is worth."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tscnc.pruning import (
    effective_masks,
    masks_for_effective_sparsity,
    masks_from_scores,
    prunable,
    quotas,
    scores,
    sparsity_report,
)
from tscnc.pruning.effective import Mode

MODES: list[Mode] = ["graph", "exact"]


def boolean(rows: list[Any]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def random_masks(model: nn.Module, density: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(weight.shape, generator=generator) < density
        for name, weight in prunable(model).items()
    }


@pytest.mark.parametrize("mode", MODES)
def test_an_mlp_by_hand(mode: Mode) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2), nn.Softmax(dim=1))
    masks = {
        "0.weight": boolean([[1, 1, 0], [0, 0, 0], [0, 0, 1]]),
        "2.weight": boolean([[1, 1, 0], [0, 1, 0]]),
    }
    # Hidden unit 1 has no input and unit 2 no output, so only the paths through unit 0 remain.
    got = effective_masks(model, masks, torch.zeros(1, 3), mode)
    assert got["0.weight"].tolist() == [[True, True, False], [False] * 3, [False] * 3]
    assert got["2.weight"].tolist() == [[True, False, False], [False, False, False]]


@pytest.mark.parametrize("mode", MODES)
def test_flattening_a_convolution_by_hand(mode: Mode) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    conv = boolean([[1, 0], [0, 1], [0, 0]])[:, :, None, None]
    linear = torch.zeros(2, 12, dtype=torch.bool)
    linear[0, 3] = linear[1, 8] = True  # the last position of channel 0, the first of channel 2
    got = effective_masks(model, {"0": conv, "3": linear}, torch.zeros(1, 2, 2, 2), mode)
    assert got["0.weight"][:, :, 0, 0].tolist() == [[True, False], [False, False], [False, False]]
    assert got["3.weight"].nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize("mode", MODES)
def test_grouped_convolutions_do_not_mix_their_groups(mode: Mode) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))
    first = boolean([[1, 0], [0, 1], [1, 1], [0, 0]])[:, :, None, None]
    second = boolean([[0, 1, 1, 1]])[:, :, None, None]
    got = effective_masks(model, {"0": first, "2": second}, torch.zeros(1, 4, 2, 2), mode)
    alive = [[False, False], [False, True], [True, True], [False, False]]
    assert got["0.weight"][:, :, 0, 0].tolist() == alive
    assert got["2.weight"].flatten().tolist() == [False, True, True, False]


@pytest.mark.parametrize("mode", MODES)
def test_a_disconnected_network_has_no_active_weight(mode: Mode) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    masks = {"2.weight": torch.zeros(4, 4, dtype=torch.bool)}
    got = effective_masks(model, masks, torch.zeros(1, 4), mode)
    assert list(got) == ["0.weight", "2.weight", "4.weight"]
    assert not any(mask.any() for mask in got.values())
    report = sparsity_report(model, masks, torch.zeros(1, 4), mode=mode)
    assert report["effective"] == 1 and report["effective_compression"] == math.inf
    assert report["direct"] == pytest.approx(16 / 40)
    assert report["direct_compression"] == pytest.approx(40 / 24)
    assert report["layers"]["0.weight"] == {"density": 1.0, "effective_density": 0.0}


def test_everything_pruned_is_reported_as_infinite_compression() -> None:
    layer = nn.Linear(3, 2)
    report = sparsity_report(layer, {"weight": torch.zeros(2, 3, dtype=torch.bool)}, mode="graph")
    assert report["direct"] == 1 and report["direct_compression"] == math.inf


@pytest.mark.parametrize("mode", MODES)
def test_an_unpruned_model_is_fully_active(mode: Mode) -> None:
    report = sparsity_report(lenet(), {}, torch.zeros(1, 1, 28, 28), mode=mode)
    assert report["direct"] == report["effective"] == 0
    assert report["direct_compression"] == report["effective_compression"] == 1


def test_only_the_exact_mode_sees_taps_that_meet_the_padding() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(), nn.Linear(1, 1))
    corner = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    corner[0, 0, 0, 0] = True  # on an image of one pixel only the middle tap meets it
    image = torch.zeros(1, 1, 1, 1)
    assert effective_masks(model, {"0": corner}, image, "graph")["0.weight"].any()
    exact = effective_masks(model, {"0": corner}, image, "exact")
    assert not exact["0.weight"].any() and not exact["2.weight"].any()


class Residual(nn.Module):
    """input -> stem -> (+ branch) -> head, in the ways models write it."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.shift = nn.Parameter(torch.ones(2))
        self.style = style

    def forward(self, input: Tensor) -> Tensor:
        x = F.gelu(self.stem(input)) + self.shift
        if self.style == "operator":
            x = x + self.branch(x).relu_()
        elif self.style == "in place":
            x += -self.branch(x)
        elif self.style == "method in place":
            x.add_(self.branch(x), alpha=0.5)
        elif self.style == "aliased":
            y = F.relu(x)
            y += self.branch(x)
            x = y
        else:
            x = torch.sub(self.branch(x), x)
        output: Tensor = self.head(x / 2 - 1)
        return output


@pytest.mark.parametrize(
    "style", ["operator", "in place", "method in place", "aliased", "subtraction"]
)
def test_a_residual_connection_by_hand(style: str) -> None:
    masks = {
        "stem": boolean([[1, 0], [0, 0]]),
        "branch": boolean([[1, 0], [0, 1]]),
        "head": boolean([[1, 1], [0, 1]]),
    }
    # Unit 1 has no input: neither the skip connection nor the branch gives it any.
    got = effective_masks(Residual(style), masks, torch.zeros(1, 2), "exact")
    assert got["stem.weight"].tolist() == [[True, False], [False, False]]
    assert got["branch.weight"].tolist() == [[True, False], [False, False]]
    assert got["head.weight"].tolist() == [[True, False], [False, False]]
    # With the branch pruned away the skip connection still carries unit 0.
    masks["branch"] = boolean([[0, 0], [0, 0]])
    got = effective_masks(Residual(style), masks, torch.zeros(1, 2), "exact")
    assert got["head.weight"].tolist() == [[True, False], [False, False]]
    # With the skip's receiving end pruned away, a branch across the units keeps the path open.
    masks |= {"branch": boolean([[0, 0], [1, 0]]), "head": boolean([[0, 1], [0, 0]])}
    got = effective_masks(Residual(style), masks, torch.zeros(1, 2), "exact")
    assert got["branch.weight"].tolist() == [[False, False], [True, False]]
    assert got["stem.weight"][0, 0]


class ResidualCNN(nn.Module):
    """A small ResNet: a block with an identity skip and one with a strided projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1, bias=False)
        self.conv1, self.norm1 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.norm2 = nn.Conv2d(3, 4, 3, 2, padding=1, bias=False), nn.BatchNorm2d(4)
        self.project = nn.Conv2d(3, 4, 1, stride=2, bias=False)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.AvgPool2d(2)
        self.head = nn.Linear(4, 2, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        x = self.relu(self.stem(input))
        y = self.norm1(self.conv1(x))
        y += x
        x = self.relu(y)
        y = self.norm2(self.conv2(x))
        y += self.project(x)
        output: Tensor = self.head(self.pool(self.relu(y)).flatten(1))
        return output


@pytest.mark.parametrize("seed", range(3))
def test_a_weight_is_active_if_and_only_if_the_output_depends_on_it(seed: int) -> None:
    model, image = ResidualCNN().double().eval(), torch.ones(1, 1, 4, 4, dtype=torch.float64)
    masks = random_masks(model, 0.25, seed)
    exact = effective_masks(model, masks, image, "exact")
    # With positive weights and zero biases nothing cancels and every ReLU is open.
    weights = prunable(model)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(masks[name] * (0.5 + torch.rand_like(weight)))
        reference = model(image).sum()
        for name, weight in weights.items():
            for place in masks[name].nonzero().tolist():
                weight[tuple(place)] += 1
                depends = bool(model(image).sum() - reference > 1e-9)
                weight[tuple(place)] -= 1
                assert depends == bool(exact[name][tuple(place)]), (name, place)
    active = sum(int(mask.sum()) for mask in exact.values())
    assert 0 < active < sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("seed", range(4))
def test_both_modes_agree_on_random_mlps(seed: int) -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 9),
        nn.Dropout(), nn.LeakyReLU(), nn.Sequential(nn.Linear(9, 6), nn.Sigmoid()), nn.Linear(6, 4),
    )  # fmt: skip
    masks = random_masks(model, 0.2, seed)
    graph = effective_masks(model, masks, mode="graph")
    exact = effective_masks(model, masks, torch.zeros(1, 3, 4), "exact")
    assert all(torch.equal(graph[name], exact[name]) for name in masks)
    assert any(not torch.equal(graph[name], masks[name]) for name in masks)


@pytest.mark.parametrize("seed", range(3))
def test_exact_is_the_support_of_synflow_on_a_cnn(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, stride=2, padding=2, dilation=2), nn.ELU(), nn.AdaptiveMaxPool2d(2),
        nn.Flatten(), nn.Linear(24, 3), nn.LogSoftmax(dim=1),
    )  # fmt: skip
    image = torch.zeros(1, 2, 9, 9)
    masks = random_masks(model, 0.06, seed)
    exact = effective_masks(model, masks, image, "exact")
    graph = effective_masks(model, masks, image, "graph")
    flow = scores.synflow(model, masks=masks, example_input=image)
    for name in masks:
        assert torch.equal(exact[name], flow[name] > 0)
        assert not (exact[name] & ~graph[name]).any()
    assert any(exact[name].any() for name in masks)


def test_the_exact_mode_survives_a_depth_at_which_products_overflow() -> None:
    model = nn.Sequential(*[nn.Linear(40, 40, bias=False) for _ in range(300)])
    assert torch.tensor(40.0, dtype=torch.float64).pow(300).isinf()  # paths through one weight
    eye = torch.eye(40, dtype=torch.bool)
    masks = {"3.weight": eye, "150.weight": eye, "296.weight": eye}
    got = effective_masks(model, masks, torch.zeros(1, 40), "exact")
    assert all(torch.equal(got[name], eye) for name in masks)
    assert all(mask.all() for name, mask in got.items() if name not in masks)


def test_weights_that_are_zero_but_not_pruned_stay_active() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    nn.init.zeros_(model[0].weight)
    assert all(m.all() for m in effective_masks(model, {}, torch.zeros(1, 3), "exact").values())


def test_the_model_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    effective_masks(model, {}, torch.zeros(1, 3), "exact")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training and model[0].weight.requires_grad and model[0].weight.grad is None


def test_random_pruning_of_lenet_at_100x_direct_compression() -> None:
    """The effective compression depends on the quota: about 1,074 uniform, 115 ERK, 102 IGQ."""
    model = lenet()

    def compressions(quota: Any, seeds: int) -> list[float]:
        results = []
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            masks = masks_from_scores(scores.random(model, generator=generator), 0.99, quota=quota)
            report = sparsity_report(model, masks, mode="graph")
            assert report["direct_compression"] == pytest.approx(100, rel=1e-3)
            results.append(report["effective_compression"])
        return results

    uniform, erk, igq = compressions("uniform", 16), compressions("erk", 4), compressions("igq", 4)
    assert 848 < sum(uniform) / 16 < 1386
    assert 110 < sum(erk) / 4 < 120
    assert 101 < sum(igq) / 4 < 103


@pytest.mark.parametrize("quota", ["global", "igq"])
def test_an_effective_sparsity_is_met_with_the_fewest_weights(quota: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20), nn.Linear(20, 5))
    ranking = scores.magnitude(model)
    masks = masks_for_effective_sparsity(model, ranking, 0.9, quota=quota, mode="graph")
    report = sparsity_report(model, masks, mode="graph")
    assert report["effective"] <= 0.9
    total, kept = 1300, sum(int(mask.sum()) for mask in masks.values())
    one_less = masks_from_scores(ranking, 1 - (kept - 1) / total, quota=quota)
    assert sparsity_report(model, one_less, mode="graph")["effective"] > 0.9
    assert report["direct"] < 0.9


def test_an_effective_sparsity_of_zero_keeps_everything() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    masks = masks_for_effective_sparsity(model, scores.magnitude(model), 0.0, mode="graph")
    assert all(mask.all() for mask in masks.values())
    with pytest.raises(ValueError, match=r"in \[0, 1\), got 1"):
        masks_for_effective_sparsity(model, scores.magnitude(model), 1, mode="graph")


def test_an_effective_sparsity_below_the_model_s_own_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(), nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"sparser than 0\.1 already"):
        masks_for_effective_sparsity(
            model, scores.magnitude(model), 0.1, torch.zeros(1, 1, 1, 1), mode="exact"
        )


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Residual("operator"), "a Residual"),
        (nn.Sequential(nn.Linear(4, 4), nn.GLU(), nn.Linear(2, 2)), "a GLU"),
        (nn.Sequential(nn.Conv2d(1, 4, 1), nn.Linear(4, 4)), "images that are not flattened"),
        (nn.Sequential(nn.Conv2d(1, 4, 1), nn.Flatten(2), nn.Linear(4, 4)), "keeps a dimension"),
        (nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 2)), "3 units into the 4 inputs"),
        (nn.Sequential(*[nn.Linear(4, 4)] * 2), "used twice"),
    ],
)
def test_the_graph_mode_refuses_what_it_cannot_follow(model: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=f"cannot follow .*{reason}.*use mode='exact'"):
        effective_masks(model, {}, mode="graph")


def test_the_exact_mode_refuses_what_it_cannot_linearise() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, input: Tensor) -> Tensor:
            return self.layer(input).sort().values

    with pytest.raises(ValueError, match=r"calls sort, for which there is no linearised form"):
        effective_masks(Sorted(), {}, torch.zeros(1, 4), "exact")
    pooled = nn.Sequential(nn.Conv2d(1, 1, 1), nn.MaxPool2d(2, dilation=2))
    with pytest.raises(ValueError, match="dilation 2"):
        effective_masks(pooled, {}, torch.zeros(1, 1, 4, 4), "exact")


def test_bad_arguments_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="unknown mode 'Graph'"):
        effective_masks(model, {}, mode="Graph")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs an example_input"):
        effective_masks(model, {}, mode="exact")
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        effective_masks(model, {}, torch.zeros(1, 3, dtype=torch.int64), "exact")
    with pytest.raises(TypeError, match=r"bool tensor as mask of '0', got torch\.float32"):
        effective_masks(model, {"0": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=r"shape \(2, 3\) for '0', got \(3, 2\)"):
        effective_masks(model, {"0": torch.ones(3, 2, dtype=torch.bool)})


def test_quotas_and_masks_agree_on_the_layers_densities() -> None:
    model = lenet()
    masks = masks_from_scores(scores.random(model), 0.99)
    densities = quotas.igq([tuple(weight.shape) for weight in prunable(model).values()], 0.99)
    layers = sparsity_report(model, masks, mode="graph")["layers"]
    got = [layers[name]["density"] for name in masks]
    sizes = [weight.numel() for weight in prunable(model).values()]
    for density, quota, size in zip(got, densities, sizes, strict=True):
        assert abs(density - quota) * size < 1
