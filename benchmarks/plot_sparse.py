"""Two figures of a sparse op from its results: speed-up over dense, and rates under the roofs.

`<op>-speedup.svg` has one panel per shape: how many times faster than the dense layer, against
sparsity, ours and every peer, with the break-even. `<op>-roofline.svg` shows the rates of the same
runs on the kept weights, below the measured rates of multiply-adds fed from registers, L1, L2, L3
and memory (`roofline.csv` beside it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import results, targets
from benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = Mapping[str, Sequence[tuple[float, float]]]

MODES = {"train_step": "pgd10_step"}
# What is drawn, in this order: the backends of a line, of which the fastest counts, and its style.
STYLES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "ours, values": (("ours, values", "ours"), "#1b6ca8", "o-"),
    "ours, dense weight": (("ours, dense weight",), "#6fb1de", "o-"),
    "ours, raw ops": (("ours, raw ops",), "#00a6a6", "o:"),
    "SparseProp": (("SparseProp", *targets.SPARSEPROP_CONV), "#d1495b", "s-"),
    "torch.sparse.mm CSR": (("torch.sparse.mm CSR",), "#e09f3e", "^-"),
    "MKL CSR, feature-major": (("MKL CSR, feature-major",), "#3a7d44", "v-"),
    "F.linear CSR": (("F.linear CSR",), "#7b4ea3", "D-"),
    "torchsparsegradutils": (("torchsparsegradutils",), "#8a6d3b", "x-"),
    "condensed gather": (("condensed gather",), "#b56576", "+-"),
    "dense(W * mask)": (("F.linear(W * mask)", "F.conv2d(W * mask)"), "#8a8f98", ".-"),
    "free convolutions": (("free convolutions",), "#111827", "*--"),
}
DENSE = {**targets.DENSE, "train_step": "dense, masked"}
TICKS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)
ROOFS = ("registers", "L1", "L2", "L3", "DRAM")


def figures(path: Path, rows: list[Row]) -> list[Path]:
    """Draw the figures of an op of `DENSE` beside its results file and return their paths."""
    op = rows[0].op
    mode = MODES.get(op, "forward_backward")
    chosen = [r for r in rows if r.mode == mode and r.dtype == "float32" and r.threads == 1]
    if not chosen:
        return []
    kind = "PGD-10 step" if op in MODES else "forward + backward"
    shapes = {"masked_linear": ", batch x inputs x outputs"}.get(op, "")
    title = f"{op}, {kind}, fp32, one thread, {rows[0].device}{shapes}"
    drawn = [
        _figure(path.with_name(f"{op}-speedup.svg"), chosen, f"Speed-up: {title}", _draw_speedup)
    ]
    roofs = {row.shape: row.rate for row in results.load(path.with_name("roofline.csv"))}
    if roofs and op in targets.DENSE:

        def draw(axis: Axes, panel: list[Row]) -> None:
            _draw_roofline(axis, panel, roofs)

        target = path.with_name(f"{op}-roofline.svg")
        drawn.append(_figure(target, chosen, f"Rate on the kept weights: {title}", draw))
    return drawn


def _figure(
    target: Path, rows: list[Row], title: str, draw: Callable[[Axes, list[Row]], None]
) -> Path:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tscnc"
    from matplotlib import pyplot

    shapes = _shapes(rows)
    columns = min(3, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, axes = pyplot.subplots(
        lines,
        columns,
        figsize=(4.3 * columns + 0.4, 3.3 * lines + 1.1),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis in axes.flat[len(shapes) :]:
        axis.set_visible(False)
    labelled = {}
    for axis, shape in zip(axes.flat, shapes, strict=False):
        draw(axis, [row for row in rows if row.shape == shape])
        axis.set_title(shape, loc="left", fontsize=10)
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelleft=True, labelsize=8)
        handles, names = axis.get_legend_handles_labels()
        labelled |= dict(zip(names, handles, strict=True))
    figure.legend(
        labelled.values(), labelled, loc="outside lower center", ncols=4, fontsize=9, frameon=False
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(target, metadata={"Date": None}, facecolor="white")
    pyplot.close(figure)
    return target


def _shapes(rows: Sequence[Row]) -> list[str]:
    """In the order of the targets' table; shapes without a target come last."""
    known = [*targets.LINEAR_SHAPES, *targets.CONV_SHAPES, *targets.TRAIN_SHAPES]
    present = {row.shape for row in rows}
    return [s for s in known if s in present] + sorted(present - set(known))


