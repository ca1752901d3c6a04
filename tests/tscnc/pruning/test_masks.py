"""From scores to masks: exact counts, ties, what is refused; HYDRA's initial scores."""

import math

import pytest
import torch

from tscnc.pruning import hydra_scores, masks_from_scores
from tscnc.pruning.masks import Quota

QUOTAS: list[Quota] = ["igq", "erk", "uniform", "uniform_plus", "global"]


def random_scores(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (8, 2, 3, 3), "b.weight": (50, 72), "c.weight": (10, 50)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def count(masks: dict[str, torch.Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


@pytest.mark.parametrize("quota", QUOTAS)
@pytest.mark.parametrize("sparsity", [0.0, 1e-9, 0.3, 0.5, 0.9])
def test_the_number_kept_is_exact(quota: Quota, sparsity: float) -> None:
    scores = random_scores()
    total = sum(score.numel() for score in scores.values())
    masks = masks_from_scores(scores, sparsity, quota=quota)
    assert count(masks) == math.ceil((1 - sparsity) * total - 1e-6)
    for name, mask in masks.items():
        assert mask.dtype == torch.bool and mask.shape == scores[name].shape


@pytest.mark.parametrize("quota", QUOTAS)
def test_each_layer_keeps_its_best(quota: Quota) -> None:
    scores = random_scores()
    masks = masks_from_scores(scores, 0.7, quota=quota)
    for name, mask in masks.items():
        dropped = scores[name][~mask].sort().values
        assert mask.any() and (scores[name][mask].min() > dropped[-1:]).all()


def test_global_compares_across_layers() -> None:
    scores = {"a": torch.tensor([[9.0, 1.0], [8.0, 2.0]]), "b": torch.tensor([[3.0, 7.0]])}
    masks = masks_from_scores(scores, 0.5, quota="global")
    assert masks["a"].tolist() == [[True, False], [True, False]]
    assert masks["b"].tolist() == [[False, True]]


def test_the_default_quota_is_igq() -> None:
    scores = random_scores()
    default, igq = masks_from_scores(scores, 0.8), masks_from_scores(scores, 0.8, quota="igq")
    uniform = masks_from_scores(scores, 0.8, quota="uniform")
    assert all(torch.equal(default[name], igq[name]) for name in scores)
    assert any(not torch.equal(default[name], uniform[name]) for name in scores)


def test_one_percent_of_a_hundred_is_one() -> None:
    # In floating point (1 - 0.99) * 100 is a little more than 1.
    assert count(masks_from_scores({"a": torch.rand(10, 10)}, 0.99)) == 1


@pytest.mark.parametrize("quota", ["igq", "erk", "uniform", "global"])
def test_almost_everything_pruned_still_keeps_one(quota: Quota) -> None:
    assert count(masks_from_scores(random_scores(), 1 - 1e-12, quota=quota)) == 1


def test_shares_are_rounded_to_their_neighbours_with_an_exact_total() -> None:
    scores = {name: torch.rand(3, 5) for name in "abcd"}  # 15 weights each, 0.3 of them is 4.5
    kept = [int(mask.sum()) for mask in masks_from_scores(scores, 0.7, quota="uniform").values()]
    assert kept == [5, 5, 4, 4]


def test_the_largest_remainders_are_rounded_up() -> None:
    scores = {"a": torch.rand(2, 5), "b": torch.rand(3, 5), "c": torch.rand(1, 11)}
    # A quarter is 2.5, 3.75 and 2.75 weights, 9 in all.
    kept = [int(mask.sum()) for mask in masks_from_scores(scores, 0.75, quota="uniform").values()]
    assert kept == [2, 4, 3]


@pytest.mark.parametrize("quota", ["uniform", "global"])
def test_of_equal_scores_the_earlier_stay(quota: Quota) -> None:
    masks = masks_from_scores({"a": torch.ones(40, 50)}, 0.75, quota=quota)
    assert masks["a"].flatten().nonzero().flatten().tolist() == list(range(500))


def test_pruned_weights_are_not_brought_back() -> None:
    score = torch.tensor([[-math.inf, 0.0], [1.0, -math.inf]])
    masks = masks_from_scores({"a": score}, 0.5, quota="global")
    assert masks["a"].tolist() == [[False, True], [True, False]]
    for quota in QUOTAS:
        with pytest.raises(ValueError, match=r"keeps 3 weights .* only 2 of 4 are not pruned"):
            masks_from_scores({"a": score}, 0.25, quota=quota)


def test_the_scores_are_left_alone() -> None:
    scores = random_scores()
    masks_from_scores(scores, 0.5, quota="global")
    for name, score in random_scores().items():
        assert torch.equal(scores[name], score)


def test_bad_arguments_are_refused() -> None:
    good = {"a": torch.rand(4, 4)}
    for sparsity in (1.0, -0.5, math.nan):
        for quota in QUOTAS:
            with pytest.raises(ValueError, match=rf"in \[0, 1\), got {sparsity}"):
                masks_from_scores(good, sparsity, quota=quota)
    with pytest.raises(ValueError, match="unknown quota 'gqi'"):
        masks_from_scores(good, 0.5, quota="gqi")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one layer"):
        masks_from_scores({}, 0.5)
    with pytest.raises(ValueError, match=r"scores for 'a', got shape \(0, 4\)"):
        masks_from_scores({"a": torch.rand(0, 4)}, 0.5)
    with pytest.raises(ValueError, match="without NaN for 'a'"):
        masks_from_scores({"a": torch.tensor([[1.0, math.nan]])}, 0.5)
    with pytest.raises(TypeError, match=r"floating-point scores for 'a', got torch\.bool"):
        masks_from_scores({"a": torch.ones(2, 2, dtype=torch.bool)}, 0.5)


def test_hydra_scores_by_hand() -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0], [0.0, 3.0, -1.0]])
    expected = math.sqrt(2) * torch.tensor([[0.25, -1.0, 0.5], [0.0, 0.75, -0.25]])
    torch.testing.assert_close(hydra_scores(weight), expected)


def test_hydra_scores_take_the_fan_in_of_a_convolution() -> None:
    weight = torch.rand(4, 3, 2, 2).requires_grad_()
    scores = hydra_scores(weight)
    assert scores.max().item() == pytest.approx(math.sqrt(6 / 12))
    assert not scores.requires_grad


def test_hydra_scores_of_bad_weights() -> None:
    assert torch.equal(hydra_scores(torch.zeros(2, 3)), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="finite weight, got a largest magnitude of nan"):
        hydra_scores(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(ValueError, match=r"got \(3,\)"):
        hydra_scores(torch.ones(3))
    with pytest.raises(ValueError, match=r"got \(0, 3\)"):
        hydra_scores(torch.ones(0, 3))
