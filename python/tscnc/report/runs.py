"""The runs a report is about, read from their folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tscnc.run_folder import RunFolder

Results = Mapping[str, Any]

_COLOURS = ("run-1", "run-2", "run-3")
_COMPARED = ("dense", "pruned", "tscnc")


@dataclass(frozen=True)
class Run:
    """One run of a report.

    Attributes:
        folder: its folder.
        results: the content of its `results.json`.
        metrics: the records of its epochs; empty if they cannot be read.
        title: what it is, with its letter in a comparison.
        colour: CSS class and variable of its colour, the same all over the page.
    """

    folder: RunFolder
    results: Results
    metrics: Sequence[Mapping[str, Any]]
    title: str
    colour: str

    @property
    def pruned(self) -> bool:
        """Whether any of its layers lost weights."""
        return any(layer["density"] < 1 for layer in self.results["layers"])


def runs_of(folder: RunFolder, results: Mapping[str, Any]) -> list[Run]:
    """Returns the runs of a comparison in their order, or the only run of a run folder."""
    if "runs" not in results:
        return [Run(folder, results, _metrics(folder), results["label"], _COLOURS[-1])]
    runs = []
    for index, (name, content) in enumerate(results["runs"].items()):
        own = RunFolder(folder.path / name)
        title = f"({chr(ord('a') + index)}) {content['label']}"
        runs.append(Run(own, content, _metrics(own), title, _COLOURS[index % len(_COLOURS)]))
    return runs


def is_comparison(results: Mapping[str, Any]) -> bool:
    """Returns whether results are of the three runs of `tscnc train --compare`."""
    return tuple(results.get("runs", ())) == _COMPARED


def missing_files(folder: RunFolder, runs: Sequence[Run]) -> list[str]:
    """Returns the files a report would show and that are absent or unreadable."""
    absent = [run.folder.metrics for run in runs if not run.metrics]
    absent += [path for path in (runs[-1].folder.environment, folder.config) if not path.is_file()]
    return [path.relative_to(folder.path).as_posix() for path in absent]


def _metrics(folder: RunFolder) -> list[dict[str, Any]]:
    """Returns the records up to the first line that is none."""
    records: list[dict[str, Any]] = []
    try:
        for line in folder.metrics.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if not isinstance(record, dict):
                break
            records.append(record)
    except (OSError, ValueError):
        pass
    return records
