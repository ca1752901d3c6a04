"""Plots as inline SVG, coloured by the page's CSS variables.

Matplotlib draws with placeholder colours that become `var(--…)`, so that one picture serves light
and dark pages. Text stays text, in the page's font.
"""

from __future__ import annotations

import html
import io
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tscnc.optional import require

# CSS variable -> the colour that stands for it while matplotlib draws.
_COLOURS = {
    "ink": "#0a0a01",
    "muted": "#0a0a02",
    "grid": "#0a0a03",
    "run-1": "#0a0a04",
    "run-2": "#0a0a05",
    "run-3": "#0a0a06",
}
_WIDTH, _HEIGHT, _POINTS = 4.4, 2.9, 72
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tscnc",
    "font.size": 10,
    "axes.edgecolor": _COLOURS["muted"],
    "axes.labelcolor": _COLOURS["muted"],
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _COLOURS["grid"],
    "grid.linewidth": 0.8,
    "text.color": _COLOURS["ink"],
    "xtick.color": _COLOURS["muted"],
    "ytick.color": _COLOURS["muted"],
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "hatch.linewidth": 0.8,
}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_MOST_TICKS = 6

# The place of zeros below the smallest value of a logarithmic axis, as a share of its length.
_ZERO_GAP = 0.16


@dataclass(frozen=True)
class Curve:
    """A line of a plot.

    Attributes:
        colour: CSS variable of its colour, such as `"run-1"`.
        x: positions.
        y: values.
        dashed: draw it dashed and thin.
    """

    colour: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar of a plot.

    Attributes:
        colour: CSS variable of its colour.
        value: its length, >= 1; infinity is a hatched bar.
        label: its value in words.
        outlined: draw its outline only.
    """

    colour: str
    value: float
    label: str
    outlined: bool = False


def spectrum(curves: Sequence[Curve], *, describe: str) -> str:
    """Returns singular values on a logarithmic axis, with zeros on a line of their own below it.

    Args:
        curves: descending singular values; what is below rounding counts as 0.
        describe: what the picture shows, for those who do not see it.
    """
    cleaned = [Curve(c.colour, c.x, without_rounding(c.y), c.dashed) for c in curves]
    positive = [value for curve in cleaned for value in curve.y if value > 0]
    has_zeros = any(value == 0 for curve in cleaned for value in curve.y)

    def draw(axes: Any) -> None:
        low, high = min(positive, default=0.1), max(positive, default=1.0)
        span = max(math.log10(high / low), 0.3)
        zero = low / 10 ** (_ZERO_GAP * span)
        for curve in cleaned:
            _line(axes, curve, [max(value, zero) for value in curve.y])
        axes.set_yscale("log")
        axes.set_ylim(
            (zero if has_zeros else low) / 10 ** (0.04 * span), high * 10 ** (0.06 * span)
        )
        ticks = decades(low, high)
        axes.set_yticks([*ticks, *([zero] if has_zeros else [])])
        axes.set_yticklabels([*map(power_of_ten, ticks), *(["0"] if has_zeros else [])])
        axes.set_xlabel("index, largest first")
        axes.locator_params(axis="x", nbins=6)

    return _draw(draw, describe)


def lines(
    curves: Sequence[Curve],
    *,
    describe: str,
    x_label: str,
    percent: bool = False,
    mark: float | None = None,
) -> str:
    """Returns curves over a linear axis.

    Args:
        curves: what to draw.
        describe: what the picture shows.
        x_label: name of the horizontal axis.
        percent: the values are shares, drawn from 0 to 100 %; otherwise the axis is logarithmic.
        mark: a place on the horizontal axis to mark by a vertical line.
    """

    def draw(axes: Any) -> None:
        for curve in curves:
            _line(axes, curve, curve.y, marker=len(curve.x) <= 12)
        if mark is not None:
            axes.axvline(mark, color=_COLOURS["muted"], linewidth=1, linestyle=(0, (2, 3)))
        if percent:
            axes.set_ylim(0, 1.02)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
            axes.set_yticklabels(["0", "25 %", "50 %", "75 %", "100 %"])
        else:
            positive = [value for curve in curves for value in curve.y if value > 0]
            axes.set_yscale("log")
            ticks = decades(min(positive, default=0.1), max(positive, default=1.0))
            axes.set_yticks(ticks)
            axes.set_yticklabels(map(power_of_ten, ticks))
        axes.set_xlabel(x_label)
        axes.locator_params(axis="x", nbins=6, integer=x_label == "epoch")

    return _draw(draw, describe)


def bars(groups: Mapping[str, Sequence[Bar]], *, describe: str) -> str:
    """Returns groups of bars on a logarithmic axis that starts at 1.

    Args:
        groups: the bars of each named group, top to bottom.
        describe: what the picture shows.
    """
    every = [bar for group in groups.values() for bar in group]
    most = max((bar.value for bar in every if math.isfinite(bar.value)), default=10.0)
    right = max(most, 2.0) ** 1.3

    def draw(axes: Any) -> None:
        place, middles = 0.0, []
        for group in groups.values():
            middles.append(place + (len(group) - 1) / 2)
            for bar in group:
                _bar(axes, bar, place, right)
                place += 1
            place += 0.9
        axes.set_xscale("log")
        axes.set_xlim(1, right)
        axes.set_ylim(place - 1.2, -0.8)
        axes.set_yticks(middles)
        axes.set_yticklabels(groups)
        axes.tick_params(axis="y", length=0, labelcolor=_COLOURS["ink"])
        axes.grid(visible=False, axis="y")
        ticks = decades(1.0, max(most, 2.0))
        axes.set_xticks(ticks)
        axes.set_xticklabels(map(power_of_ten, ticks))

    return _draw(draw, describe, max(_HEIGHT, 0.7 + 0.17 * (len(every) + 0.9 * len(groups))))


def without_rounding(values: Sequence[float]) -> list[float]:
    """Returns singular values with what float64 cannot tell from 0 set to 0."""
    floor = max(values, default=0.0) * len(values) * 2.0**-48
    return [value if value > floor else 0.0 for value in values]


def decades(low: float, high: float) -> list[float]:
    """Returns the ticks of a logarithmic axis: powers of ten, or multiples of them if few fit."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    inside = [k for k in range(first, last + 1) if low * 0.999 <= 10.0**k <= high * 1.001]
    if len(inside) > 1:
        step = math.ceil(len(inside) / _MOST_TICKS)
        return [10.0**k for k in inside[::-1][::step][::-1]]
    ticks = [low]
    for multiples in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        every = [m * 10.0**k for k in range(first, last + 1) for m in multiples]
        ticks = [tick for tick in every if low * 0.999 <= tick <= high * 1.001] or ticks
        if len(ticks) > 2:
            break
    return ticks


