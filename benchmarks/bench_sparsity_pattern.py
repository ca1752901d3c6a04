"""Benchmark of building a `SparsityPattern`, the index of a new mask both ways, and updating one.

Bytes counted: one per entry of the boolean mask. The peer is what one writes with torch: nonzero
for the rows and columns, bincount and cumsum for the pointers, a stable argsort for the order of
the transposed index. "update" swaps one in a hundred kept entries of each row for others, and
carries the values and two moments of an optimizer over; the peer searches the old places. Beside
"build" stands one forward of 128 samples at that sparsity, which it should not exceed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import harness, summary
from benchmarks.harness import Call, Case, Provider, Timed, UnavailableError
from tscnc_kernels import SparsityPattern, masked_linear
from tscnc_kernels.sparsity import remap

SHAPES = [(2048, 2048), (4096, 4096)]
SPARSITIES = [0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999]


def _inputs(
    shape: tuple[int, int], sparsity: float, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """A mask, and one in which some kept entries of each row have moved."""
    noise = torch.rand(shape, generator=generator)
    mask = noise >= sparsity
    swaps = max(1, round(shape[1] * (1 - sparsity) / 100))
    # The largest numbers are kept: the least of them go, and the largest of the pruned ones come.
    gone = noise.masked_fill(~mask, 2).topk(swaps, 1, largest=False).indices
    grown = noise.masked_fill(mask, -1).topk(swaps, 1).indices
    changed = mask.scatter(1, gone, False).scatter(1, grown, True)
    return mask.to(device), changed.to(device)


def _torch_index(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = mask.nonzero(as_tuple=True)
    row_pointers = torch.bincount(rows, minlength=mask.shape[0]).cumsum(0)
    column_pointers = torch.bincount(columns, minlength=mask.shape[1]).cumsum(0)
    permutation = columns.argsort(stable=True)
    return row_pointers, columns, column_pointers, permutation


def _torch_update(mask: Tensor, changed: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    old, new = (m.flatten().nonzero()[:, 0] for m in (mask, changed))
    places = torch.searchsorted(old, new).clamp_max(len(old) - 1)
    kept = old[places] == new
    return [*_torch_index(changed)[:3], *(t[places].where(kept, 0) for t in tensors)]


def _expected(mode: str, mask: Tensor, changed: Tensor) -> list[Tensor]:
    if mode == "build":
        return [tensor.double() for tensor in _torch_index(mask)[:3]]
    weights = (torch.zeros(mask.shape).masked_scatter(mask, t) for t in _values(mask))
    index = [tensor.double() for tensor in _torch_index(changed)[:3]]
    return [*index, *(weight[changed].double() for weight in weights)]


def _values(mask: Tensor) -> list[Tensor]:
    """The kept weights and the two moments of an optimizer."""
    places = torch.arange(1.0, int(mask.sum()) + 1)
    return [places, places.neg(), places / 2]


def _parts(pattern: SparsityPattern) -> list[Tensor]:
    index = pattern.row_pointers[1:], pattern.columns, pattern.column_pointers[1:]
    return [tensor.long() for tensor in index]


def _native(case: Case, mask: Tensor, changed: Tensor) -> Timed:
    if case.mode == "build":
        return Timed(lambda: SparsityPattern.from_mask(mask), _parts)
    pattern, tensors = SparsityPattern.from_mask(mask), _values(mask)

    def update() -> tuple[SparsityPattern, list[Tensor]]:
        new, mapping = pattern.update(changed)
        return new, [remap(tensor, mapping) for tensor in tensors]

    return Timed(update, lambda found: [*_parts(found[0]), *found[1]])


def _torch(case: Case, mask: Tensor, changed: Tensor) -> Call:
    if case.mode == "build":
        return lambda: _torch_index(mask)[:3]
    tensors = _values(mask)
    return lambda: _torch_update(mask, changed, tensors)


def _forward(case: Case, mask: Tensor, changed: Tensor) -> Call:
    if case.mode != "build":
        raise UnavailableError("shown beside a build")
    pattern = SparsityPattern.from_mask(mask)
    input, values = torch.randn(128, mask.shape[1]), torch.randn(pattern.nnz)
    masked_linear(input, values, pattern)
    return lambda: masked_linear(input, values, pattern)


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
    Provider("one forward", _forward, gated=False),
]


def essential(case: Case, provider: Provider) -> bool:
    """The builds have targets."""
    return case.mode == "build"


def run(argv: Sequence[str] | None = None) -> list[harness.results.Row]:
    """Measure and print; see `--help`. Ends with reached/target of the builds."""
    rows = harness.main(CASES, PROVIDERS, QUICK, argv, essential)
    for line in summary.rebuilds(summary.Times(rows)):
        print(line)
    return rows


if __name__ == "__main__":
    run()
