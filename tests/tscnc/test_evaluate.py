"""The final evaluation: accuracies that are known by hand, and what results.json holds."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tscnc.tiny import TINY
from tscnc import evaluate, measure, models
from tscnc.attacks import ThreatModel
from tscnc.train import load_dataset
from tscnc_kernels.nn import sparsify


class Threshold(nn.Module):
    """Class 1 where the first pixel exceeds 1/2."""

    def forward(self, input: Tensor) -> Tensor:
        margin = input.flatten(1)[:, 0] - 0.5
        return torch.stack([-margin, margin], dim=1)


def pixels(*values: float) -> Tensor:
    return torch.tensor(values).reshape(-1, 1, 1, 1)


def test_accuracy_is_the_share_of_right_answers() -> None:
    images, labels = pixels(0.1, 0.4, 0.6, 0.9), torch.tensor([0, 0, 1, 0])
    assert evaluate.accuracy(Threshold(), images, labels) == 0.75


def test_batches_do_not_change_the_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = torch.rand(10, 1, 1, 1), torch.arange(10) % 2
    whole = evaluate.accuracy(Threshold(), images, labels)
    monkeypatch.setattr(evaluate, "_BATCH", 3)
    assert evaluate.accuracy(Threshold(), images, labels) == whole


def test_an_attack_crosses_what_lies_within_its_radius() -> None:
    images, labels = pixels(0.1, 0.4, 0.6, 0.95), torch.tensor([0, 0, 1, 1])
    for epsilon, expected in ((0.05, 1.0), (0.2, 0.5), (0.42, 0.25), (0.6, 0.0)):
        share = evaluate.pgd_accuracy(
            Threshold(), images, labels, ThreatModel("Linf", epsilon), steps=5, step_size=epsilon
        )
        assert share == expected


def test_the_curve_starts_at_the_clean_accuracy_and_falls() -> None:
    dataset = load_dataset(TINY)
    dataset = dataclasses.replace(
        dataset,
        test_images=pixels(0.45, 0.6, 0.65, 0.95),
        test_labels=torch.tensor([1, 1, 1, 1]),
    )
    curve = evaluate.accuracy_vs_epsilon(Threshold(), dataset, TINY.replace(epsilon=0.12))
    assert [point["epsilon"] for point in curve] == [0, 0.03, 0.06, 0.09, 0.12, 0.15, 0.18, 0.24]
    accuracies = [point["accuracy"] for point in curve]
    assert accuracies[0] == 0.75
    assert accuracies[4] == 0.5
    assert accuracies[-1] == 0.25
    assert accuracies == sorted(accuracies, reverse=True)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_SECONDS", 0.0)


def run(sparsity: float) -> dict[str, Any]:
    dataset = load_dataset(TINY)
    model = models.build(
        TINY.model, dataset.input_shape, 10, generator=torch.Generator().manual_seed(1)
    )
    config = TINY.replace(sparsity=sparsity)
    generator = torch.Generator().manual_seed(2)
    masks = {}
    if sparsity:
        masks = {
            name: torch.rand(tensor.shape, generator=generator) >= sparsity
            for name, tensor in model.named_parameters()
            if tensor.ndim == 2
        }
        masks["3.weight"][4] = False
        sparsify(model, masks, mode="values")
    before = {"1.weight": torch.tensor([2.0, 1.0])} if masks else {}
    return evaluate.evaluate_run(model, masks, dataset, config, spectra_before=before)


def test_the_results_of_a_pruned_run_are_complete(fast: None) -> None:
    results = run(0.8)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert results["label"] == "80 % pruned, TSC + CNC"
    assert results["accuracy"]["pgd"] == results["accuracy_vs_epsilon"][4]["accuracy"]
    assert results["accuracy"]["clean"] == results["accuracy_vs_epsilon"][0]["accuracy"]
    assert results["sparsity"]["direct"] == pytest.approx(0.8, abs=0.05)
    assert set(results["seconds_per_step"]) == {
        "dense_masked",
        "ours",
        "ratio",
        "pairs",
        "dropped",
        "threads",
    }
    assert results["checkpoint_bytes"]["ours"] < results["checkpoint_bytes"]["dense"]
    first, last = results["layers"]
    assert (first["name"], first["shape"]) == ("1.weight", [24, 64])
    assert first["singular_values_before"] == [2.0, 1.0]
    assert last["singular_values_before"] is None
    assert last["dead_rows"] >= 1 and last["kappa_full"] is None
    assert last["kappa_structural"] == pytest.approx(
        last["sigma_max"] / last["sigma_min_structural"]
    )
    assert len(last["singular_values"]) == 10
    assert last["singular_values"][0] == pytest.approx(last["sigma_max"], rel=1e-3)


def test_a_dense_run_has_no_rival_and_no_saving(fast: None) -> None:
    results = run(0.0)
    assert results["seconds_per_step"] is None
    assert results["sparsity"]["direct_compression"] == 1.0
    assert results["checkpoint_bytes"]["ours"] == results["checkpoint_bytes"]["dense"]
    for layer in results["layers"]:
        assert layer["density"] == 1.0
        assert layer["kappa_full"] == layer["kappa_structural"] >= 1


def test_infinite_compression_is_null(fast: None) -> None:
    dataset = load_dataset(TINY)
    model = models.build(TINY.model, dataset.input_shape, 10)
    masks = {
        "1.weight": torch.zeros(24, 64, dtype=torch.bool),
        "3.weight": torch.ones(10, 24, dtype=torch.bool),
    }
    sparsify(model, masks, mode="values")
    results = evaluate.evaluate_run(model, masks, dataset, TINY, spectra_before={})
    assert results["sparsity"]["effective_compression"] is None
    assert results["layers"][0]["kappa_structural"] is None
    json.dumps(results, allow_nan=False)
