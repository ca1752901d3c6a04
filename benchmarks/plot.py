"""Regenerate every figure from the CSV files alone: `python -m benchmarks.plot [folder]`.

`results/<device>/<op>.csv` becomes figures beside it. A shape that was measured at several
sparsities has a figure of its own, `<op>-<shape>.svg`: time against density, one panel per mode.
The other rows share `<op>.svg`: bars per shape and backend. A shorter time is better, and the axis
says so. The sparse layers, the training step and the errors of spectra have figures of their own:
`plot_sparse.py`, `accuracy.py`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import accuracy, plot_sparse, results
from benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw = Callable[["Axes", list[Row], dict[str, str]], None]
COLOURS = ("#1b6ca8", "#d1495b", "#8a8f98", "#e09f3e", "#3a7d44", "#7b4ea3", "#111827", "#00a6a6")


def plot_file(path: Path) -> list[Path]:
    """Draw one results file and return the figures' paths.

    Raises:
        ValueError: the file has no rows, or is not a results file.
    """
    if path.parent.name == "accuracy":
        return accuracy.plot_file(path)
    rows = results.load(path)
    if not rows:
        raise ValueError(f"{path}: no rows to plot")
    if rows[0].op in plot_sparse.DENSE:
        return plot_sparse.figures(path, rows)
    swept = {
        shape
        for shape, group in _grouped(rows, lambda row: row.shape).items()
        if len({row.sparsity for row in group}) > 1
    }
    figures = _grouped(rows, lambda row: f"-{row.shape}" if row.shape in swept else "")
    return [
        _figure(path.with_name(f"{path.stem}{suffix}.svg"), group, _lines if suffix else _bars)
        for suffix, group in figures.items()
    ]


def _figure(target: Path, rows: list[Row], draw: Draw) -> Path:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tscnc"
    from matplotlib import pyplot

    panels = _grouped(
        rows,
        lambda row: f"{row.mode.replace('_', ' + ')}, {row.dtype}, {row.threads} thread(s)",
    )
    columns = min(2, len(panels)) if draw is _lines else 1
    lines = -(-len(panels) // columns)
    size = (5.4 * columns if columns > 1 else 8, 3.6 * lines + 0.4)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=size, squeeze=False, layout="constrained"
    )
    backends = sorted({row.backend for row in rows})
    colours = dict(zip(backends, itertools.cycle(COLOURS), strict=False))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, panel) in zip(axes.flat, panels.items(), strict=False):
        axis.set_yscale("log")
        draw(axis, panel, colours)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylabel("ms per call, lower is better")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    shape = f" {rows[0].shape}" if draw is _lines else ""
    figure.suptitle(f"{rows[0].op}{shape} on {rows[0].device}", x=0.01, ha="left")
    figure.savefig(target, metadata={"Date": None}, facecolor="white")
    pyplot.close(figure)
    return target


def _grouped(rows: list[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _lines(axis: Axes, rows: list[Row], colours: dict[str, str]) -> None:
    for backend in sorted({row.backend for row in rows}):
        line = sorted((r for r in rows if r.backend == backend), key=lambda r: -r.sparsity)
        density = [100 * (1 - row.sparsity) for row in line]
        axis.plot(density, [r.p50 for r in line], "o-", color=colours[backend], label=backend)
        axis.fill_between(
            density, [r.p20 for r in line], [r.p80 for r in line], color=colours[backend], alpha=0.2
        )
    axis.set_xscale("log")
    axis.set_xlabel("density, % of weights kept")
    axis.xaxis.set_major_formatter("{x:g}")


def _bars(axis: Axes, rows: list[Row], colours: dict[str, str]) -> None:
    backends = sorted({row.backend for row in rows})
    shapes = sorted({row.shape for row in rows})
    width = 0.8 / len(backends)
    for offset, backend in enumerate(backends):
        bars = [row for row in rows if row.backend == backend]
        places = [shapes.index(row.shape) + (offset + 0.5) * width - 0.4 for row in bars]
        spread: Any = [[r.p50 - r.p20 for r in bars], [r.p80 - r.p50 for r in bars]]
        drawn = axis.bar(places, [r.p50 for r in bars], width, color=colours[backend])
        axis.errorbar(places, [r.p50 for r in bars], spread, fmt="none", ecolor="#444", lw=1)
        drawn.set_label(backend)
        axis.bar_label(drawn, [f"{r.rate:.3g} {r.unit}" for r in bars], fontsize=7, padding=3)
    axis.set_xticks(range(len(shapes)), shapes)


def main() -> None:
    """Draw every results file under the folder."""
    parser = argparse.ArgumentParser(description="Redraw the figures from the results files.")
    parser.add_argument("folder", nargs="?", type=Path, default=results.FOLDER)
    for path in sorted(parser.parse_args().folder.rglob("*.csv")):
        print(*plot_file(path), sep="\n")


if __name__ == "__main__":
    main()
