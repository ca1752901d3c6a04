"""The comparison that shows what pruning and the penalties change: three runs, one seed."""

from __future__ import annotations

from pathlib import Path

from tscnc import progress, report
from tscnc.config import TrainConfig
from tscnc.files import write_json, write_text
from tscnc.run_folder import RunFolder, make_empty
from tscnc.train import train

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
        make_empty(top.path)
        for name in VARIANTS:
            (top.path / name).mkdir()
        write_text(top.config, config.to_yaml())
    for name, changes in VARIANTS.items():
        variant, folder = config.replace(**changes), RunFolder(top.path / name)
        if not (folder.results.is_file() and folder.report.is_file()):
            progress.say(f"{name}: {variant.label}")
            train(variant, folder.path, resume=folder.config.is_file())
    collect_results(top.path)
    report.write_report(top.path)
    return top.path


def collect_results(path: Path) -> None:
    """Writes the results of a comparison's runs into its own `results.json`.

    Raises:
        RunFolderError: a run is not complete.
    """
    runs = {name: RunFolder(path / name).read_results() for name in VARIANTS}
    write_json(RunFolder(path).results, {"runs": runs})


def is_comparison(path: Path) -> bool:
    """Returns whether a folder holds a comparison rather than one run."""
    return all((path / name).is_dir() for name in VARIANTS)
