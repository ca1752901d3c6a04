"""The results files: `results/<device>/<op>.csv`, one row per case and backend, all of one schema.

What is not a timing has a schema of its own, a dataclass, in `results/<device>/accuracy/`.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

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


Record = TypeVar("Record")


def read_table(path: Path, kind: type[Record]) -> list[Record]:
    """Read a file of one dataclass; a missing one is empty.

    Raises:
        ValueError: the file's columns are not the schema's, or a field is not of its type.
    """
    if not path.exists():
        return []
    columns = _columns(kind)
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if reader.fieldnames != columns:
            raise ValueError(f"{path}: expected columns {columns}, got {reader.fieldnames}")
        return [_parse(path, kind, number, line) for number, line in enumerate(reader, start=2)]


def write_table(path: Path, rows: Sequence[Any], kind: type) -> None:
    """Write all rows of one dataclass, in place of what the file held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(_columns(kind))
        for row in rows:
            writer.writerow([_text(value) for value in asdict(row).values()])
    os.replace(temporary, path)


def load(path: Path) -> list[Row]:
    """Read a file of timings; see `read_table`."""
    return read_table(path, Row)


def save(rows: Sequence[Row], folder: Path | None = None) -> None:
    """Merge rows into their files; a row with the key of an old one takes its place."""
    for path, new in _by_file(rows, folder or FOLDER):
        merged = {row.key: row for row in [*load(path), *new]}
        write_table(path, sorted(merged.values(), key=_order), Row)


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


def _columns(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def _parse(path: Path, kind: type[Record], number: int, line: dict[str, str]) -> Record:
    kinds = {"float": float, "int": int, "str": str}
    try:
        return kind(**{f.name: kinds[str(f.type)](line[f.name]) for f in fields(kind)})  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}, line {number}: {error}") from error


def _order(row: Row) -> tuple[str, str, str, float, int, str]:
    return (row.mode, row.shape, row.dtype, row.sparsity, row.threads, row.backend)


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
