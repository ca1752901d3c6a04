"""The command line: exit codes, one-line errors, and what each command prints."""

import json
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tscnc
from tests.tscnc.test_train import interrupting, metrics
from tests.tscnc.tiny import TINY, flags
from tscnc import tasks
from tscnc.cli import DEMO, main
from tscnc.compare import VARIANTS
from tscnc.config import TrainConfig
from tscnc.run_folder import RunFolder

OPTIONAL = ["yaml", "safetensors", "tqdm", "matplotlib", "scipy", "sklearn", "triton"]
SHORT = TINY.replace(epochs=1, finetune_epochs=1)


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *flags(SHORT, out=folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "comparison"
    assert main(["train", "--compare", *flags(SHORT, out=folder)]) == 0
    return folder


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The only line on stderr of a command that fails before it starts to work."""
    assert main(arguments) == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("tscnc: error: ")
    assert captured.out == ""
    return lines[0]


def test_version_and_help_exit_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--version"], ["--help"], ["train", "--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0
        assert "tscnc" in capsys.readouterr().out


def test_wrong_usage_names_the_nearest_flag(capsys: pytest.CaptureFixture[str]) -> None:
    message = usage_error(capsys, "train", "--sparsty", "0.9")
    assert "unknown flag '--sparsty'; did you mean --sparsity?" in message
    assert "unknown flag '--epoch'" in usage_error(capsys, "demo", "--epoch=3")
    assert "unexpected argument 'digits'" in usage_error(capsys, "train", "digits")
    assert "[0, 1), got '1.5'" in usage_error(capsys, "train", "--sparsity", "1.5")
    assert "mean digits?" in usage_error(capsys, "train", "--dataset", "digit")
    assert "trian" in usage_error(capsys, "trian")
    usage_error(capsys)


def test_bad_configurations_are_one_line_errors(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text("sparsty: 0.9\n")
    message = error(capsys, "train", "--config", "bad.yaml")
    assert "bad.yaml: unknown option 'sparsty'; did you mean sparsity?" in message
    assert "absent.yaml" in error(capsys, "train", "--config", "absent.yaml")
    assert "unknown model 'resnet'" in error(capsys, "train", "--model", "resnet")
    assert list(tmp_path.iterdir()) == [tmp_path / "bad.yaml"]


def test_missing_data_is_named_with_its_address(capsys: pytest.CaptureFixture[str]) -> None:
    message = error(capsys, "train", "--dataset", "mnist", "--data-dir", "nowhere")
    assert "train-images-idx3-ubyte" in message and "http" in message
    assert not Path("runs").exists()


def test_flags_override_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(TINY.replace(epochs=1, seed=3).to_yaml())
    assert main(["train", "--config", "mine.yaml", "--seed", "4", "--finetune-epochs", "0"]) == 0
    saved = TrainConfig.from_file(Path("runs/digits-mlp-24/config.yaml"))
    assert saved == TINY.replace(epochs=1, seed=4, finetune_epochs=0)


def test_a_folder_in_use_is_refused_and_a_default_one_is_new(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("used").mkdir()
    Path("used/notes.txt").write_text("mine")
    message = error(capsys, "train", *flags(SHORT, out="used"))
    assert "--resume used" in message and "--out" in message
    assert os.listdir("used") == ["notes.txt"]
    Path("runs/digits-mlp-24").mkdir(parents=True)
    assert main(["train", *flags(SHORT.replace(epochs=0, finetune_epochs=0))]) == 0
    assert RunFolder(Path("runs/digits-mlp-24-2")).results.is_file()


def test_a_file_in_the_way_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").write_text("mine")
    assert "cannot write the run folder taken" in error(capsys, "train", "--out", "taken")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("locked").mkdir(mode=0o500)
    assert "cannot write" in error(capsys, "train", "--out", "locked/run")


def test_interrupted_training_prints_the_command_that_continues_it(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(tasks.TASKS, "trades", interrupting(5, tasks.trades))
        assert main(["train", *flags(SHORT, out="a run")]) == 130
    assert "tscnc train --resume 'a run'" in capsys.readouterr().err
    assert main(["train", "--resume", "a run"]) == 0
    assert metrics(Path("a run")) == metrics(run)


def test_an_interrupted_comparison_resumes_to_the_same_numbers(
    comparison: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(tasks.TASKS, "trades", interrupting(8, tasks.trades))
        assert main(["train", "--compare", *flags(SHORT, out="again")]) == 130
    assert main(["train", "--resume", "again"]) == 0
    for name in VARIANTS:
        assert metrics(Path("again") / name) == metrics(comparison / name)
    runs = RunFolder(Path("again")).read_results()["runs"]
    assert [runs[name]["label"] for name in VARIANTS] == [
        "dense",
        "80 % pruned",
        "80 % pruned, TSC + CNC",
    ]


def test_resume_takes_no_other_flag(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error(capsys, "train", "--resume", str(run), "--lr", "1")
    assert "leave --lr out" in message
    assert "not a run folder" in error(capsys, "train", "--resume", "absent")


def test_a_dry_run_keeps_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "--dry-run", *flags(TINY)]) == 0
    captured = capsys.readouterr()
    assert TINY.to_yaml() in captured.out
    assert "nothing was kept" in captured.err
    assert list(tmp_path.iterdir()) == []


def test_the_comparison_prints_a_column_per_run(
    comparison: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(comparison)]) == 0
    table = capsys.readouterr().out
    heads = table.splitlines()[0]
    assert heads.index("dense") < heads.index("80 % pruned") < heads.index("TSC + CNC")
    for words in ("clean accuracy", "PGD-2", "direct", "effective", "1.weight", "3.weight", "kB"):
        assert words in table
    assert (comparison / "report.html").is_file()


def test_the_demo_compares_99_percent_pruned_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert (DEMO.dataset, DEMO.model, DEMO.sparsity) == ("digits", "mlp-1024-1024", 0.99)
    short = SHORT.replace(sparsity=0.99)
    assert main(["demo", *flags(short, sparsity=0.99)]) == 0
    table = capsys.readouterr().out
    assert "99 % pruned, TSC + CNC" in table and "dense" in table
    assert TrainConfig.from_file(Path("runs/demo/config.yaml")) == short


def test_evaluate_repeats_the_results(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = RunFolder(run).read_results()
    assert main(["evaluate", str(run)]) == 0
    after = RunFolder(run).read_results()
    for name in ("label", "accuracy", "sparsity", "layers", "checkpoint_bytes"):
        assert after[name] == before[name]


def test_spectrum_shows_every_layer_of_a_run_and_of_a_checkpoint(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["spectrum", str(run)]) == 0
    of_run = capsys.readouterr().out
    assert "1.weight" in of_run and "3.weight" in of_run
    assert main(["spectrum", str(run / "checkpoint.safetensors")]) == 0
    assert capsys.readouterr().out == of_run


def test_spectrum_of_a_comparison_shows_every_run(
    comparison: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["spectrum", str(comparison)]) == 0
    text = capsys.readouterr().out
    assert [paragraph.splitlines()[0] for paragraph in text.split("\n\n")] == [
        "dense",
        "pruned: 80 % pruned",
        "tscnc: 80 % pruned, TSC + CNC",
    ]
    assert text.count("3.weight") == 3


def test_incomplete_runs_and_damaged_files_are_one_line_errors(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    assert "holds no checkpoint.safetensors" in error(capsys, "spectrum", "empty")
    assert "there is no file absent" in error(capsys, "spectrum", "absent")
    assert "no results.json" in error(capsys, "report", "empty")
    Path("cut").write_bytes((run / "checkpoint.safetensors").read_bytes()[:99])
    assert "not a complete tscnc checkpoint" in error(capsys, "spectrum", "cut")
    Path("empty/results.json").write_text("{")
    assert "cannot read" in error(capsys, "report", "empty")


def test_numbers_no_generator_or_thread_pool_takes_are_wrong_usage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "2^32 - 1, got" in usage_error(capsys, "train", "--seed", str(10**23))
    assert "1024, got" in usage_error(capsys, "train", "--threads", str(10**11))


def test_debug_before_the_command_is_told_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--debug goes after the command" in usage_error(capsys, "--debug", "train")


def test_a_comparison_that_cannot_start_leaves_no_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "mnist needs" in error(capsys, "demo", "--dataset", "mnist")
    assert "unknown model" in error(capsys, "demo", "--model", "resnet")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_run_is_not_evaluated(
    run: Path, comparison: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, "mixed")
    shutil.copy(comparison / "dense" / "checkpoint.safetensors", "mixed")
    before = Path("mixed/results.json").read_bytes()
    assert main(["evaluate", "mixed"]) == 1
    assert "sparsity was 0.0 and is 0.8" in capsys.readouterr().err
    assert Path("mixed/results.json").read_bytes() == before


def test_a_complete_run_is_not_resumed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "results.json").read_bytes()
    assert main(["train", "--resume", str(run)]) == 0
    assert "complete already" in capsys.readouterr().err
    assert (run / "results.json").read_bytes() == before


def test_a_comparison_with_a_lost_run_is_still_a_comparison(
    comparison: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(comparison, "damaged")
    shutil.rmtree("damaged/dense")
    assert "tscnc train --resume damaged`" in error(capsys, "report", "damaged")
    assert main(["train", "--resume", "damaged"]) == 0
    assert metrics(Path("damaged/dense")) == metrics(comparison / "dense")
    assert not Path("damaged/metrics.jsonl").exists()


def test_the_data_directory_is_kept_as_an_absolute_path() -> None:
    assert main(["train", *flags(SHORT, out="run", data_dir="data")]) == 0
    saved = TrainConfig.from_file(Path("run/config.yaml"))
    assert saved.data_dir == str(Path("data").resolve())


def test_a_damaged_state_is_one_short_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, "damaged")
    Path("damaged/report.html").unlink()
    Path("damaged/state.pt").write_bytes(bytes(range(256)) * 20)
    message = error(capsys, "train", "--resume", "damaged")
    assert "state.pt (5,120 bytes) is damaged or truncated" in message and len(message) < 200


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="unknown model"):
        main(["train", "--model", "resnet", "--debug"])


@pytest.mark.parametrize("module", ["yaml", "safetensors.torch"])
def test_a_missing_package_is_named_with_its_install_command(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mine.yaml").write_text(TINY.to_yaml())
    monkeypatch.setitem(sys.modules, module, None)
    package = {"yaml": "pyyaml", "safetensors.torch": "safetensors"}[module]
    assert f"pip install {package}" in error(capsys, "train", "--config", "mine.yaml")
    assert not Path("runs").exists()


def test_everything_imports_with_torch_and_numpy_alone() -> None:
    modules = ["tscnc"]
    modules += [module.name for module in pkgutil.walk_packages(tscnc.__path__, "tscnc.")]
    modules.remove("tscnc.__main__")
    code = (
        f"import sys, importlib\n"
        f"sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print('imported')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.stdout.strip() == "imported", done.stderr


def test_the_module_runs_as_the_command() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "tscnc", "train", "--epochz", "1"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 2
    assert "did you mean --epochs" in done.stderr
    assert "Traceback" not in done.stderr


def test_results_are_plain_json(comparison: Path) -> None:
    text = (comparison / "results.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert set(json.loads(text, parse_constant=refuse)["runs"]) == set(VARIANTS)
