"""Cost of a step and of a checkpoint: what is measured, not how fast it is."""

import copy
import itertools

import pytest
import torch
from torch import nn

from tests.tscnc.tiny import TINY
from tscnc import measure
from tscnc.checkpoint import save_checkpoint
from tscnc.train import load_dataset
from tscnc_kernels.nn import MaskedLinear, sparsify


def pruned_model() -> tuple[nn.Sequential, dict[str, torch.Tensor]]:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
    masks = {"1.weight": torch.rand(24, 64) < 0.2, "3.weight": torch.rand(10, 24) < 0.5}
    sparsify(model, masks, mode="values")
    return model, masks


def test_the_dense_twin_computes_the_same_and_trains_alike() -> None:
    model, masks = pruned_model()
    twin = measure.dense_masked(model)
    assert not any(isinstance(module, MaskedLinear) for module in twin.modules())
    input, target = torch.rand(8, 1, 8, 8), torch.arange(8)
    losses = []
    for network in (model, twin):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            loss = nn.functional.cross_entropy(network(input), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)
    assert torch.equal(twin[1].mask.bool(), masks["1.weight"])


def test_measuring_leaves_the_model_and_the_threads_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "_SECONDS", 0.0)
    model, _ = pruned_model()
    before, threads = copy.deepcopy(model.state_dict()), torch.get_num_threads()
    times = measure.seconds_per_step(model, load_dataset(TINY), TINY)
    assert times.pairs + times.dropped == 5
    assert times.threads == 1 and torch.get_num_threads() == threads
    assert min(times.dense_masked, times.ours, times.ratio) > 0
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_two_networks_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, turns = itertools.count(), []

    def step_of(*_: object) -> object:
        number = next(numbers)
        return lambda: turns.append(number)

    monkeypatch.setattr(measure, "_training_step", step_of)
    times = measure.seconds_per_step(pruned_model()[0], load_dataset(TINY), TINY)
    assert turns == [0, 1] * (2 + times.pairs + times.dropped)


def test_disturbed_pairs_are_left_out() -> None:
    quiet = ((0.4, 0.4), (0.1, 0.1))
    pairs = [quiet] * 6 + [((0.9, 0.4), (0.1, 0.1)), ((0.4, 0.4), (0.8, 0.1))]
    times = measure.summarize(pairs)
    assert (times.pairs, times.dropped) == (6, 2)
    assert (times.dense_masked, times.ours) == (0.4, 0.1)
    assert times.ratio == pytest.approx(4.0)


def test_all_pairs_count_where_hardly_any_was_undisturbed() -> None:
    disturbed = ((0.8, 0.4), (0.2, 0.1))
    times = measure.summarize([disturbed] * 4 + [((0.4, 0.4), (0.2, 0.2))])
    assert (times.pairs, times.dropped) == (5, 0)
    assert (times.dense_masked, times.ours) == (0.8, 0.2)


def test_checkpoint_bytes_are_those_of_the_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, masks = pruned_model()
    metadata = measure.checkpoint_metadata(load_dataset(TINY), TINY)
    sizes = measure.checkpoint_bytes(model, masks, metadata)
    save_checkpoint(tmp_path / "run.safetensors", model, masks, metadata)
    assert sizes["ours"] == (tmp_path / "run.safetensors").stat().st_size
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    assert sizes["dense"] - sizes["ours"] < 4 * (total - kept)
    assert sizes["dense"] > 4 * total and sizes["ours"] > 4 * kept
