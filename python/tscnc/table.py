"""The results of one or several runs as a plain-text table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_INFINITE = "∞"
_ABSENT = "-"


def results_table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a table with one column per run and one row per measurement.

    Args:
        runs: the content of each run's `results.json`, by a short name.

    Returns:
        Lines of equal layout: accuracies, compression, every layer's condition number, time per
        step, checkpoint size.
    """
    rows = [["", *[run["label"] for run in runs.values()]]]
    columns = [_measurements(run) for run in runs.values()]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows += [[name, *[column.get(name, _ABSENT) for column in columns]] for name in names]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _measurements(run: Mapping[str, Any]) -> dict[str, str]:
    accuracy, sparsity = run["accuracy"], run["sparsity"]
    attack = f"PGD-{accuracy['pgd_steps']} accuracy, {run['threat']} {run['epsilon']:.3g}"
    cells = {
        "clean accuracy": f"{100 * accuracy['clean']:.1f} %",
        attack: f"{100 * accuracy['pgd']:.1f} %",
        "compression, direct": _compression(sparsity["direct_compression"]),
        "compression, effective": _compression(sparsity["effective_compression"]),
    }
    for layer in run["layers"]:
        full = _condition(layer["kappa_full"])
        structural = _condition(layer["kappa_structural"])
        cells[f"κ of {layer['name']}, full | structural"] = f"{full} | {structural}"
    timing = run["seconds_per_step"]
    times = [1e3 * timing[name] for name in ("dense_masked", "ours")] if timing else None
    cells["ms per training step, dense masked | ours"] = (
        f"{times[0]:.2f} | {times[1]:.2f}" if times else _ABSENT
    )
    cells["speed-up of a training step"] = (
        f"{_three_digits(timing['ratio'])} x" if timing else _ABSENT
    )
    size = run["checkpoint_bytes"]
    cells["checkpoint kB, dense | ours"] = f"{size['dense'] / 1e3:,.0f} | {size['ours'] / 1e3:,.0f}"
    return cells


def _compression(factor: float | None) -> str:
    return _INFINITE if factor is None else f"{_three_digits(factor)} x"


def _condition(kappa: float | None) -> str:
    return _INFINITE if kappa is None else _three_digits(kappa)


def _three_digits(value: float) -> str:
    return f"{float(f'{value:.3g}'):,g}"
