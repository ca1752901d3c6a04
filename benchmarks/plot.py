"""Regenerate every figure from the CSV files alone: `python -m benchmarks.plot [folder]`.

`results/<device>/<op>.csv` becomes `<op>.svg` beside it: one panel per (mode, dtype, threads). A
panel shows time against density when the op was measured at several sparsities of one shape, and a
bar per backend and shape otherwise; in both a shorter time is better and the axis says so.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import results
from benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#1b6ca8", "#d1495b", "#8a8f98", "#e09f3e", "#3a7d44", "#7b4ea3", "#111827", "#00a6a6")


def plot_file(path: Path) -> Path:
    """Draw one results file to an SVG of the same name and return its path."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tscnc"
    from matplotlib import pyplot

    rows = results.load(path)
    if not rows:
        raise ValueError(f"{path}: no rows to plot")
    panels = _panels(rows)
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(8, 3.2 * len(panels)), squeeze=False, layout="constrained"
    )
    backends = sorted({row.backend for row in rows})
    colours = dict(zip(backends, itertools.cycle(COLOURS), strict=False))
    for axis, (title, panel) in zip(axes[:, 0], panels.items(), strict=True):
        draw = _lines if len({row.sparsity for row in panel}) > 1 else _bars
        draw(axis, panel, colours)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_yscale("log")
        axis.set_ylabel("ms per call, lower is better")
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{rows[0].op} on {rows[0].device}", x=0.01, ha="left")
    target = path.with_suffix(".svg")
    figure.savefig(target, metadata={"Date": None})
    pyplot.close(figure)
    return target


def _panels(rows: list[Row]) -> dict[str, list[Row]]:
    panels: dict[str, list[Row]] = {}
    for row in rows:
        title = f"{row.mode.replace('_', ' ')}, {row.dtype}, {row.threads} thread(s)"
        swept = len({other.sparsity for other in rows if other.shape == row.shape}) > 1
        panels.setdefault(f"{title}, {row.shape}" if swept else title, []).append(row)
    return panels


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
        print(plot_file(path))


if __name__ == "__main__":
    main()
