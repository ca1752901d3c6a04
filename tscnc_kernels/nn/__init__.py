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
from tscnc_kernels.nn.spectral_report import LayerSpectrum, SpectralReport, spectral_report

__all__ = [
    "LayerReport",
    "LayerSpectrum",
    "MaskedLinear",
    "SparsifyReport",
    "SpectralReport",
    "densify",
    "explain",
    "sparsify",
    "spectral_report",
    "update_masks",
    "utils",
]
