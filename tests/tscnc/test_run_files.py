"""Files that are whole or absent, the environment, the log lines and the table."""

import json
import os
import sys
from pathlib import Path

import pytest

from tscnc import environment, progress
from tscnc.files import write_bytes, write_json, write_text
from tscnc.run_folder import unused
from tscnc.table import results_table


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(descriptor: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(failure)):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_bytes(tmp_path / "ours", b"")
    modes = [(tmp_path / name).stat().st_mode for name in ("plain", "ours")]
    assert modes[0] == modes[1]


def test_json_refuses_what_json_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file", {"kappa": float("inf")})
    assert list(tmp_path.iterdir()) == []


def test_unused_counts_up(tmp_path: Path) -> None:
    assert unused(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert unused(tmp_path / "demo") == tmp_path / "demo-3"


def test_the_environment_is_plain_json_and_names_the_build() -> None:
    description = environment.describe()
    assert json.loads(json.dumps(description)) == description
    assert description["kernels"]["version"]
    assert description["threads"] >= 1


def test_the_commit_is_read_from_gits_files(tmp_path: Path) -> None:
    commit, packed = "1" * 40, "2" * 40
    git = tmp_path / "repository/.git"
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "refs/heads/main").write_text(commit + "\n")
    inside = tmp_path / "repository/a/b"
    inside.mkdir(parents=True)
    assert environment.git_commit(inside) == commit

    (git / "refs/heads/main").unlink()
    (git / "packed-refs").write_text(f"# pack-refs\n{packed} refs/heads/main\n")
    assert environment.git_commit(inside) == packed

    (git / "HEAD").write_text(commit)
    assert environment.git_commit(inside) == commit

    linked = tmp_path / "linked"
    (git / "worktrees/linked").mkdir(parents=True)
    (git / "worktrees/linked/HEAD").write_text("ref: refs/heads/main\n")
    (git / "worktrees/linked/commondir").write_text("../..\n")
    linked.mkdir()
    (linked / ".git").write_text(f"gitdir: {git / 'worktrees/linked'}\n")
    assert environment.git_commit(linked) == packed

    (linked / ".git").write_text("gitdir: nowhere\n")
    assert environment.git_commit(linked) is None


def test_an_epoch_line_logs_whatever_names_it_gets() -> None:
    record = {"phase": "finetune", "epoch": 3, "loss": 0.123456, "kept": 123456}
    line = progress.epoch_line(record, 5)
    assert line.split() == ["finetune", "3/5", "loss", "0.123", "kept", "123,456"]


def test_tracking_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track([1, 2], total=2, description="x")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_tracking_draws_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(progress.track([1, 2], total=2, description="finetune 1/5")) == [1, 2]
    assert "finetune 1/5" in capsys.readouterr().err


LAYER = {"name": "1.weight", "kappa_full": None, "kappa_structural": 12345.6}
RUN = {
    "label": "99 % pruned",
    "epsilon": 8 / 255,
    "threat": "Linf",
    "accuracy": {"clean": 0.9876, "pgd": 0.5, "pgd_steps": 20},
    "sparsity": {"direct_compression": 100.04, "effective_compression": None},
    "layers": [LAYER],
    "seconds_per_step": {"dense_masked": 0.02, "ours": 0.0025, "ratio": 8.0},
    "checkpoint_bytes": {"dense": 4_600_000, "ours": 61_234},
}


def test_epoch_lines_show_shares_in_percent_and_align() -> None:
    first = {"phase": "pretrain", "epoch": 9, "tsc": 9.4e-5, "clean_accuracy": 0.05, "seconds": 1.0}
    later = {"phase": "pretrain", "epoch": 10, "tsc": 2e-5, "clean_accuracy": 0.5, "seconds": 2.3}
    lines = [progress.epoch_line(record, 12) for record in (first, later)]
    assert lines[0] == "pretrain  9/12  tsc 9e-05  clean accuracy  5.0 %  seconds 1.00"
    assert lines[1] == "pretrain 10/12  tsc 2e-05  clean accuracy 50.0 %  seconds 2.30"


def test_the_table_shows_each_measurement_of_each_run() -> None:
    dense = {**RUN, "label": "dense", "seconds_per_step": None}
    lines = results_table({"dense": dense, "pruned": RUN}).splitlines()
    cells = {line.split("  ")[0]: line.split()[-5:] for line in lines}
    assert lines[0].split() == ["dense", "99", "%", "pruned"]
    assert cells["clean accuracy"][-2:] == ["98.8", "%"]
    assert cells["PGD-20 accuracy, Linf 0.0314"][-2:] == ["50.0", "%"]
    assert cells["compression, direct"][-2:] == ["100", "x"]
    assert cells["compression, effective"][-1] == "∞"
    assert cells["κ of 1.weight, full | structural"][-3:] == ["∞", "|", "12,300"]
    assert cells["ms per training step, dense masked | ours"] == ["ours", "-", "20.00", "|", "2.50"]
    assert cells["checkpoint kB, dense | ours"][-3:] == ["4,600", "|", "61"]
    assert len({len(line) for line in lines}) == 1
