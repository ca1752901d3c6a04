"""Checkpoints: small, complete, and refused when they do not fit."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tscnc import models
from tscnc.checkpoint import (
    CheckpointError,
    load_checkpoint,
    pack_mask,
    read_checkpoint,
    save_checkpoint,
    unpack_mask,
)
from tscnc_kernels.nn import sparsify

SHAPE = (1, 6, 6)


def build(name: str = "mlp-40", seed: int = 0) -> nn.Sequential:
    return models.build(name, SHAPE, 5, generator=torch.Generator().manual_seed(seed))


def random_masks(model: nn.Module, density: float = 0.1, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(weight.shape, generator=generator) < density
        for name, weight in model.named_parameters()
        if weight.ndim == 2
    }


def pruned_model(seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    model = build(seed=seed)
    masks = random_masks(model)
    sparsify(model, masks, mode="values")
    return model, masks


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, masks = pruned_model()
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, model, masks, {"note": "kept"})
    return path


@pytest.mark.parametrize("shape", [(), (1,), (7, 9), (3, 2, 4), (0, 5)])
def test_masks_pack_and_unpack(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    assert torch.equal(unpack_mask(pack_mask(mask), shape), mask)


def test_packed_masks_of_another_shape_or_damaged_are_refused() -> None:
    packed = pack_mask(torch.ones(8, 8, dtype=torch.bool))
    for shape in ((8, 9), (8, 7), (100, 100)):
        with pytest.raises(ValueError, match="another size"):
            unpack_mask(packed, shape)
    with pytest.raises(ValueError, match="damaged"):
        unpack_mask(b"no bits", (8, 8))
    with pytest.raises(ValueError, match="another size"):
        unpack_mask(packed[:-5], (8, 8))


def test_a_pruned_model_comes_back_masked(saved: Path) -> None:
    original, masks = pruned_model()
    other = build(seed=9)
    sparsify(other, masks, mode="values")
    checkpoint = load_checkpoint(saved, other)
    images = torch.rand(3, *SHAPE)
    assert torch.equal(other(images), original(images))
    assert checkpoint.metadata == {"note": "kept"}
    assert checkpoint.masks.keys() == masks.keys()
    assert all(torch.equal(checkpoint.masks[name], masks[name]) for name in masks)


def test_a_pruned_model_comes_back_dense(saved: Path) -> None:
    original, masks = pruned_model()
    dense = build(seed=9)
    load_checkpoint(saved, dense)
    for name, mask in masks.items():
        assert (dense.get_parameter(name)[~mask] == 0).all()
    images = torch.rand(3, *SHAPE)
    torch.testing.assert_close(dense(images), original(images))


def test_a_dense_model_comes_back(tmp_path: Path) -> None:
    model, other, path = build(), build(seed=9), tmp_path / "dense.safetensors"
    save_checkpoint(path, model, {}, {})
    assert load_checkpoint(path, other).masks == {}
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_99_percent_pruned_is_many_times_smaller(tmp_path: Path) -> None:
    model = build("mlp-1000")
    masks = random_masks(model, density=0.01)
    dense, pruned = tmp_path / "dense", tmp_path / "pruned"
    save_checkpoint(dense, model, {}, {})
    sparsify(model, masks, mode="values")
    save_checkpoint(pruned, model, masks, {})
    stored = sum(p.numel() for p in model.parameters() if p.ndim == 1) * 4
    assert pruned.stat().st_size < stored + 0.01 * dense.stat().st_size + 1500


def test_saving_is_deterministic(saved: Path) -> None:
    model, masks = pruned_model()
    again = saved.with_name("again")
    save_checkpoint(again, model, masks, {"note": "kept"})
    assert again.read_bytes() == saved.read_bytes()


def test_saving_refuses_masks_that_fit_no_weight(tmp_path: Path) -> None:
    model = build()
    for masks in (
        {"9.weight": torch.ones(2, 2, dtype=torch.bool)},
        {"1.weight": torch.ones(2) > 0},
    ):
        with pytest.raises(ValueError, match="mask"):
            save_checkpoint(tmp_path / "never", model, masks, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(saved: Path, cut: int) -> None:
    saved.write_bytes(saved.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="not a complete tscnc checkpoint"):
        read_checkpoint(saved)


def test_another_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    text, foreign = tmp_path / "text", tmp_path / "foreign"
    text.write_text("these are not weights, but they are long enough to look at")
    save_file({"x": torch.zeros(2)}, foreign)
    for path in (text, foreign):
        with pytest.raises(CheckpointError, match=path.name):
            read_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "absent")


def test_damaged_masks_and_values_are_refused(saved: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    whole = load_file(saved)
    damages = {
        "damaged mask": {**whole, "1.weight.mask": whole["1.weight.mask"].flip(0)},
        "but its values have": {**whole, "1.weight.values": whole["1.weight.values"][1:]},
        "NaN or infinite": {**whole, "1.bias": whole["1.bias"] * float("nan")},
    }
    for words, tensors in damages.items():
        save_file({name: t.contiguous() for name, t in tensors.items()}, saved, metadata)
        with pytest.raises(CheckpointError, match=words):
            read_checkpoint(saved)
    newer = {"tscnc": json.dumps({**json.loads(metadata["tscnc"]), "format": 99})}
    save_file(whole, saved, newer)
    with pytest.raises(CheckpointError, match="format 99"):
        read_checkpoint(saved)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (build("mlp-40-40"), ["another model", "'5.weight'"]),
        (build("mlp-41"), ["another model", "has shape (40", "the model (41"]),
        (nn.Sequential(nn.Flatten()), ["another model", "'1.weight'", "that the model has not"]),
    ],
)
def test_the_checkpoint_of_another_model_changes_nothing(
    saved: Path, model: nn.Module, words: list[str]
) -> None:
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(saved, model)
    for word in words:
        assert word in str(caught.value)
    assert all(map(torch.equal, model.parameters(), before))


def test_other_masks_than_the_models_are_refused(saved: Path) -> None:
    model = build()
    sparsify(model, random_masks(model, seed=2), mode="values")
    with pytest.raises(CheckpointError, match="has another mask than the model"):
        load_checkpoint(saved, model)
