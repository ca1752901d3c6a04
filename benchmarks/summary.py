"""The table of targets, reached/target per cell, from the results files: `-m benchmarks.summary`.

A cell that misses its target ends in "!", one that was not measured is "missing". Below the table:
cells slower than dense, times that rise with the sparsity, and the targets that are not ratios to a
peer at eight sparsities.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks import accuracy, bench_spectral_errors, judge_intervals, limits, results, targets
from benchmarks.results import Row
from benchmarks.targets import SPARSITIES, SpectralTarget, Target

# The ceiling has torch's batch norm as well.
UNFUSED = "ours, torch's batch norm"
OURS = ("ours, values", "ours, dense weight")
# Two neighbours on a line of falling times may differ by what one run differs from the next.
RISE = 1.05
Key = tuple[str, str, str, str, float, int]


def _key(row: Row) -> Key:
    return (row.op, row.mode, row.shape, row.dtype, row.sparsity, row.threads)


class Times:
    """Milliseconds of every backend, by case."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.by_case: dict[Key, dict[str, float]] = {}
        for row in rows:
            self.by_case.setdefault(_key(row), {})[row.backend] = row.p50

    def ratio(self, target: Target, shape: str, sparsity: float) -> float | None:
        """The best peer's time over ours, or None where one of them is missing."""
        case = self.by_case.get((target.op, target.mode, shape, target.dtype, sparsity, 1), {})
        return _best(case, target.peers, target.ours)

    def spectral_ratio(self, target: SpectralTarget) -> float | None:
        """The same of a spectral op."""
        key = (target.op, target.mode, target.shape, target.dtype, target.sparsity, 1)
        return _best(self.by_case.get(key, {}), target.peers, target.ours)


def _best(case: Mapping[str, float], peers: Sequence[str], ours: str) -> float | None:
    found = [case[name] for name in peers if name in case]
    return min(found) / case[ours] if found and ours in case else None


def table(times: Times, chosen: Sequence[Target], only_measured: bool = False) -> list[str]:
    """One line per target and shape; `only_measured` leaves out what has no measurement."""
    rows = []
    for target in chosen:
        for shape in target.shapes:
            ratios = [times.ratio(target, shape, s) for s in SPARSITIES]
            if only_measured and not any(ratios):
                continue
            absent = "" if only_measured else "missing"
            cells = [
                _cell(ratio, target.at(shape, s), absent)
                for ratio, s in zip(ratios, SPARSITIES, strict=True)
            ]
            rows.append([target.name, shape, *cells])
    head = ["reached/target", "shape", *(f"{100 * s:g} %" for s in SPARSITIES)]
    return _aligned(head, rows) if rows else []


def spectral(times: Times, only_measured: bool = False) -> list[str]:
    """One line per case of the spectral ops."""
    rows = []
    for target in targets.SPECTRAL:
        ratio = times.spectral_ratio(target)
        if ratio is not None or not only_measured:
            rows.append([target.name, target.op, target.shape, _cell(ratio, target.ratio)])
    return _aligned(["reached/target", "op", "shape", "vs best peer"], rows) if rows else []


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]


def _cell(ratio: float | None, target: float | None, absent: str = "missing") -> str:
    if ratio is None:
        return "-" if target is None else absent
    if target is None:
        return f"{ratio:.3g}"
    return f"{ratio:.3g}/{target:.3g}" + ("" if _rounded(ratio) >= target else " !")


def _rounded(ratio: float) -> float:
    """As it is printed, so that no cell reads 6/6 and is marked."""
    return float(f"{ratio:.3g}")


def slower_than_dense(times: Times) -> list[str]:
    """Cells that break "never slower than dense"."""
    found = []
    for key, case in sorted(times.by_case.items()):
        dense = case.get(targets.DENSE.get(key[0], ""))
        for name in OURS:
            if dense is None or name not in case:
                continue
            limit = dense / targets.NEVER_SLOWER
            if dense < targets.SHORT_CALL_MS:
                limit = dense + targets.SHORT_CALL_EXTRA_MS
            if case[name] > limit:
                found.append(f"{_name(key)}, {name}: {case[name]:.3g} ms, dense {dense:.3g} ms")
    return found


def rising_times(times: Times) -> list[str]:
    """Neighbouring sparsities where the sparser layer takes longer, beyond what runs differ by."""
    lines: dict[tuple[object, ...], list[tuple[float, float]]] = {}
    for (op, mode, shape, dtype, sparsity, threads), case in times.by_case.items():
        for name in OURS:
            if name in case:
                line = lines.setdefault((op, mode, shape, dtype, threads, name), [])
                line.append((sparsity, case[name]))
    found = []
    for line_key, points in sorted(lines.items(), key=str):
        for (low, before), (high, after) in pairwise(sorted(points)):
            if after > RISE * before:
                place = " ".join(map(str, line_key))
                found.append(f"{place}: {before:.3g} ms at {low:g}, {after:.3g} ms at {high:g}")
    return found


