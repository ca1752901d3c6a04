"""The one results schema: `results/<device>/<op>.csv`, one row per case and backend."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
KEY = ("op", "backend", "mode", "shape", "dtype", "sparsity", "device", "threads")


@dataclass(frozen=True)
class Row:
    """One measurement. `p50`, `p20`, `p80` are milliseconds per call, `rate` is taken at `p50`."""

    op: str
    backend: str
    mode: str
    shape: str
    dtype: str
    sparsity: float
    p50: float
    p20: float
    p80: float
    rate: float
    unit: str
    peak_mib: float
    device: str
    threads: int
    torch: str
    triton: str
    cuda: str
    commit: str
    date: str

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows the same measurement."""
        return tuple(_text(getattr(self, name)) for name in KEY)


def load(path: Path) -> list[Row]:
    """Read a results file; a missing one is empty.

    Raises:
        ValueError: the file's columns are not the schema's, or a field is not of its type.
    """
    if not path.exists():
        return []
    columns = [field.name for field in fields(Row)]
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if reader.fieldnames != columns:
            raise ValueError(f"{path}: expected columns {columns}, got {reader.fieldnames}")
        return [_parse(path, number, record) for number, record in enumerate(reader, start=2)]


def save(rows: Sequence[Row], folder: Path | None = None) -> None:
    """Merge rows into their files; a row with the key of an old one takes its place."""
    for path, new in _by_file(rows, folder or FOLDER):
        merged = {row.key: row for row in [*load(path), *new]}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow([field.name for field in fields(Row)])
            for row in sorted(merged.values(), key=_order):
                writer.writerow([_text(value) for value in asdict(row).values()])
        os.replace(temporary, path)


def saved_backends(case: dict[str, Any], folder: Path | None = None) -> set[str]:
    """Return the backends that have a row for this case (its key without the backend)."""
    path = (folder or FOLDER) / case["device"] / f"{case['op']}.csv"
    wanted = {name: _text(value) for name, value in case.items()}
    return {
        row.backend
        for row in load(path)
        if all(_text(getattr(row, name)) == value for name, value in wanted.items())
    }


def _by_file(rows: Sequence[Row], folder: Path) -> Iterator[tuple[Path, list[Row]]]:
    paths = sorted({folder / row.device / f"{row.op}.csv" for row in rows})
    for path in paths:
        yield path, [row for row in rows if folder / row.device / f"{row.op}.csv" == path]


def _parse(path: Path, number: int, record: dict[str, str]) -> Row:
    kinds = {"float": float, "int": int, "str": str}
    try:
        return Row(
            **{field.name: kinds[str(field.type)](record[field.name]) for field in fields(Row)}
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}, line {number}: {error}") from error


def _order(row: Row) -> tuple[str, str, str, float, int, str]:
    return (row.mode, row.shape, row.dtype, row.sparsity, row.threads, row.backend)


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
