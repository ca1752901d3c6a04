"""Puts the page together: `template.html` holds its layout, this file what goes where."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from tscnc import progress
from tscnc.files import write_text
from tscnc.optional import require
from tscnc.report import tables
from tscnc.report.runs import Results, Run, is_comparison, missing_files, runs_of
from tscnc.run_folder import RunFolder, RunFolderError

_TEMPLATE = Path(__file__).parent / "template.html"


def write_report(run_dir: Path) -> Path:
    """Writes the report of a run or a comparison; without matplotlib, one without plots.

    Args:
        run_dir: the folder of a complete run, or of a comparison.

    Returns:
        The path of the page, `report.html` in the folder.

    Raises:
        RunFolderError: the folder has no results, or damaged ones.
        OSError: the page cannot be written.
    """
    folder = RunFolder(run_dir)
    results = folder.read_results()
    try:
        page = _page(folder, results)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{folder.results} does not hold the results of a run: {type(error).__name__}: {error}"
        ) from error
    write_text(folder.report, page)
    return folder.report


def _page(folder: RunFolder, results: Mapping[str, Any]) -> str:
    runs = runs_of(folder, results)
    judged = is_comparison(results)
    rows = tables.rows([run.results for run in runs])
    missing = missing_files(folder, runs)
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(runs[-1].results["label"]),
        setting=escape(_setting(runs[-1].results)),
        lead=tables.judgement(rows) if judged else "",
        cards=_cards(runs),
        table=tables.measurements(rows, runs, judged=judged),
        width="narrow" if len(runs) == 1 else "",
        footnote=escape(_footnote(runs[-1].results)),
        legend=_legend(runs),
        figures=_figures(runs),
        layers="".join(
            _details(f"Layers: {run.title}", tables.layers(run.results)) for run in runs
        ),
        configuration=_details("Configuration", _configuration(folder)),
        environment=_details("Environment", _environment(runs[-1].folder)),
        missing=_warning(f"Missing or unreadable: {', '.join(missing)}.") if missing else "",
    )


def _setting(results: Results) -> str:
    return (
        f"{results['dataset']} · {results['model']} · {results['threat']} attacks with "
        f"ε = {results['epsilon']:.3g} · seed {results['seed']}"
    )


def _cards(runs: Sequence[Run]) -> str:
    main = runs[-1].results
    accuracy, sparsity = main["accuracy"], main["sparsity"]
    cards = [
        tables.card(
            "Clean accuracy",
            tables.percent(accuracy["clean"]),
            _others(runs, lambda results: tables.percent(results["accuracy"]["clean"])),
        ),
        tables.card(
            f"PGD\N{NON-BREAKING HYPHEN}{accuracy['pgd_steps']} accuracy",
            tables.percent(accuracy["pgd"]),
            _others(runs, lambda results: tables.percent(results["accuracy"]["pgd"])),
        ),
        tables.card(
            "Compression",
            tables.factor(tables.infinite(sparsity["direct_compression"])),
            f"effective {tables.factor(tables.infinite(sparsity['effective_compression']))}",
        ),
        tables.card(
            "Largest structural κ",
            tables.number(_largest_kappa(main)),
            _others(runs, lambda results: tables.number(_largest_kappa(results))),
        ),
    ]
    return "".join(cards + _savings(main))


def _savings(results: Results) -> list[str]:
    """Returns the cards on time and size, which only pruned networks have."""
    cards = []
    timing, size = results["seconds_per_step"], results["checkpoint_bytes"]
    if timing:
        ratio = timing["ratio"]
        cards.append(
            tables.card(
                "Training step",
                tables.factor(max(ratio, 1 / ratio)),
                f"{tables.milliseconds(timing['ours'])}; dense times mask "
                f"{tables.milliseconds(timing['dense_masked'])}",
                "faster" if ratio >= 1 else "slower",
            )
        )
    if size["ours"] < size["dense"]:
        cards.append(
            tables.card(
                "Checkpoint",
                tables.factor(size["dense"] / size["ours"]),
                f"{tables.kilobytes(size['ours'])}; dense {tables.kilobytes(size['dense'])}",
                "smaller",
            )
        )
    return cards


def _others(runs: Sequence[Run], show: Callable[[Results], str]) -> str:
    """Writes a number of all runs but the last, for comparison."""
    return ", ".join(f"{run.title[:3]}\N{NO-BREAK SPACE}{show(run.results)}" for run in runs[:-1])


def _largest_kappa(results: Results) -> float:
    return max(
        (tables.infinite(layer["kappa_structural"]) for layer in results["layers"]),
        default=math.nan,
    )


def _footnote(results: Results) -> str:
    """Tells how exact the accuracies are and how the time was measured."""
    count, share = results["accuracy"]["examples"], results["accuracy"]["clean"]
    parts = []
    if count and share is not None:
        error = tables.standard_error(results, "clean")
        parts.append(
            f"{count:,} test images: one image is {100 / count:.2g} points, the standard error of "
            f"the clean accuracy {100 * error:.1f} points; accuracies that differ by less than "
            "theirs count as the same."
        )
    timing = results["seconds_per_step"]
    if timing:
        dropped = f", {timing['dropped']} disturbed pairs left out" if timing["dropped"] else ""
        parts.append(
            f"Training step: median of {timing['pairs']} alternating pairs on {timing['threads']} "
            f"thread{dropped}; attack, loss, backward and optimizer, without the penalties."
        )
    parts.append("Structural κ leaves out rows and columns without a kept weight; full κ does not.")
    return " ".join(parts)


def _legend(runs: Sequence[Run]) -> str:
    return "".join(f'<li><i class="dot {run.colour}"></i>{escape(run.title)}</li>' for run in runs)


def _figures(runs: Sequence[Run]) -> str:
    try:
        require("matplotlib.figure")
    except ModuleNotFoundError as error:
        progress.say(f"the report has no plots: {error}")
        return _warning(f"No plots: {error}; then run `tscnc report` again.")
    from tscnc.report.figures import figures

    return figures(runs)


def _configuration(folder: RunFolder) -> str:
    try:
        text = folder.config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "<p>Not there.</p>"
    return f'<div class="scroll" tabindex="0"><pre>{escape(text)}</pre></div>'


def _environment(folder: RunFolder) -> str:
    try:
        content = json.loads(folder.environment.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "<p>Not there.</p>"
    return tables.facts(content) if isinstance(content, dict) else "<p>Not there.</p>"


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _warning(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'
