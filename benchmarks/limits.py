"""Where a cell below its target stands under the roofs of the machine (`roofline.csv`).

Bounds on a sparse layer's step, in shares of the time it took:

    products    2 flops per multiply-add of a kept weight, at the rate at which one core feeds them
                from its first-level cache, and from the second, where the inputs of layers lie
                whose weights are too few to be cut into blocks
    layout      every activation and its gradient moved once, at the rate of the outer cache: x and
                y forward; dy, x and dx backward
    weights     every kept weight and its 32-bit column read once per product, from memory, which
                bounds a batch of one

What none explains is packing, reductions and calling.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence

from benchmarks.results import Row
from benchmarks.targets import DENSE, SPARSITIES, TABLE, Target

FLOPS_PER_FLOAT = 2  # of the roofs, which read one float for each multiply-add
NEAR, FAR, MOVED_BY, READ_FROM = "L1", "L2", "L3", "DRAM"


def activations(op: str, shape: str, mode: str) -> float:
    """Elements that a call moves at least, read off its shape's name, or NaN."""
    linear = re.fullmatch(r"(\d+)x(\d+)x(\d+)", shape)
    convolution = re.fullmatch(r"(\d+)x(\d+)c(\d+)-\S+", shape)
    if op == "masked_linear" and linear:
        batch, inputs, outputs = map(int, linear.groups())
        given, result = batch * inputs, batch * outputs
    elif op == "masked_conv2d" and convolution:
        images, channels, side = map(int, convolution.groups())
        given = result = images * channels * side * side
    else:
        return math.nan
    return given + result + (2 * given + result if mode == "forward_backward" else 0)


def below_target(rows: Sequence[Row], table: Sequence[Target] = TABLE) -> Iterator[str]:
    """A line for each cell that missed its target against dense, from the rows of a folder."""
    roofs = {row.shape: row.rate for row in rows if row.op == "roofline"}
    if not {NEAR, FAR, MOVED_BY, READ_FROM} <= set(roofs):
        return
    times = {
        (row.op, row.mode, row.shape, row.dtype, row.sparsity, row.backend): row
        for row in rows
        if row.threads == 1
    }
    chosen = [t for t in table if t.op in DENSE and t.peers == (DENSE[t.op],)]
    for target, sparsity in itertools.product(chosen, SPARSITIES):
        for shape in target.shapes:
            key = target.op, target.mode, shape, target.dtype, sparsity
            own, dense = times.get((*key, target.ours)), times.get((*key, target.peers[0]))
            wanted = target.at(shape, sparsity)
            if own is None or dense is None or wanted is None:
                continue
            if float(f"{dense.p50 / own.p50:.3g}") < wanted:
                yield _line(target, shape, own, roofs)


def _line(target: Target, shape: str, own: Row, roofs: dict[str, float]) -> str:
    def share(floats: float, level: str) -> str:
        seconds = FLOPS_PER_FLOAT * floats / (roofs[level] * 1e9)
        return f"{1e3 * seconds / own.p50:.0%}"

    line = (
        f"{target.name} {shape} at {own.sparsity:g}: {own.p50:.3g} ms, products "
        f"{own.rate / roofs[NEAR]:.0%} ({NEAR}) to {own.rate / roofs[FAR]:.0%} ({FAR}), layout "
        f"{share(activations(target.op, shape, target.mode), MOVED_BY)}"
    )
    if shape.startswith("1x"):
        # Two flops, a value and a column for each.
        line += f", weights {share(own.rate * 1e6 * own.p50, READ_FROM)}"
    return line
