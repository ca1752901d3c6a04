"""What a run shows while it works: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

Item = TypeVar("Item")


def track(items: Iterable[Item], *, total: int, description: str) -> Iterator[Item]:
    """Yields `items`, drawing a bar on stderr if it is a terminal and tqdm is installed."""
    if not (sys.stderr.isatty() and importlib.util.find_spec("tqdm")):
        yield from items
        return
    import tqdm

    yield from tqdm.tqdm(items, total=total, desc=description, leave=False, unit="step")


def say(text: str) -> None:
    """Prints one line of a run's log on stderr, which leaves stdout to results."""
    print(text, file=sys.stderr, flush=True)


def epoch_line(record: Mapping[str, Any], total_epochs: int) -> str:
    """Returns one line for an epoch's record of metrics, whatever named numbers it holds."""
    width = len(str(total_epochs))
    head = f"{record['phase']:>8} {record['epoch']:>{width}}/{total_epochs}"
    numbers = [
        f"{name.replace('_', ' ')} {_short(name, value)}"
        for name, value in record.items()
        if name not in ("phase", "epoch") and isinstance(value, int | float)
    ]
    return "  ".join([head, *numbers])


def _short(name: str, value: float) -> str:
    """Returns a metric in few and always as many letters, so that the lines of epochs align."""
    if isinstance(value, int):
        return f"{value:,}"
    if name.endswith(("accuracy", "sparsity")):
        return f"{100 * value:4.1f} %"
    if name == "seconds":
        return f"{value:.2f}"
    return f"{value:.3f}" if value >= 0.01 or value == 0 else f"{value:.0e}"
