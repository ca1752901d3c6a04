"""Spectral tools for modules and parameters, named as those of torch.nn.utils."""

from tscnc_kernels.nn.utils import parametrizations
from tscnc_kernels.nn.utils.clamp_condition_number import clamp_condition_number_

__all__ = ["clamp_condition_number_", "parametrizations"]