def power_of_ten(value: float) -> str:
    """Returns a tick's label: plain from 0.01 to 1000, else like `10⁻⁴`."""
    if 0.0099 <= value <= 1001:
        return f"{value:.3g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    mantissa = value / 10.0**exponent
    head = "" if abs(mantissa - 1) < 1e-6 else f"{mantissa:.2g}·"
    return f"{head}10{str(exponent).translate(_SUPERSCRIPTS)}"


def _line(axes: Any, curve: Curve, values: Sequence[float], *, marker: bool = False) -> None:
    axes.plot(
        curve.x,
        values,
        color=_COLOURS[curve.colour],
        linestyle=(0, (3, 2)) if curve.dashed else "-",
        linewidth=1.2 if curve.dashed else 1.8,
        marker="o" if marker and not curve.dashed else None,
        markersize=3.5,
    )


def _bar(axes: Any, bar: Bar, place: float, right: float) -> None:
    endless = not math.isfinite(bar.value)
    end = right if endless else max(bar.value, 1.0)
    axes.barh(
        place,
        end - 1,
        left=1,
        height=0.74,
        color="none" if bar.outlined or endless else _COLOURS[bar.colour],
        edgecolor=_COLOURS[bar.colour],
        linewidth=1,
        hatch="////" if endless else None,
    )
    axes.annotate(
        bar.label,
        (1 if endless else end, place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center_baseline",
        fontsize=9,
        fontweight="bold" if endless else "normal",
    )


def _draw(draw: Callable[[Any], None], describe: str, height: float = _HEIGHT) -> str:
    matplotlib = require("matplotlib")
    figure_module = require("matplotlib.figure")
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = figure_module.Figure(figsize=(_WIDTH, height), dpi=_POINTS, layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        draw(axes)
        axes.minorticks_off()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), describe)


def _inline(svg: str, describe: str) -> str:
    """Returns an SVG file's picture as an element of a page."""
    box = _first(r'viewBox="([^"]+)"', svg)
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    for unwanted in (r"<metadata>.*?</metadata>", r"<!--.*?-->", r"<style.*?</style>"):
        body = re.sub(unwanted, "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    body = re.sub(r"font-family: [^;\"]*;?\s*", "", body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    for name, colour in _COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    body = re.sub(r"\n\s*", "\n", _with_own_ids(body))
    return f'<svg viewBox="{box}" role="img" aria-label="{html.escape(describe)}">{body}</svg>'


def _with_own_ids(body: str) -> str:
    """Drops ids that nothing refers to, and makes the others unique on a page of many pictures."""
    prefix = f"p{zlib.crc32(body.encode('utf-8')):08x}-"
    used = {*re.findall(r'href="#([^"]+)"', body), *re.findall(r"url\(#([^)]+)\)", body)}
    body = re.sub(
        r' id="([^"]+)"',
        lambda match: f' id="{prefix}{match[1]}"' if match[1] in used else "",
        body,
    )
    return body.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"matplotlib's SVG holds no {pattern}")
    return match[1]
