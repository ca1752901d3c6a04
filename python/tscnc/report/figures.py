"""The report's figures: which curves each plot shows, and the HTML around it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from tscnc.report import svg, tables
from tscnc.report.runs import Run
from tscnc.report.svg import Bar, Curve


def figures(runs: Sequence[Run]) -> str:
    """Returns all sections of plots as HTML.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    sections = [
        _section(
            "Singular values of every layer",
            "Solid: the trained network. Dashed: just before pruning. A zero sits on the line at "
            "the foot; a pruned matrix with one has an infinite full κ.",
            [_spectrum(runs, layer["name"]) for layer in runs[-1].results["layers"]],
        ),
        _section(
            "Robustness, condition and size",
            "",
            [_robustness(runs), _conditions(runs), *_compression(runs)],
        ),
    ]
    curves = _training(runs)
    if curves:
        text = "The dotted line is where the pruned networks were pruned."
        sections.append(_section("Training", text if any(r.pruned for r in runs) else "", curves))
    return "".join(sections)


def _section(title: str, note: str, parts: Sequence[str]) -> str:
    text = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f"<section><h2>{escape(title)}</h2>{text}"
        f'<div class="figures">{"".join(parts)}</div></section>'
    )


def _figure(title: str, picture: str, note: str = "") -> str:
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f"<figure><h3>{escape(title)}</h3>{picture}{caption}</figure>"


def _spectrum(runs: Sequence[Run], name: str) -> str:
    curves, zeros = [], []
    shape: Sequence[int] = ()
    for run in runs:
        layer = _layer(run, name)
        if layer is None:
            continue
        shape = layer["shape"]
        before, after = layer["singular_values_before"], layer["singular_values"]
        if before:
            curves.append(Curve(run.colour, range(1, len(before) + 1), before, dashed=True))
        curves.append(Curve(run.colour, range(1, len(after) + 1), after))
        none = svg.without_rounding(after).count(0.0)
        if none:
            zeros.append(f"{none} {_key(run)}".strip())
    count = len(curves[-1].y) if curves else 0
    note = f"Zeros among {count}: {', '.join(zeros)}." if zeros else f"None of {count} is zero."
    picture = svg.spectrum(curves, describe=f"Singular values of {name}. {note}")
    return _figure(f"{name}, {'×'.join(map(str, shape))}", picture, note)


def _robustness(runs: Sequence[Run]) -> str:
    curves = []
    for run in runs:
        points = run.results["accuracy_vs_epsilon"]
        x = [point["epsilon"] for point in points]
        curves.append(Curve(run.colour, x, [_share(point["accuracy"]) for point in points]))
    results = runs[-1].results
    title = f"PGD-{results['accuracy']['pgd_steps']} accuracy against ε"
    picture = svg.lines(
        curves,
        describe=f"{title}, {results['threat']}",
        x_label=f"ε ({results['threat']})",
        percent=True,
        mark=results["epsilon"],
    )
    return _figure(title, picture, f"The dotted line is the ε of training, {results['epsilon']:g}.")


def _conditions(runs: Sequence[Run]) -> str:
    groups: dict[str, list[Bar]] = {}
    for run in runs:
        for layer in run.results["layers"]:
            kappa = tables.infinite(layer["kappa_structural"])
            bar = Bar(run.colour, kappa, tables.number(kappa))
            groups.setdefault(layer["name"], []).append(bar)
    title = "Structural condition number"
    return _figure(title, svg.bars(groups, describe=f"{title} of every layer"))


def _compression(runs: Sequence[Run]) -> list[str]:
    groups: dict[str, list[Bar]] = {}
    for run in runs:
        for layer in run.results["layers"] if run.pruned else ():
            for key, outlined in (("density", True), ("effective_density", False)):
                times = 1 / layer[key] if layer[key] else math.inf
                bar = Bar(run.colour, times, tables.factor(times), outlined)
                groups.setdefault(layer["name"], []).append(bar)
    if not groups:
        return []
    picture = svg.bars(groups, describe="Direct and effective compression of every layer")
    note = "Outlined: direct. Solid: effective, without weights that no path uses."
    return [_figure("Compression", picture, note)]


def _training(runs: Sequence[Run]) -> list[str]:
    """Returns one figure per measure that the metrics hold."""
    plots = []
    pruning = max((_pretraining(run) for run in runs if run.pruned), default=None)
    for key, title in (
        ("clean_accuracy", "Clean accuracy"),
        ("pgd_accuracy", "Accuracy under the training attack"),
        ("loss", "Loss"),
    ):
        curves = [curve for run in runs if (curve := _history(run, key))]
        if curves:
            picture = svg.lines(
                curves,
                describe=f"{title} by epoch",
                x_label="epoch",
                percent=key != "loss",
                mark=pruning,
            )
            plots.append(_figure(title, picture))
    return plots


def _history(run: Run, key: str) -> Curve | None:
    """Returns a metric by epoch; the record of pruning stands at the epoch it follows."""
    x: list[float] = []
    y: list[float] = []
    start = _pretraining(run)
    for record in run.metrics:
        if isinstance(record.get(key), int | float):
            offset = {"prune": start - 1, "finetune": start}.get(record["phase"], 0)
            x.append(offset + record["epoch"])
            y.append(record[key])
    return Curve(run.colour, x, y) if x else None


def _pretraining(run: Run) -> int:
    return sum(record["phase"] == "pretrain" for record in run.metrics)


def _layer(run: Run, name: str) -> Mapping[str, Any] | None:
    return next((layer for layer in run.results["layers"] if layer["name"] == name), None)


def _key(run: Run) -> str:
    """Returns the letter of a run in a comparison."""
    return f"in {run.title[:3]}" if run.title.startswith("(") else ""


def _share(accuracy: float | None) -> float:
    return math.nan if accuracy is None else accuracy
