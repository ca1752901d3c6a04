"""The kernels behind `extreme_singular_values` on CUDA, and what stands for them on the CPU."""

from typing import NamedTuple

import torch
from torch import Tensor

from tscnc_kernels import _build as _build  # loads the library that registers the ops
from tscnc_kernels._spectral import Raw

# Largest smaller side that a block holds, kSmallSide of csrc/cuda/extreme_singular_values.h.
SMALL_SIDE = 128


class Settings(NamedTuple):
    """The raw op's last arguments."""

    structural: bool
    tie_tol: float
    power: bool
    certify: bool
    largest_only: bool


def solve_by_kernels(
    matrices: list[Tensor],
    masks: list[Tensor],
    structures: list[Tensor],
    state: Tensor | None,
    settings: Settings,
) -> Raw:
    """One raw op for all matrices: small ones, or any that passes are enough for."""
    raw: Raw
    if matrices[0].device.type == "cuda":
        ops = torch.ops.tscnc_kernels
        if state is not None and not (settings.power or settings.certify):
            kept = settings.structural, settings.tie_tol, settings.largest_only
            raw = ops.extreme_singular_values_warm(matrices, masks, structures, state, *kept)
        else:
            small = ops.extreme_singular_values_small
            raw = small(matrices, masks, structures, state, *settings)
    else:
        everywhere = torch.ops.tscnc_kernels.extreme_singular_values
        raw = everywhere(matrices, masks, structures, [], [], state, *settings)
    return raw
