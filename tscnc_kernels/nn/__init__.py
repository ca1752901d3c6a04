"""Modules on the ops, and the calls that swap a user's own model over."""

from tscnc_kernels.nn import utils
from tscnc_kernels.nn._fuse import FusedActivation
from tscnc_kernels.nn.batch_norm_relu import (
    BatchNormReLU,
    fuse_batch_norm_relu,
    split_batch_norm_relu,
)
from tscnc_kernels.nn.explain import explain
from tscnc_kernels.nn.masked_conv2d import MaskedConv2d
from tscnc_kernels.nn.masked_linear import MaskedLinear
from tscnc_kernels.nn.sparsify import (
    LayerReport,
    SparsifyReport,
    densify,
    sparsify,
    update_masks,
)
from tscnc_kernels.nn.spectral_report import LayerSpectrum, SpectralReport, spectral_report

__all__ = [
    "BatchNormReLU",
    "FusedActivation",
    "LayerReport",
    "LayerSpectrum",
    "MaskedConv2d",
    "MaskedLinear",
    "SparsifyReport",
    "SpectralReport",
    "densify",
    "explain",
    "fuse_batch_norm_relu",
    "sparsify",
    "spectral_report",
    "split_batch_norm_relu",
    "update_masks",
    "utils",
]