def _by_style(rows: Sequence[Row]) -> Lines:
    """(sparsity, milliseconds) of every style that was measured, the fastest of its backends."""
    lines = {}
    for name, (backends, _, _) in STYLES.items():
        best: dict[float, float] = {}
        for row in rows:
            if row.backend in backends:
                best[row.sparsity] = min(row.p50, best.get(row.sparsity, row.p50))
        if best:
            lines[name] = sorted(best.items())
    return lines


def _draw_speedup(axis: Axes, rows: list[Row]) -> None:
    op, shape = rows[0].op, rows[0].shape
    dense = {row.sparsity: row.p50 for row in rows if row.backend == DENSE[op]}
    for name, line in _by_style(rows).items():
        if name == "ours, raw ops":
            continue
        points = [(s, dense[s] / time) for s, time in line if s in dense]
        _, colour, style = STYLES[name]
        width = 2.2 if name == "ours, values" else 1.2
        axis.plot(*_places(points), style, color=colour, label=name, lw=width, ms=4)
    goals = next((t for t in targets.TABLE if t.op == op and shape in t.shapes), None)
    if goals is not None:
        wanted = [(s, goal) for s in TICKS if (goal := goals.at(shape, s)) is not None]
        axis.plot(*_places(wanted), "_", color="#111827", ms=11, mew=1.6, label="target")
    axis.axhline(1, color="#111827", lw=1)
    axis.annotate(
        "as fast as dense",
        (0.99, 1),
        xycoords=("axes fraction", "data"),
        xytext=(0, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )
    _sparsity_axis(axis, rows)
    axis.set_yscale("log")
    axis.set_yticks([0.2, 0.5, 1, 2, 5, 10, 20, 50, 100])
    axis.set_ylim(*((0.2, 100) if op in targets.DENSE else (0.7, 30)))
    axis.yaxis.set_major_formatter("{x:g}×")
    axis.yaxis.set_minor_formatter("")
    axis.set_ylabel("times as fast as dense", fontsize=9)


def _draw_roofline(axis: Axes, rows: list[Row], roofs: Mapping[str, float]) -> None:
    work = {row.sparsity: row.rate * row.p50 for row in rows}
    lines = dict(_by_style(rows))
    lines["dense"] = [(r.sparsity, r.p50) for r in rows if r.backend == DENSE[r.op]]
    for name in ("ours, values", "ours, raw ops", "SparseProp", "torch.sparse.mm CSR", "dense"):
        if name not in lines:
            continue
        points = sorted((s, work[s] / time) for s, time in lines[name])
        colour, style = STYLES[name][1:] if name in STYLES else ("#8a8f98", ".-")
        width = 2.2 if name == "ours, values" else 1.2
        axis.plot(*_places(points), style, color=colour, label=name, lw=width, ms=4)
    for level in ROOFS:
        if level in roofs:
            axis.axhline(roofs[level], color="#111827", lw=0.9, ls=(0, (4, 2)))
            axis.annotate(
                f"{level}: {roofs[level]:.0f}" + (" GF/s peak" if level == "registers" else ""),
                (0.99, roofs[level]),
                xycoords=("axes fraction", "data"),
                xytext=(0, -2 if level == "L1" else 2),
                textcoords="offset points",
                ha="right",
                va="top" if level == "L1" else "bottom",
                fontsize=7.5,
            )
    _sparsity_axis(axis, rows)
    axis.set_yscale("log")
    axis.set_yticks([0.5, 1, 2, 5, 10, 20, 50, 100])
    axis.set_ylim(0.5, 1.6 * max(roofs.values()))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    axis.set_ylabel("GF/s on kept weights", fontsize=9)


def _places(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Sparsities at the logarithm of what is kept, so that 99 and 99.9 % are apart."""
    return [1 / (1 - s) for s, _ in points], [y for _, y in points]


def _sparsity_axis(axis: Axes, rows: list[Row]) -> None:
    measured = {row.sparsity for row in rows}
    ticks = [s for s in TICKS if min(measured) <= s <= max(measured)]
    axis.set_xscale("log")
    axis.set_xlim(1 / (1 - min(measured)) / 1.15, 1 / (1 - max(measured)) * 1.15)
    axis.set_xticks([1 / (1 - s) for s in ticks], [f"{100 * s:g}" for s in ticks])
    axis.minorticks_off()
    axis.set_xlabel("sparsity, % of the weights removed", fontsize=9)
