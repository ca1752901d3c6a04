"""The comparison that shows what pruning and the penalties change: three runs, one seed."""

from __future__ import annotations

from pathlib import Path

from tscnc import progress, report
from tscnc.config import TrainConfig
from tscnc.files import write_json, write_text
from tscnc.run_folder import RunFolder, RunFolderError, make_empty
from tscnc.session import Session
from tscnc.train import load_dataset, train

# What each run changes in the configuration of the comparison.
VARIANTS: dict[str, dict[str, float]] = {
    "dense": {"sparsity": 0.0, "tsc": 0.0, "cnc": 0.0},
    "pruned": {"tsc": 0.0, "cnc": 0.0},
    "tscnc": {},
}


def compare(config: TrainConfig, out: Path, *, resume: bool = False) -> Path:
    """Trains a dense network, a pruned one without the penalties, and a pruned one with them.

    Args:
        config: the configuration of the third run; the other two switch parts of it off.
        out: folder of the comparison, with one run folder per run; empty or absent unless `resume`.
        resume: keep the complete runs and continue the interrupted one.

    Returns:
        `out`, with the results and the report of all three runs on top.

    Raises:
        RunFolderError: a folder is in use, cannot be written or cannot be resumed.
        TrainingError: a run's loss or weights became NaN or infinite.
    """
    top = RunFolder(out)
    if not resume:
        Session(config, load_dataset(config))  # finds missing data before a folder is made
        make_empty(top.path)
        for name in VARIANTS:
            (top.path / name).mkdir()
        write_text(top.config, config.to_yaml())
    for name, changes in VARIANTS.items():
        variant, folder = config.replace(**changes), RunFolder(top.path / name)
        if not folder.complete:
            progress.say(f"\n{title(name, variant.label)}")
            train(variant, folder.path, resume=folder.config.is_file())
    collect_results(top.path)
    report.write_report(top.path)
    return top.path


def collect_results(path: Path) -> None:
    """Writes the results of a comparison's runs into its own `results.json`.

    Raises:
        RunFolderError: a run is not complete.
    """
    folders = {name: RunFolder(path / name) for name in VARIANTS}
    for name, folder in folders.items():
        if not folder.results.is_file():
            raise RunFolderError(
                f"{path} is no complete comparison, {name} has no {folder.results.name}: continue "
                f"it with `tscnc train --resume {path}`"
            )
    runs = {name: folder.read_results() for name, folder in folders.items()}
    write_json(RunFolder(path).results, {"runs": runs})


def is_comparison(path: Path) -> bool:
    """Returns whether a folder holds a comparison, perhaps a damaged one, rather than one run."""
    return any((path / name).is_dir() for name in VARIANTS)


def title(name: str, label: str) -> str:
    """Returns the heading of a run: its folder and, where that tells more, its label."""
    return name if name == label else f"{name}: {label}"
