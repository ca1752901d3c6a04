"""The final evaluation of a run: accuracy, robustness, compression, spectra, cost.

`evaluate_run` returns what becomes `results.json`; a number that is infinite or undefined is None
there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tscnc import measure, pruning, spectrum
from tscnc.attacks import ThreatModel, pgd
from tscnc.config import TrainConfig
from tscnc.data import Dataset
from tscnc.tasks import step_size

# One seed for every run, so that runs differ by their networks alone.
_SEED = 20251
_BATCH = 1000

# Radii of the curve, in units of the run's own; 0 is the clean accuracy.
_RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Computes the share of (N, …) images that get their (N,) label; NaN for no images."""
    return _share_correct(model, images, labels, attack=None)


def pgd_accuracy(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    step_size: float,
) -> float:
    """Computes the accuracy under projected gradient descent from one random start, seeded.

    Args:
        model: maps (N, …) images to (N, classes) logits.
        images: (N, …) float tensor in [0, 1].
        labels: (N,) int64 labels.
        threat: the allowed perturbations.
        steps: steps of the attack.
        step_size: length of a step in the threat's norm.

    Returns:
        The share of the images that keep their label; NaN for no images.
    """
    generator = torch.Generator().manual_seed(_SEED)

    def attack(part: Tensor, target: Tensor) -> Tensor:
        return pgd(
            model, part, target, threat, steps=steps, step_size=step_size, generator=generator
        )

    return _share_correct(model, images, labels, attack=attack)


def accuracy_vs_epsilon(
    model: nn.Module, dataset: Dataset, config: TrainConfig
) -> list[dict[str, float]]:
    """Computes the accuracy on the test images for radii from 0 to twice the run's.

    The step of the attack grows with the radius.

    Returns:
        Pairs `epsilon`, `accuracy`, in ascending order.
    """
    images, labels = dataset.test_images, dataset.test_labels
    length = step_size(config, config.eval_steps)
    curve = []
    for factor in _RADII:
        epsilon = float(f"{factor * config.epsilon:.12g}")
        if factor == 0:
            share = accuracy(model, images, labels)
        else:
            threat = ThreatModel(config.threat, epsilon)
            share = pgd_accuracy(
                model, images, labels, threat, steps=config.eval_steps, step_size=factor * length
            )
        curve.append({"epsilon": epsilon, "accuracy": share})
    return curve


def evaluate_run(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    dataset: Dataset,
    config: TrainConfig,
    *,
    spectra_before: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Measures everything that a run reports.

    Args:
        model: the trained network, dense or with masked layers; it is not changed.
        masks: bool masks of the pruned weights by parameter name; empty for a dense network.
        dataset: its test images are evaluated, a batch of its training images is timed.
        config: the run's configuration.
        spectra_before: singular values before pruning, by parameter name; empty if there are none.

    Returns:
        The content of `results.json`. `seconds_per_step` is None for a dense network.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
        ValueError: masks that do not fit the model, or weights that are NaN or infinite.
    """
    training = model.training
    model.eval()
    try:
        curve = accuracy_vs_epsilon(model, dataset, config)
        sizes = pruning.sparsity_report(model, masks, dataset.test_images[:1])
        layers = _layers(model, masks, sizes["layers"], spectra_before)
    finally:
        model.train(training)
    by_radius = {r: point["accuracy"] for r, point in zip(_RADII, curve, strict=True)}
    times = measure.seconds_per_step(model, dataset, config) if masks else None
    metadata = measure.checkpoint_metadata(dataset, config)
    results = {
        "label": config.label,
        "dataset": config.dataset,
        "model": config.model,
        "seed": config.seed,
        "epsilon": config.epsilon,
        "threat": config.threat,
        "accuracy": {
            "clean": by_radius[0.0],
            "pgd": by_radius[1.0],
            "pgd_steps": config.eval_steps,
            "examples": len(dataset.test_labels),
        },
        "accuracy_vs_epsilon": curve,
        "sparsity": {name: value for name, value in sizes.items() if name != "layers"},
        "layers": layers,
        "seconds_per_step": dataclasses.asdict(times) if times else None,
        "checkpoint_bytes": measure.checkpoint_bytes(model, masks, metadata),
    }
    return {name: _json(value) for name, value in results.items()}


def _share_correct(model: nn.Module, images: Tensor, labels: Tensor, attack: Any) -> float:
    if len(labels) == 0:
        return math.nan
    correct = 0
    for part, target in zip(images.split(_BATCH), labels.split(_BATCH), strict=True):
        points = attack(part, target) if attack else part
        with torch.no_grad():
            correct += int((model(points).argmax(1) == target).sum())
    return correct / len(labels)


def _layers(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    densities: Mapping[str, Mapping[str, float]],
    spectra_before: Mapping[str, Tensor],
) -> list[dict[str, Any]]:
    """Returns one record per prunable layer, in the model's order."""
    layers = []
    for name, layer in spectrum.layer_spectra(model, masks).items():
        before = spectra_before.get(name)
        layers.append(
            {
                **vars(layer),
                "effective_density": densities[name]["effective_density"],
                "kappa_full": layer.kappa_full,
                "kappa_structural": layer.kappa_structural,
                "singular_values": _six_digits(layer.singular_values),
                "singular_values_before": None if before is None else _six_digits(before),
            }
        )
    return layers


def _six_digits(values: Tensor) -> list[float]:
    return [float(f"{value:.6g}") for value in values.tolist()]


def _json(value: Any) -> Any:
    """Returns `value` in what JSON knows: tuples as lists, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): _json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
