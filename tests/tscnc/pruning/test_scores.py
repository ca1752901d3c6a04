"""Scores against hand-worked values and directly computed derivatives."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tscnc.pruning import iterative_masks, masks_from_scores, prunable, scores

ALL = {
    name: getattr(scores, name)
    for name in ("magnitude", "lamp", "snip", "grasp", "synflow", "random")
}
Score = Callable[..., dict[str, Tensor]]


def small_mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)


def small_cnn() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


def batches_of(shape: tuple[int, ...], count: int = 3) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(3)
    return [
        (torch.randn(8, *shape, dtype=torch.float64), torch.randint(4, (8,))) for _ in range(count)
    ]


def half_masks(model: nn.Module) -> dict[str, Tensor]:
    torch.manual_seed(4)
    return {name: torch.rand(weight.shape) < 0.5 for name, weight in prunable(model).items()}


def run(score: Score, model: nn.Module, **arguments: object) -> dict[str, Tensor]:
    """The score with every argument that any score needs."""
    dtype = next(model.parameters()).dtype
    shape = (6,) if isinstance(model[0], nn.Linear) else (1, 4, 4)  # type: ignore[index]
    batches = [(input.to(dtype), target) for input, target in batches_of(shape)]
    given = {
        "batches": batches,
        "example_input": batches[0][0],
        "generator": torch.Generator().manual_seed(5),
    }
    return score(model, **(given | arguments))


def test_magnitude_is_the_absolute_value() -> None:
    model = small_mlp()
    got = scores.magnitude(model)
    assert torch.equal(got["0.weight"], model[0].weight.detach().abs())


def test_lamp_by_hand() -> None:
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, -2.0, 3.0], [0.0, -1.0, 2.0]])
    # Squares 1 4 9 0 1 4; from each square upwards they sum to 19 17 9 19 19 17.
    expected = torch.tensor([[1 / 19, 4 / 17, 1.0], [0.0, 1 / 19, 4 / 17]], dtype=torch.float64)
    torch.testing.assert_close(scores.lamp(layer)["weight"], expected)


def test_lamp_of_a_layer_of_zeros_is_zero() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    assert torch.equal(scores.lamp(layer)["weight"], torch.zeros(2, 3, dtype=torch.float64))


def test_lamp_leaves_pruned_weights_out_of_the_sums() -> None:
    layer = nn.Linear(3, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0, 3.0]])
    got = scores.lamp(layer, masks={"weight": torch.tensor([[True, True, False]])})
    expected = torch.tensor([[0.2, 1.0, -math.inf]], dtype=torch.float64)
    torch.testing.assert_close(got["weight"], expected)


def test_snip_is_the_average_of_every_batch_s_sensitivity() -> None:
    model, batches = small_mlp(), batches_of((6,))
    got = scores.snip(model, batches=iter(batches))
    for index, name in ((0, "0.weight"), (2, "2.weight")):
        weight = model[index].weight
        expected = torch.zeros_like(weight)
        for input, target in batches:
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(input), target), weight)
            expected += (gradient * weight).abs() / 3
        torch.testing.assert_close(got[name], expected.detach())


def test_grasp_is_weight_times_hessian_gradient_product() -> None:
    model, batches = small_mlp(), batches_of((6,), count=2)
    got = scores.grasp(model, batches=batches)
    names = ["0.weight", "2.weight"]
    sizes = [30, 20]

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split(sizes)  # type: ignore[no-untyped-call]
        weights = {
            name: part.view(model.get_parameter(name).shape)
            for name, part in zip(names, parts, strict=True)
        }
        losses = [
            F.cross_entropy(torch.func.functional_call(model, weights, (input,)), target)
            for input, target in batches
        ]
        return torch.stack(losses).mean()

    flat = torch.cat([model.get_parameter(name).detach().flatten() for name in names])
    gradient = torch.func.grad(loss)(flat)
    hessian = torch.func.hessian(loss)(flat)
    expected = flat * (hessian @ gradient)
    torch.testing.assert_close(torch.cat([got[name].flatten() for name in names]), expected)


def test_synflow_of_an_mlp_is_the_product_of_the_absolute_weights() -> None:
    model = small_mlp()
    got = scores.synflow(model, example_input=torch.zeros(9, 6))
    first, second = (model[index].weight.detach().abs() for index in (0, 2))
    # A weight's score is the sum over its paths: what arrives at it, times it, times what follows.
    torch.testing.assert_close(got["0.weight"], first * second.sum(0)[:, None])
    torch.testing.assert_close(got["2.weight"], second * first.sum(1)[None, :])


def test_synflow_of_a_cnn_is_that_of_its_linear_twin() -> None:
    model = small_cnn()
    got = scores.synflow(model, example_input=torch.zeros(1, 1, 4, 4))
    conv, linear = (model[index].weight.detach().double().abs() for index in (0, 5))
    conv.requires_grad_()
    linear.requires_grad_()
    image = torch.ones(1, 1, 4, 4, dtype=torch.float64)
    output = F.avg_pool2d(F.conv2d(image, conv, padding=1), 2).flatten(1) @ linear.T
    gradients = torch.autograd.grad(output.sum(), [conv, linear])
    torch.testing.assert_close(got["0.weight"], (conv * gradients[0]).detach())
    torch.testing.assert_close(got["5.weight"], (linear * gradients[1]).detach())


class Branching(nn.Module):
    """Computes in place, while what it changes is aliased or was saved by another layer."""

    def __init__(self) -> None:
        super().__init__()
        for name, weight in (("stem", 2.0), ("branch", -3.0), ("head", 5.0), ("side", 7.0)):
            layer = nn.Linear(1, 1)
            nn.init.constant_(layer.weight, weight)
            self.add_module(name, layer)
        self.register_buffer("offset", torch.full((3, 1), 9.0))

    def forward(self, input: Tensor) -> Tensor:
        x = self.stem(input)
        y = torch.tanh(x)
        y += self.branch(x) * 11
        side = self.side(x)
        x += y
        output: Tensor = self.head(x) - side + self.offset
        return output[0]


def test_synflow_of_branches_by_hand() -> None:
    got = scores.synflow(Branching(), example_input=torch.zeros(1, 1))
    # The output is 2·(1 + 1 + 3)·5 + 2·7 = 64; these are its parts that pass through each weight.
    assert {name: score.item() for name, score in got.items()} == {
        "stem.weight": 64,
        "branch.weight": 30,
        "head.weight": 50,
        "side.weight": 14,
    }


def test_synflow_is_conserved_from_layer_to_layer() -> None:
    model = nn.Sequential(*[nn.Linear(7, 7) for _ in range(5)])
    got = scores.synflow(model, example_input=torch.zeros(1, 7), masks=half_masks(model))
    flows = [score[score > -math.inf].sum().item() for score in got.values()]
    assert flows == pytest.approx([flows[0]] * 5)


def test_synflow_reports_an_overflow() -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)])
    for layer in model:
        nn.init.constant_(layer.weight, 1e30)
    with pytest.raises(ValueError, match=r"synflow score of .* is not finite"):
        scores.synflow(model, example_input=torch.zeros(1, 2))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("make", [small_mlp, small_cnn])
def test_every_score_covers_the_layers_and_repeats_itself(
    name: str, make: Callable[[], nn.Module]
) -> None:
    model = make()
    first, second = run(ALL[name], model), run(ALL[name], model)
    assert list(first) == list(prunable(model))
    for key, weight in prunable(model).items():
        assert first[key].shape == weight.shape and first[key].isfinite().all()
        assert not first[key].requires_grad
        assert torch.equal(first[key], second[key])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("make", [small_mlp, small_cnn])
def test_scoring_leaves_the_model_alone(name: str, make: Callable[[], nn.Module]) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    run(ALL[name], model, masks=half_masks(model))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training and all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ALL)
def test_pruned_weights_score_least_and_count_as_zero(name: str) -> None:
    model = small_mlp()
    masks = half_masks(model)
    got = run(ALL[name], model, masks=masks)
    zeroed = small_mlp()
    with torch.no_grad():
        for key, weight in prunable(zeroed).items():
            weight.mul_(masks[key])
    expected = run(ALL[name], zeroed)
    for key, mask in masks.items():
        assert torch.equal(got[key] == -math.inf, ~mask)
        torch.testing.assert_close(got[key][mask], expected[key][mask])


def test_random_scores_follow_their_generator() -> None:
    model = small_mlp()
    draws = [
        scores.random(model, generator=torch.Generator().manual_seed(seed))["0.weight"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_module_names_are_understood_and_unknown_names_refused() -> None:
    model = small_mlp()
    mask = torch.zeros(5, 6, dtype=torch.bool)
    assert (scores.magnitude(model, masks={"0": mask})["0.weight"] == -math.inf).all()
    with pytest.raises(ValueError, match=r"'1', the model has 0\.weight, 2\.weight"):
        scores.magnitude(model, masks={"1": mask})
    with pytest.raises(ValueError, match=r"two masks for '0\.weight'"):
        scores.magnitude(model, masks={"0": mask, "0.weight": mask})
    with pytest.raises(ValueError, match=r"shape \(4, 5\) for '2', got \(5, 6\)"):
        scores.magnitude(model, masks={"2": mask})
    with pytest.raises(TypeError, match=r"got torch\.float32"):
        scores.magnitude(model, masks={"0": mask.float()})


@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_scores_of_data_refuse_to_do_without(name: str) -> None:
    for batches in (None, []):
        with pytest.raises(ValueError, match=f"{name} needs at least one batch"):
            ALL[name](small_mlp(), batches=batches)
    poisoned = [(torch.full((2, 6), math.nan, dtype=torch.float64), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match=f"{name} score of '0.weight' is not finite"):
        ALL[name](small_mlp(), batches=poisoned)


def test_synflow_refuses_to_do_without_an_example_input() -> None:
    with pytest.raises(ValueError, match="needs an example_input"):
        scores.synflow(small_mlp())
    with pytest.raises(TypeError, match=r"float example input, got torch\.int64"):
        scores.synflow(small_mlp(), example_input=torch.zeros(1, 6, dtype=torch.int64))


def test_parametrized_weights_count_as_what_they_are() -> None:
    model = small_mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    got = scores.synflow(model, example_input=torch.zeros(1, 6))
    expected = scores.synflow(small_mlp(), example_input=torch.zeros(1, 6))
    for name, score in expected.items():
        torch.testing.assert_close(got[name], score)
    assert nn.utils.parametrize.is_parametrized(model[0], "weight")


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="ReLU has no Linear or Conv2d layer"):
        scores.magnitude(nn.ReLU())


def test_iterative_synflow_keeps_every_layer_where_one_step_loses_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.Linear(128, 4))
    example = torch.zeros(1, 64)
    once = masks_from_scores(scores.synflow(model, example_input=example), 0.995, quota="global")
    often = iterative_masks(scores.synflow, model, 0.995, example_input=example)
    assert not once["2.weight"].any()
    assert all(mask.any() for mask in often.values())
    total = sum(mask.numel() for mask in often.values())
    assert sum(int(mask.sum()) for mask in often.values()) == math.ceil(0.005 * total)


def test_one_step_of_iterative_pruning_is_plain_pruning() -> None:
    model = small_mlp()
    plain = masks_from_scores(scores.magnitude(model), 0.7, quota="erk")
    stepwise = iterative_masks(scores.magnitude, model, 0.7, steps=1, quota="erk")
    assert all(torch.equal(plain[name], stepwise[name]) for name in plain)


def test_iterative_pruning_only_ever_prunes_more() -> None:
    model, batches = small_mlp(), batches_of((6,))
    start = iterative_masks(scores.magnitude, model, 0.4)
    masks = iterative_masks(scores.snip, model, 0.8, steps=10, masks=start, batches=iter(batches))
    assert all(not (masks[name] & ~start[name]).any() for name in masks)
    assert sum(int(mask.sum()) for mask in masks.values()) == 10
    with pytest.raises(ValueError, match="steps >= 1, got 0"):
        iterative_masks(scores.magnitude, model, 0.5, steps=0)
