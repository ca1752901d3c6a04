"""Benchmark of building a `SparsityPattern`: the index of a new mask, both ways.

Bytes counted: one per entry of the boolean mask. The peer is what one writes with torch: nonzero
for the rows and columns, bincount and cumsum for the pointers, a stable argsort for the order of
the transposed index.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Call, Case, Provider, Timed
from tscnc_kernels import SparsityPattern

SHAPES = [(2048, 2048), (4096, 4096)]
SPARSITIES = [0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999]


def _inputs(
    shape: tuple[int, int], sparsity: float, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A mask, and one in which some of the kept entries of the first rows have moved."""
    mask = torch.rand(shape, generator=generator) >= sparsity
    changed = mask.clone()
    rows = shape[0] // 100
    changed[:rows] = mask[:rows].flip(1)
    return mask.to(device), changed.to(device)


def _torch_index(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = mask.nonzero(as_tuple=True)
    row_pointers = torch.bincount(rows, minlength=mask.shape[0]).cumsum(0)
    column_pointers = torch.bincount(columns, minlength=mask.shape[1]).cumsum(0)
    permutation = columns.argsort(stable=True)
    return row_pointers, columns, column_pointers, permutation


def _expected(mode: str, mask: Tensor, changed: Tensor) -> list[Tensor]:
    wanted = mask if mode == "build" else changed
    row_pointers, columns, column_pointers, _ = _torch_index(wanted)
    return [row_pointers.double(), columns.double(), column_pointers.double()]


def _parts(pattern: SparsityPattern) -> list[Tensor]:
    index = pattern.row_pointers[1:], pattern.columns, pattern.column_pointers[1:]
    return [tensor.long() for tensor in index]


def _native(case: Case, mask: Tensor, changed: Tensor) -> Timed:
    if case.mode == "build":
        return Timed(lambda: SparsityPattern.from_mask(mask), _parts)
    pattern = SparsityPattern.from_mask(mask)
    return Timed(lambda: pattern.update(changed), lambda found: _parts(found[0]))


def _torch(case: Case, mask: Tensor, changed: Tensor) -> Call:
    wanted = mask if case.mode == "build" else changed
    return lambda: _torch_index(wanted)[:3]


def _case(shape: tuple[int, int], sparsity: float, mode: str) -> Case:
    return Case(
        op="sparsity_pattern",
        mode=mode,
        shape=f"{shape[0]}x{shape[1]}",
        dtype=torch.bool,
        inputs=partial(_inputs, shape, sparsity),
        expected=partial(_expected, mode),
        work=shape[0] * shape[1],
        unit="GB/s",
        sparsity=sparsity,
        tolerance=1e-12,
    )


CASES = [
    _case(shape, s, mode) for mode in ("build", "update") for shape in SHAPES for s in SPARSITIES
]
QUICK = [_case(SHAPES[0], s, "build") for s in (0.9, 0.99)]
PROVIDERS = [
    Provider("SparsityPattern", _native),
    Provider("torch ops", _torch),
]


def essential(case: Case, provider: Provider) -> bool:
    """The build of the smaller mask has a target."""
    return case.mode == "build" and case.shape == "2048x2048"


def run(argv: Sequence[str] | None = None) -> list[harness.results.Row]:
    """Measure and print; see `--help`."""
    return harness.main(CASES, PROVIDERS, QUICK, argv, essential)


if __name__ == "__main__":
    run()
