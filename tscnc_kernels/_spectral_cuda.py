"""`extreme_singular_values` on CUDA: one launch for all small matrices, torch's own ops for others.

A matrix whose smaller side is at most 128 is one block of the kernel behind the op
`extreme_singular_values_small`; larger ones are those of `_spectral_large.py`.

From a state, passes over the matrices come first: one launch for a list of any sizes, behind the op
`extreme_singular_values_warm`, in which a matrix leaves as soon as the promised error is proven. A
second launch factors those small ones that did not; nothing tells the host which. A larger matrix
takes its σ_max from the passes, which flag it where they prove too little. Its σ_min is that of a
factor, without which nothing promises it, or with method="passes" that of the passes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tscnc_kernels._spectral import Raw, output_dtype
from tscnc_kernels._spectral_kernels import SMALL_SIDE, Settings, solve_by_kernels
from tscnc_kernels._spectral_large import host_rank, solve_large

# The axis along which the matrices lie side by side in each of the raw op's outputs.
_AXES = (1, 1, 1, 1, 1, 0, 0, 0, 0, 0)


def _masked(matrix: Tensor, mask: Tensor | None) -> Tensor:
    return matrix.double() if mask is None else torch.where(mask, matrix.double(), 0.0)


def _pieces(raw: Raw, matrices: Sequence[Tensor]) -> list[Raw]:
    """The raw results of the single matrices."""
    rows, cols = ([matrix.shape[side] for matrix in matrices] for side in (0, 1))
    small = [min(matrix.shape) for matrix in matrices]
    ones = [1] * len(matrices)
    sizes = (ones, rows, cols, small, small, ones, ones, ones, ones, ones)
    columns: list[Any] = [
        output.split(size, dim=axis) if output.shape[axis] else (output,) * len(matrices)
        for output, size, axis in zip(raw, sizes, _AXES, strict=True)
    ]
    return list(zip(*columns, strict=True))


class _Lists(NamedTuple):
    """The raw op's first arguments, as far as CUDA needs them."""

    matrices: list[Tensor]
    masks: list[Tensor]
    structures: list[Tensor]
    state: Tensor | None

    def mask(self, index: int) -> Tensor | None:
        """The mask of a matrix."""
        return self.masks[index] if self.masks and self.masks[index].numel() else None

    def structure(self, index: int) -> Tensor | None:
        """What is known of a matrix's pattern."""
        found = self.structures[index] if self.structures else None
        return None if found is None or found.numel() == 0 else found

    def some(self, chosen: Sequence[int]) -> "_Lists":
        """What belongs to some of the matrices."""
        matrices, masks, structures = (
            [part[i] for i in chosen] if part else [] for part in self[:3]
        )
        state = None
        if self.state is not None:
            starts = self.state.split([min(matrix.shape) for matrix in self.matrices], dim=1)
            state = torch.cat([starts[i] for i in chosen], dim=1)
        return _Lists(matrices, masks, structures, state)


def _is_for_kernels(lists: _Lists, index: int, settings: Settings, passes: bool) -> bool:
    """Whether one of the kernels alone solves the matrix; passes: by passes if it is large."""
    matrix, structure = lists.matrices[index], lists.structure(index)
    if min(matrix.shape) <= SMALL_SIDE:
        return True
    if lists.state is None or settings.power or settings.certify:
        return False
    # Its squares may leave the range that passes have.
    if matrix.dtype == torch.float64:
        return False
    if settings.largest_only or not passes:
        return settings.largest_only
    return structure is None or host_rank(structure) == min(matrix.shape)


def _solve_some(lists: _Lists, chosen: Sequence[int], settings: Settings) -> dict[int, Raw]:
    """The raw results of the chosen matrices, by their place in the list."""
    if not chosen:
        return {}
    some = lists.some(chosen)
    return dict(zip(chosen, _pieces(solve_by_kernels(*some, settings), some.matrices), strict=True))


def extreme_singular_values(
    matrices: list[Tensor],
    masks: list[Tensor],
    structures: list[Tensor],
    row_pointers: list[Tensor],
    columns: list[Tensor],
    state: Tensor | None,
    structural: bool,
    tie_tol: float,
    power: bool,
    certify: bool,
    largest_only: bool,
    passes: bool = False,
) -> Raw:
    """The raw op for matrices on CUDA; on the CPU, what it does with large ones is the same."""
    settings = Settings(structural, tie_tol, power, certify, largest_only)
    lists = _Lists(matrices, masks, structures, state)
    places = range(len(matrices))
    by_kernels = [i for i in places if _is_for_kernels(lists, i, settings, passes)]
    if len(by_kernels) == len(matrices):
        return _shown(solve_by_kernels(*lists, settings), matrices)
    found = _solve_some(lists, by_kernels, settings)
    others = [i for i in places if i not in found]
    largest = settings._replace(largest_only=True)
    by_passes = [i for i in others if _is_for_kernels(lists, i, largest, passes)]
    tops = _solve_some(lists, by_passes, largest)
    for i in others:
        mask, start = lists.mask(i), lists.some([i]).state
        w = _masked(matrices[i], mask)
        raw = solve_large(w, lists.structure(i), start, tops.get(i), settings)
        if mask is not None and structural:
            # Rounding leaves traces at dead rows and columns.
            raw = (raw[0], raw[1] * mask.any(dim=1), raw[2] * mask.any(dim=0), *raw[3:])
        found[i] = raw
    outputs = zip(*(found[i] for i in range(len(matrices))), strict=True)
    merged = (torch.cat(parts, dim=axis) for parts, axis in zip(outputs, _AXES, strict=True))
    return _shown(tuple(merged), matrices)  # type: ignore[arg-type]


def _shown(raw: Raw, matrices: list[Tensor]) -> Raw:
    """Sigma and the vectors in the dtype that the user gets."""
    dtype = output_dtype(matrices)
    return raw[0].to(dtype), raw[1].to(dtype), raw[2].to(dtype), *raw[3:]


if torch._C._dispatch_has_kernel_for_dispatch_key(
    "tscnc_kernels::extreme_singular_values_small", "CUDA"
):
    _library = torch.library.Library("tscnc_kernels", "IMPL")
    _library.impl("extreme_singular_values", extreme_singular_values, "CUDA")