def rebuilds(times: Times) -> Iterator[str]:
    """Building the index of a new mask, reached/target."""
    for shape, most in targets.REBUILD_MS.items():
        for sparsity in SPARSITIES:
            key = "sparsity_pattern", "build", shape, "bool", sparsity, 1
            case = times.by_case.get(key, {})
            built, forward = case.get("SparsityPattern"), case.get("one forward")
            if built is None:
                continue
            limit = most if forward is None else min(most, forward)
            mark = "" if built <= limit else " !"
            gain = f", torch ops {case['torch ops']:.3g} ms" if "torch ops" in case else ""
            yield f"mask rebuild {shape} at {sparsity:g}: {built:.3g}/{limit:.3g} ms{mark}{gain}"


def other_targets(times: Times) -> Iterator[str]:
    """Mask rebuild, two threads, and the share of VGG-16's ceiling."""
    yield from rebuilds(times)
    for key, case in sorted(times.by_case.items()):
        two = times.by_case.get((*key[:5], 2), {}).get("ours, values")
        if key[5] == 1 and two is not None and "ours, values" in case:
            gain = case["ours, values"] / two
            mark = "" if _rounded(gain) >= targets.TWO_THREADS else " !"
            yield f"two threads, {_name(key)}: {gain:.3g}/{targets.TWO_THREADS:g}{mark}"
    for sparsity in SPARSITIES:
        case = times.by_case.get(
            ("train_step", "pgd10_step", targets.VGG, "float32", sparsity, 1), {}
        )
        if {UNFUSED, "dense, masked", "free convolutions"} <= set(case):
            ceiling = case["dense, masked"] / case["free convolutions"]
            gain = case["dense, masked"] / case[UNFUSED]
            share, wanted = gain / ceiling, targets.VGG_SHARE_OF_CEILING
            mark = " !" if sparsity == 0.99 and _rounded(share) < wanted else ""
            yield (
                f"vgg-16 at {sparsity:g}: {gain:.3g} of the {ceiling:.3g} that free convolutions "
                f"would give, a share of {share:.2f}/{wanted}{mark}"
            )


def _name(key: Key) -> str:
    op, mode, shape, dtype, sparsity, threads = key
    return f"{op} {mode} {shape} {dtype} at {sparsity:g}" + (f", {threads} threads" * (threads > 1))


def report(rows: Sequence[Row], only_measured: bool = False) -> list[str]:
    """The whole page, line by line."""
    times = Times(rows)
    lines = table(times, targets.TABLE, only_measured)
    shown = table(times, targets.INFORMATION, only_measured=True)
    if shown:
        lines += ["", "Without a target:", "", *shown]
    ends = spectral(times, only_measured)
    if ends:
        lines += ["", "Spectra, the best accurate peer's time over ours:", "", *ends]
    for title, found in (
        ("Slower than dense", slower_than_dense(times)),
        ("Slower although sparser", rising_times(times)),
        ("Other targets", list(other_targets(times))),
        (
            "Below the target vs dense: share of the time that the roofs explain (limits.py)",
            list(limits.below_target(rows)),
        ),
    ):
        if found or not only_measured:
            lines += ["", f"{title}:", *(f"  {line}" for line in found or ["none"])]
    return lines


def errors_of_spectra(folder: Path) -> list[str]:
    """What was measured of errors and judged of intervals, line by line."""
    found = list(accuracy.lines(bench_spectral_errors.load(folder)))
    counts = judge_intervals.load(folder)
    if counts:
        found += judge_intervals.lines(counts)
    return ["Errors of spectra, reached/target:", *(f"  {line}" for line in found), ""] * bool(
        found
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the report of every device folder, or of the one named."""
    parser = argparse.ArgumentParser(description="Print reached/target per cell.")
    parser.add_argument("folder", nargs="*", type=Path, help="results/<device>; default all")
    named = parser.parse_args(argv).folder
    folders = named or sorted(p.parent for p in results.FOLDER.glob("*/masked_linear.csv"))
    for folder in folders:
        rows = [row for path in sorted(folder.glob("*.csv")) for row in results.load(path)]
        print(f"{folder.name}\n", *report(rows), "", sep="\n")
        print(*errors_of_spectra(folder), sep="\n")


if __name__ == "__main__":
    main()
