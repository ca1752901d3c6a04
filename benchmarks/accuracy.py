"""What the errors of `bench_spectral_errors` say about the promises, and their figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import results, targets
from benchmarks.bench_spectral_errors import FILE, Row

OURS = "ours, "
# Errors below it are drawn at it.
_LEAST_ERROR = 1e-10


def _power(row: Row) -> float:
    """The power of ten that κ is closest to."""
    return round(math.log10(row.kappa)) if row.kappa < math.inf else math.inf


def _line(what: str, found: Sequence[float], most: float) -> Iterator[str]:
    reached = max((value for value in found if not math.isnan(value)), default=None)
    if reached is not None:
        yield f"{what}: {reached:.2g}/{most:g}" + " !" * (reached > most)


def _up_to(
    what: str, rows: Sequence[Row], value: Callable[[Row], float], limits: Mapping[int, float]
) -> Iterator[str]:
    """A line per limit, of the rows that no smaller power of ten is for."""
    below = -1
    for power, most in limits.items():
        found = [value(row) for row in rows if below < _power(row) <= power]
        yield from _line(f"{what} up to kappa = 1e{power}", found, most)
        below = power


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Reached/target; nothing of what was not measured."""
    ours = [row for row in rows if row.method in (*targets.SIGMA_MAX_ERROR, "ours, certified")]
    for method, most in targets.SIGMA_MAX_ERROR.items():
        errors = [row.sigma_max_error for row in ours if row.method == method]
        yield from _line(f"error of sigma_max, {method}", errors, most)
    yield from _up_to(
        "error of sigma_min", ours, lambda row: row.sigma_min_error, targets.SIGMA_MIN_ERROR
    )
    singular = [row.kappa_error for row in ours if row.kappa == math.inf]
    yield from _line("error of kappa among singular matrices", singular, targets.SINGULAR_ERROR)
    moderate = [row for row in ours if _power(row) <= targets.CAPPED_POWER]
    if moderate:
        share = sum(row.capped for row in moderate) / sum(row.matrices for row in moderate)
        name = f"share flagged CAP_REACHED up to kappa = 1e{targets.CAPPED_POWER}"
        yield from _line(name, [share], targets.CAPPED_SHARE)
    certified = [row for row in ours if row.method == "ours, certified"]
    yield from _up_to(
        "width of kappa's interval", certified, lambda row: row.kappa_width, targets.INTERVAL_WIDTH
    )


def figure(path: Path) -> list[Path]:
    """Error of κ against time, a panel per shape, a mark per method and spectrum."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "tscnc"
    from matplotlib import pyplot

    rows = results.read_table(path, Row)
    shapes = sorted({row.shape for row in rows})
    measures: tuple[tuple[str, Callable[[Row], float]], ...] = (
        ("σ_max", lambda row: row.sigma_max_error),
        ("κ", lambda row: row.kappa_error),
    )
    drawn, axes = pyplot.subplots(
        len(shapes), 2, figsize=(11, 3.4 * len(shapes)), squeeze=False, layout="constrained"
    )
    methods = sorted({row.method for row in rows}, key=lambda name: (OURS not in name, name))
    colours = dict(zip(methods, pyplot.get_cmap("tab20").colors, strict=False))
    for line, shape in zip(axes, shapes, strict=True):
        for axis, (what, error) in zip(line, measures, strict=True):
            for method in methods:
                points = [r for r in rows if (r.method, r.shape) == (method, shape)]
                points = [row for row in points if math.isfinite(error(row))]
                errors = [max(error(row), _LEAST_ERROR) for row in points]
                mark = "o" if OURS in method else "x"
                times = [row.ms for row in points]
                axis.scatter(times, errors, 22, [colours[method]], marker=mark, label=method)
            axis.set(xscale="log", yscale="log", xlabel="ms per call", ylabel=f"error of {what}")
            axis.set_title(f"{shape}: {what}", loc="left", fontsize=10)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    named = axes[0, 0].get_legend_handles_labels()
    drawn.legend(*named, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    drawn.suptitle(f"Time and error on {rows[0].device}", x=0.01, ha="left")
    target = path.with_suffix(".svg")
    drawn.savefig(target, metadata={"Date": None}, facecolor="white")
    pyplot.close(drawn)
    return [target]


def plot_file(path: Path) -> list[Path]:
    """The figure of the errors; other files of accuracy have none."""
    return figure(path) if path.name == FILE else []
