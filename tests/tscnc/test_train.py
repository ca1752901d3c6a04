"""Training: what a run leaves behind, and that an interruption changes no bit of it."""

import json
import pkgutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tscnc.tiny import TINY, files_in
from tscnc import tasks, train
from tscnc.checkpoint import read_checkpoint
from tscnc.config import TrainConfig
from tscnc.run_folder import RunFolder, RunFolderError
from tscnc.session import Session, phases
from tscnc.train import TrainingError, learning_rate, load_dataset


def metrics(run: Path) -> list[dict[str, Any]]:
    """The run's metrics without what the clock decides."""
    lines = RunFolder(run).metrics.read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def interrupting(calls: int, inner: Callable[..., Any]) -> Callable[..., Any]:
    """`inner`, interrupted in the middle of its call number `calls`."""
    remaining = calls

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal remaining
        remaining -= 1
        if remaining == 0:
            raise KeyboardInterrupt
        return inner(*arguments, **options)

    return wrapped


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train.train(TINY, tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_leaves_a_complete_folder(whole_run: Path) -> None:
    assert files_in(whole_run) == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "state.pt",
        "checkpoint.safetensors",
        "results.json",
        "report.html",
    }
    assert RunFolder(whole_run).read_config() == TINY
    environment = json.loads((whole_run / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == 1


def test_every_epoch_is_in_the_metrics_with_the_parts_of_its_loss(whole_run: Path) -> None:
    records = metrics(whole_run)
    order = [(record["phase"], record["epoch"]) for record in records]
    assert order == [
        ("pretrain", 1),
        ("pretrain", 2),
        ("prune", 1),
        ("finetune", 1),
        ("finetune", 2),
    ]
    for record in records:
        assert 0 <= record["pgd_accuracy"] <= record["clean_accuracy"] + 0.1 <= 1.1
        if record["phase"] != "prune":
            robust = TINY.beta * record["robust"]
            penalties = record["tsc"] + record["cnc"] + record["weight_decay"]
            assert record["loss"] == pytest.approx(record["natural"] + robust + penalties, rel=1e-4)


def test_the_checkpoint_has_the_asked_sparsity(whole_run: Path) -> None:
    checkpoint = read_checkpoint(whole_run / "checkpoint.safetensors")
    kept = sum(int(mask.sum()) for mask in checkpoint.masks.values())
    total = sum(mask.numel() for mask in checkpoint.masks.values())
    assert kept / total == pytest.approx(1 - TINY.sparsity, abs=2 / total)
    assert set(checkpoint.masks) == {"1.weight", "3.weight"}


@pytest.mark.parametrize("step", [1, 5, 8, 12])
def test_a_run_interrupted_in_an_epoch_resumes_to_the_same_bits(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setitem(tasks.TASKS, "trades", interrupting(step, tasks.trades))
        with pytest.raises(KeyboardInterrupt):
            train.train(TINY, run)
    assert not RunFolder(run).results.exists()
    train.train(RunFolder(run).read_config(), run, resume=True)
    assert metrics(run) == metrics(whole_run)
    for name in ("checkpoint.safetensors", "config.yaml"):
        assert (run / name).read_bytes() == (whole_run / name).read_bytes()


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("tscnc.pruning.masks_from_scores", 1),
        ("tscnc.train.save_checkpoint", 1),
        ("tscnc.run_folder.RunFolder.save_state", 1),
        ("tscnc.run_folder.RunFolder.save_state", 3),
        ("tscnc.run_folder.RunFolder.append_metrics", 4),
        ("tscnc.run_folder.write_json", 1),
    ],
)
def test_a_run_interrupted_between_epochs_resumes_to_the_same_bits(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(function, interrupting(call, pkgutil.resolve_name(function)))
        with pytest.raises(KeyboardInterrupt):
            train.train(TINY, run)
    train.train(TINY, run, resume=True)
    assert metrics(run) == metrics(whole_run)
    name = "checkpoint.safetensors"
    assert (run / name).read_bytes() == (whole_run / name).read_bytes()


def test_a_half_written_line_of_metrics_is_cut_off(whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "state.pt"):
        (run / name).write_bytes((whole_run / name).read_bytes())
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "finetune", "epo')
    RunFolder(run).load_state()
    assert metrics(run) == metrics(whole_run)


def test_resuming_refuses_what_it_cannot_continue(whole_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a run folder"):
        train.train(TINY, tmp_path / "absent", resume=True)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "state.pt"):
        (run / name).write_bytes((whole_run / name).read_bytes())
    with pytest.raises(RunFolderError, match=r"another configuration: lr was .* and is 0.5"):
        train.train(TINY.replace(lr=0.5), run, resume=True)
    whole = (run / "state.pt").read_bytes()
    (run / "state.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunFolderError, match="damaged"):
        train.train(TINY, run, resume=True)
    (run / "state.pt").unlink()
    with pytest.raises(RunFolderError, match=r"has no state\.pt"):
        train.train(TINY, run, resume=True)
    (run / "state.pt").write_bytes(whole)
    (run / "metrics.jsonl").write_text("short")
    with pytest.raises(RunFolderError, match="holds 5 bytes"):
        train.train(TINY, run, resume=True)


def test_a_folder_in_use_is_left_as_it_is(whole_run: Path) -> None:
    before = {name: (whole_run / name).read_bytes() for name in files_in(whole_run)}
    with pytest.raises(RunFolderError, match="not empty: continue it with `tscnc train --resume"):
        train.train(TINY, whole_run)
    assert before == {name: (whole_run / name).read_bytes() for name in files_in(whole_run)}


def test_a_folder_that_cannot_be_written_is_named_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tasks.TASKS, "trades", lambda *_: pytest.fail("training started"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFolderError, match=r"cannot write the run folder .*file"):
        train.train(TINY, tmp_path / "file" / "run")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def poisoned(*arguments: Any) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        parts = tasks.trades(*arguments)
        return {**parts, "loss": parts["loss"] * (float("nan") if calls == 5 else 1.0)}

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setitem(tasks.TASKS, "trades", poisoned)
        with pytest.raises(TrainingError, match="loss became NaN or infinite in pretrain 2/2"):
            train.train(TINY, run)
    state = RunFolder(run).load_state()
    assert state is not None and (state["phase"], state["epoch"]) == (0, 1)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_an_exploding_learning_rate_is_an_error_not_a_nan(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="NaN or infinite"):
        train.train(TINY.replace(lr=1e30, clip_norm=0, optimizer="sgd"), tmp_path / "run")


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "pgd", "optimizer": "sgd", "threat": "L2", "epsilon": 0.5},
        {"task": "plain", "sparsity": 0.0, "tsc": 0.0, "cnc": 0.0, "weight_decay": 0.0},
        {"score": "snip", "quota": "erk", "cnc_form": "log_kappa"},
        {"score": "random", "quota": "uniform", "cnc_form": "nenov", "momentum": 0.0},
        {"epochs": 0, "finetune_epochs": 0},
    ],
    ids=["pgd", "dense", "snip", "random", "untrained"],
)
def test_other_configurations_run_through(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = TINY.replace(**{"epochs": 1, "finetune_epochs": 1, **changes})
    run = train.train(config, tmp_path / "run")
    names = [phase.name for phase in phases(config) for _ in range(phase.epochs)]
    assert [record["phase"] for record in metrics(run)] == names
    assert RunFolder(run).read_results()["label"] == config.label


def test_training_learns_the_digits(tmp_path: Path) -> None:
    config = TINY.replace(task="plain", train_examples=0, epochs=5, sparsity=0.0, tsc=0, cnc=0)
    run = train.train(config.replace(finetune_epochs=0), tmp_path / "run")
    assert metrics(run)[-1]["clean_accuracy"] > 0.8


def test_a_session_restores_every_bit_of_its_state(tmp_path: Path) -> None:
    config = TINY.replace(epochs=1)
    session, other = (Session(config, load_dataset(config)) for _ in range(2))
    train._train_epoch(session, phases(config)[0])
    session.epoch = 1
    other.load_state(session.state(), source=tmp_path)
    assert all(map(torch.equal, session.model.parameters(), other.model.parameters()))
    for name, generator in session.generators.items():
        assert torch.equal(generator.get_state(), other.generators[name].get_state())
    assert other.epoch == 1


def test_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(2.0, step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(2.0, rel=1e-3) and rates.index(max(rates)) in (9, 10)
    assert all(a > b > 0 for a, b in pairwise(rates[10:]))
    assert learning_rate(1.0, 0, 1, 0.0) == 1.0


def test_the_same_seed_gives_the_same_pretraining_with_and_without_pruning() -> None:
    def pretrained(config: TrainConfig) -> list[torch.Tensor]:
        session = Session(config, load_dataset(config))
        train._train_epoch(session, phases(config)[0])
        return list(session.model.parameters())

    dense = TINY.replace(tsc=0, cnc=0, sparsity=0)
    first, second = pretrained(dense), pretrained(dense.replace(sparsity=0.9))
    assert all(map(torch.equal, first, second))
