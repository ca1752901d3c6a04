"""The report's numbers as HTML: headline cards, the comparison table, layers, key-value lists.

κ and compression are None in `results.json` where they are infinite; here they are infinity again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tscnc.report.runs import Results, Run

_ABSENT = "–"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Row:
    """One measurement of every run.

    Attributes:
        group: heading it stands under.
        name: what is measured.
        phrase: what is measured, in a sentence.
        values: a number per run, None where a run has none.
        show: writes a number.
        change: tells how the third value differs from the second; None for measurements that are
            neither better nor worse when they change.
        larger_is_better: direction of `change`.
        noise: a change up to this is no change.
    """

    group: str
    name: str
    phrase: str
    values: Sequence[float | None]
    show: Callable[[float], str]
    change: Callable[[float, float], str] | None = None
    larger_is_better: bool = True
    noise: float = 0.0


def percent(share: float) -> str:
    """Writes a share: `93.2 %`."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def factor(value: float) -> str:
    """Writes a factor with up to three digits: `99.8×`, `2×`."""
    return f"{float(f'{value:.3g}'):,g}×" if math.isfinite(value) else "∞"


def number(value: float) -> str:
    """Writes a number with three digits: `1,230`, `0.0123`, `4.56·10⁷`, `∞`."""
    if not math.isfinite(value):
        return "∞"
    if value == 0:
        return "0"
    mantissa, _, power = f"{value:.2e}".partition("e")
    exponent = int(power)
    if -4 <= exponent < 5:
        return f"{float(f'{value:.2e}'):,.{max(0, 2 - exponent)}f}"
    return f"{mantissa}·10{str(exponent).translate(_SUPERSCRIPTS)}"


def milliseconds(seconds: float) -> str:
    """Writes a duration: `12.3 ms`."""
    return f"{number(1e3 * seconds)}\N{NO-BREAK SPACE}ms"


def kilobytes(count: float) -> str:
    """Writes a size: `1,230 kB`."""
    return f"{count / 1e3:,.{1 if count < 1e5 else 0}f}\N{NO-BREAK SPACE}kB"


def points(new: float, old: float) -> str:
    """Writes the difference of two shares: `+2.2 points`."""
    return f"{100 * (new - old):+.1f} points".replace("-", "−")


def times(new: float, old: float) -> str:
    """Writes how a positive number, perhaps infinite, changed: `÷ 3.1`, `× 1.2`."""
    if math.isinf(new):
        return "∞ now"
    if math.isinf(old):
        return "finite now"
    sign, change = ("÷", old / new) if new < old else ("×", new / old)
    return f"{sign}\N{NO-BREAK SPACE}{number(change)}"


def infinite(value: float | None) -> float:
    """Returns what None stands for in compression and condition numbers."""
    return math.inf if value is None else value


def rows(runs: Sequence[Results]) -> list[Row]:
    """Returns the measurements of the runs, accuracy first."""
    first = runs[0]
    attack = f"PGD-{first['accuracy']['pgd_steps']}, {first['threat']} {first['epsilon']:.3g}"
    table = []
    for kind, name in (("clean", "clean"), ("pgd", attack)):
        shares = [r["accuracy"][kind] for r in runs]
        phrase = f"{'PGD' if kind == 'pgd' else kind} accuracy"
        noise = max(standard_error(r, kind) for r in runs)
        table.append(Row("Accuracy", name, phrase, shares, percent, points, noise=noise))
    for kind in ("direct", "effective"):
        factors = [infinite(r["sparsity"][f"{kind}_compression"]) for r in runs]
        table.append(Row("Compression", kind, f"{kind} compression", factors, factor))
    for kind in ("structural", "full"):
        for layer in first["layers"]:
            kappas = [_kappa(r, layer["name"], kind) for r in runs]
            group = f"Condition number κ, {kind}"
            table.append(Row(group, layer["name"], f"{kind} κ of", kappas, number, times, False))
    group = "Training step, one thread"
    for key, name in (("dense_masked", "dense times mask"), ("ours", "ours")):
        table.append(Row(group, name, name, [_timing(r, key) for r in runs], milliseconds))
    table.append(Row(group, "speed-up", "speed-up", [_timing(r, "ratio") for r in runs], factor))
    for key in ("dense", "ours"):
        sizes = [r["checkpoint_bytes"][key] for r in runs]
        table.append(Row("Checkpoint", key, f"{key} checkpoint", sizes, kilobytes))
    return [row for row in table if any(value is not None for value in row.values)]


def standard_error(results: Results, kind: str) -> float:
    """Returns the standard error of a run's accuracy, 0 where it is not known."""
    count, share = results["accuracy"]["examples"], results["accuracy"][kind]
    if not count or share is None:
        return 0.0
    return math.sqrt(max(share * (1 - share), 1 / (4 * count)) / count)


