"""Modules on the ops, and the calls that swap a user's own model over."""

from tscnc_kernels.nn import utils
from tscnc_kernels.nn.masked_linear import MaskedLinear
from tscnc_kernels.nn.sparsify import (
    LayerReport,
    SparsifyReport,
    densify,
    explain,
    sparsify,
    update_masks,
)

__all__ = [
    "LayerReport",
    "MaskedLinear",
    "SparsifyReport",
    "densify",
    "explain",
    "sparsify",
    "update_masks",
    "utils",
]
