"""The folder of a training run: what it holds, and how it survives an interruption at any moment.

    config.yaml  environment.json  metrics.jsonl  state.pt  checkpoint.safetensors  results.json
    report.html

`state.pt` is the run at the end of its last whole epoch, with the length `metrics.jsonl` had then.
Resuming cuts the metrics back to that length, so that a resumed run writes the same lines as an
uninterrupted one.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tscnc import environment
from tscnc.config import TrainConfig
from tscnc.files import write_bytes, write_json, write_text

STATE_FORMAT = 1


class RunFolderError(RuntimeError):
    """A run folder that cannot be created, continued or read; the message says what to do."""


class RunFolder:
    """One run's files, by name."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.state = self.path / "state.pt"
        self.checkpoint = self.path / "checkpoint.safetensors"
        self.results = self.path / "results.json"
        self.report = self.path / "report.html"

    @property
    def complete(self) -> bool:
        """Whether the run has written everything; the report comes last."""
        return self.results.is_file() and self.report.is_file()

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> RunFolder:
        """Makes an empty folder and writes the configuration into it.

        Raises:
            RunFolderError: the folder holds something already, or cannot be written.
        """
        folder = cls(path)
        make_empty(folder.path)
        write_text(folder.config, config.to_yaml())
        return folder

    def begin(self) -> None:
        """Writes what a run has before its first epoch."""
        write_json(self.environment, environment.describe())
        write_bytes(self.metrics, b"")

    @classmethod
    def reopen(cls, path: Path) -> RunFolder:
        """Opens the folder of an earlier run.

        Raises:
            RunFolderError: there is no run in it.
        """
        folder = cls(path)
        if not folder.config.is_file():
            raise RunFolderError(f"{path} is not a run folder: it has no {folder.config.name}")
        return folder

    def read_config(self) -> TrainConfig:
        """Returns the configuration the run was started with."""
        return TrainConfig.from_file(self.config)

    def read_results(self) -> dict[str, Any]:
        """Returns the content of `results.json`.

        Raises:
            RunFolderError: it is missing or damaged.
        """
        try:
            results = json.loads(self.results.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            if self.config.is_file():
                advice = f"continue the run with `tscnc train --resume {self.path}`"
            else:
                advice = "expected the folder of a complete run or comparison"
            raise RunFolderError(f"{self.path} has no {self.results.name}: {advice}") from error
        except (OSError, ValueError) as error:
            raise RunFolderError(f"cannot read {self.results}: {error}") from error
        return dict(results)

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Adds one line to the metrics, on the disk before this returns."""
        line = json.dumps(record, allow_nan=False) + "\n"
        with self.metrics.open("ab") as file:
            file.write(line.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    def save_state(self, content: Mapping[str, Any]) -> None:
        """Writes the state to resume from, atomically, with the present length of the metrics."""
        buffer = io.BytesIO()
        metrics_bytes = self.metrics.stat().st_size
        torch.save({**content, "format": STATE_FORMAT, "metrics_bytes": metrics_bytes}, buffer)
        write_bytes(self.state, buffer.getvalue())

    def load_state(self) -> dict[str, Any] | None:
        """Returns the last saved state and cuts the metrics back to it.

        Returns:
            What `save_state` was given; None if the run stopped before it saved anything.

        Raises:
            RunFolderError: the state is missing, damaged, or of another version, or the metrics are
                shorter than it says.
        """
        written = self.metrics.stat().st_size if self.metrics.is_file() else 0
        state = self.read_state()
        if state is None:
            if written:
                raise RunFolderError(f"{self.path} has no {self.state.name} to resume from")
            return None
        if written < state["metrics_bytes"]:
            raise RunFolderError(
                f"{self.metrics} holds {written} bytes, the saved state expects at least "
                f"{state['metrics_bytes']}"
            )
        with self.metrics.open("r+b") as file:
            file.truncate(state["metrics_bytes"])
        return state

    def read_state(self) -> dict[str, Any] | None:
        """Returns the last saved state, None if there is none.

        Raises:
            RunFolderError: the state is damaged, or of another version.
        """
        if not self.state.is_file():
            return None
        try:
            state = dict(torch.load(self.state, weights_only=True))
            version, _ = state["format"], state["metrics_bytes"]
        except Exception as error:
            raise RunFolderError(
                f"{self.state} ({self.state.stat().st_size:,} bytes) is damaged or truncated: "
                f"torch cannot read it ({type(error).__name__})"
            ) from error
        if version != STATE_FORMAT:
            raise RunFolderError(
                f"{self.state} has format {version!r}, this version resumes {STATE_FORMAT}"
            )
        return state


def make_empty(path: Path) -> None:
    """Makes a folder and proves that it can be written.

    Raises:
        RunFolderError: it holds something already, or cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        occupied = any(path.iterdir())
        if not occupied:
            probe = path / ".probe"
            write_bytes(probe, b"")
            probe.unlink()
    except OSError as error:
        raise RunFolderError(f"cannot write the run folder {path}: {error}") from error
    if occupied:
        raise RunFolderError(
            f"the run folder {path} is not empty: continue it with `tscnc train --resume {path}`, "
            "or choose another folder with --out"
        )


def unused(path: Path) -> Path:
    """Returns `path`, or the first of `path-2`, `path-3`, … that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