def verdict(row: Row) -> tuple[str, str]:
    """Returns how the third run differs from the second: a word for CSS and the text."""
    old, new = row.values[1], row.values[2]
    if row.change is None or old is None or new is None:
        return "", ""
    if row.show(old) == row.show(new):
        return "same", "same"
    if abs(new - old) <= row.noise:
        return "same", row.change(new, old)
    better = (new > old) == row.larger_is_better
    return ("better" if better else "worse"), row.change(new, old)


def judgement(table: Sequence[Row]) -> str:
    """Returns a list of what the third run does better than the second, the same, and worse."""
    found: dict[str, dict[str, list[str]]] = {"better": {}, "same": {}, "worse": {}}
    for row in table:
        kind, _ = verdict(row)
        if kind:
            names = found[kind].setdefault(row.phrase, [])
            names += [row.name] if row.phrase.endswith(" of") else []
    lines = []
    for kind, phrases in found.items():
        if phrases:
            parts = [f"{phrase} {', '.join(names)}".strip() for phrase, names in phrases.items()]
            lines.append(f'<dt class="{kind}">{kind}</dt><dd>{escape("; ".join(parts))}</dd>')
    return (
        '<p class="lead">Against pruning alone (b), this network (c) is</p>'
        f'<dl class="judgement">{"".join(lines)}</dl>'
    )


def measurements(table: Sequence[Row], runs: Sequence[Run], *, judged: bool) -> str:
    """Returns the measurements as a table with a column per run.

    Args:
        table: what `rows` returned.
        runs: the runs, for the heads of the columns.
        judged: add a column that tells what the third run changes against the second.
    """
    heads = "".join(
        f'<th scope="col"><i class="dot {run.colour}"></i>{escape(run.title)}</th>' for run in runs
    )
    if judged:
        heads += '<th scope="col">(c) against (b)</th>'
    lines, group = [], ""
    span = 1 + len(runs) + judged
    for row in table:
        if row.group != group:
            group = row.group
            lines.append(
                f'<tr class="group"><th colspan="{span}" scope="colgroup">'
                f"<span>{escape(group)}</span></th></tr>"
            )
        cells = "".join(f"<td>{escape(_shown(row, value))}</td>" for value in row.values)
        if judged:
            kind, text = verdict(row)
            cells += f'<td class="verdict {kind}">{escape(text)}</td>'
        lines.append(f'<tr><th scope="row">{escape(row.name)}</th>{cells}</tr>')
    return _table(f'<tr><th scope="col"></th>{heads}</tr>', lines)


def layers(results: Results) -> str:
    """Returns what is known of every layer of one run as a table."""
    heads = (
        "layer",
        "shape",
        "kept",
        "effective",
        "dead rows",
        "dead columns",
        "structural rank",
        "σ max",
        "σ min, full",
        "σ min, structural",
    )
    lines = []
    for layer in results["layers"]:
        cells = (
            "×".join(map(str, layer["shape"])),
            f"{100 * layer['density']:.3g} %",
            f"{100 * layer['effective_density']:.3g} %",
            str(layer["dead_rows"]),
            str(layer["dead_columns"]),
            str(layer["structural_rank"]),
            number(layer["sigma_max"]),
            number(layer["sigma_min_full"]),
            number(layer["sigma_min_structural"]),
        )
        body = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{escape(layer["name"])}</th>{body}</tr>')
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    return _table(f"<tr>{head}</tr>", lines)


def facts(content: Mapping[str, Any]) -> str:
    """Returns a nested mapping as a table of names and values."""
    lines = [
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in _flat(content)
    ]
    return _table("", lines, kind="facts")


def card(title: str, value: str, note: str, unit: str = "") -> str:
    """Returns a headline number with its name above and a note below."""
    return (
        f'<div class="card"><h3>{escape(title)}</h3>'
        f'<p class="value">{escape(value)} <small>{escape(unit)}</small></p>'
        f'<p class="note">{escape(note)}</p></div>'
    )


def _kappa(run: Results, name: str, kind: str) -> float | None:
    for layer in run["layers"]:
        if layer["name"] == name:
            return infinite(layer[f"kappa_{kind}"])
    return None


def _timing(run: Results, key: str) -> float | None:
    timing = run["seconds_per_step"]
    return None if timing is None else timing[key]


def _shown(row: Row, value: float | None) -> str:
    return _ABSENT if value is None else row.show(value)


def _table(head: str, lines: Iterable[str], kind: str = "") -> str:
    return (
        f'<div class="scroll {kind}" tabindex="0"><table><thead>{head}</thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield prefix + str(name), ", ".join(map(str, value)) or _ABSENT
        else:
            yield prefix + str(name), _ABSENT if value is None else str(value)
