"""What is to be reached on a GPU, and what the results files of one say: reached/target per cell.

Targets are of an H200, from rooflines, until a measurement confirms or corrects them. A cell that
misses its target ends in "!"; one that was not measured is "missing".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import results
from benchmarks.results import Row

OURS = "ours, values", "ours, dense weight"
SPARSITIES = 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999
SQUARE, FEW = "4096x4096x4096", ("8x4096x11008", "8x4096x11008-cold")
BF16, FP32 = "bfloat16", "float32"
BOTH = "forward_backward"


@dataclass(frozen=True)
class GpuTarget:
    """A peer's time over ours, of masked_linear.

    Attributes:
        name: first column of the table.
        shape: of the results.
        dtype: likewise.
        mode: likewise.
        peer: the backend that is compared.
        wanted: the target by sparsity.
        ours: the backends of which the fastest counts.
    """

    name: str
    shape: str
    dtype: str
    mode: str
    peer: str
    wanted: Mapping[float, float]
    ours: Sequence[str] = OURS


def _at_most_95(target: float) -> dict[float, float]:
    return dict.fromkeys((0.9, 0.95), target)


def _targets() -> list[GpuTarget]:
    half = {**_at_most_95(0.98), 0.98: 1.2, 0.99: 2.2, 0.995: 4.0, 0.999: 7.0}
    strict = {0.8: 1.2, 0.9: 2.3, 0.95: 4.5, 0.98: 11, 0.99: 20, 0.995: 35, 0.999: 50}
    few = {0.5: 1.3, 0.8: 2.2, 0.9: 3.0, 0.98: 4.0, 0.99: 5.0}
    blocks = {64: {0.8: 1.6, 0.9: 3.2, 0.95: 5.5}, 128: {0.8: 3.0, 0.9: 5.5, 0.95: 7.0}}
    above = dict.fromkeys((0.9, 0.95, 0.98, 0.99, 0.995, 0.999), 3.0)
    found = [
        GpuTarget("dense", SQUARE, BF16, BOTH, "F.linear", half),
        GpuTarget("W * mask", SQUARE, BF16, BOTH, "F.linear(W * mask)", _at_most_95(1.1)),
        GpuTarget("dense", SQUARE, FP32, BOTH, "F.linear", strict),
        *(GpuTarget("dense", shape, BF16, "forward", "F.linear", few) for shape in FEW),
        *(
            GpuTarget("cuSPARSE", SQUARE, dtype, "forward", "cuSPARSE CSR", above, ("ours, panel",))
            for dtype in (BF16, FP32)
        ),
    ]
    for edge, wanted in blocks.items():
        case = f"{SQUARE}-b{edge}", BF16, "forward"
        found.append(GpuTarget("dense", *case, "F.linear", wanted))
        found.append(GpuTarget("torch BSR", *case, "torch BSR", dict.fromkeys(wanted, 1.3)))
    return found


TARGETS = _targets()


def reached(target: GpuTarget, sparsity: float, rows: Sequence[Row]) -> float | None:
    """The ratio, or None where one of the two was not measured."""
    case = {
        row.backend: row.p50
        for row in rows
        if (row.shape, row.dtype, row.mode) == (target.shape, target.dtype, target.mode)
        and abs(row.sparsity - sparsity) < 1e-9
    }
    ours = [case[name] for name in target.ours if name in case]
    return case[target.peer] / min(ours) if ours and target.peer in case else None


def _cell(ratio: float | None, wanted: float | None) -> str:
    if wanted is None:
        return ""
    if ratio is None:
        return f"missing/{wanted:g}"
    return f"{ratio:.2f}/{wanted:g}" + ("" if ratio >= wanted else "!")


def table(folder: Path) -> list[str]:
    """The lines of a Markdown table of the results files in a folder."""
    rows = results.load(folder / "masked_linear.csv")
    head = ["masked_linear vs", "shape", "dtype", "mode", *(f"{100 * s:g} %" for s in SPARSITIES)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for target in TARGETS:
        cells = [_cell(reached(target, s, rows), target.wanted.get(s)) for s in SPARSITIES]
        names = [target.name, target.shape, target.dtype, target.mode]
        lines.append("| " + " | ".join([*names, *cells]) + " |")
    return lines
