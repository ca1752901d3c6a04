"""The singular values of a network's prunable weights, and what their masks leave possible.

All of it is `tscnc_kernels.spectral_report`, by parameter name.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from tscnc_kernels import spectral_report
from tscnc_kernels.nn import LayerSpectrum


def singular_values(model: nn.Module) -> dict[str, Tensor]:
    """Computes all singular values of every prunable weight.

    Args:
        model: a network with dense or masked layers.

    Returns:
        By parameter name a float64 tensor of min(rows, columns) values, descending.

    Raises:
        ValueError: a weight holds NaN or infinity.
    """
    return {name: layer.singular_values for name, layer in layer_spectra(model, {}).items()}


def layer_spectra(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, LayerSpectrum]:
    """Measures the spectrum of every prunable weight.

    Args:
        model: a network with dense or masked layers.
        masks: bool masks by parameter name; a weight that is not named has its layer's own mask,
            or none.

    Returns:
        What each layer's spectrum spans, by parameter name, in the model's order.

    Raises:
        ValueError: an unknown name, a mask of another shape than its weight, or a weight with NaN
            or infinity.
        TypeError: a mask that is not bool.
    """
    return {layer.name: layer for layer in spectral_report(model, masks).layers}


def table(model: nn.Module, masks: Mapping[str, Tensor]) -> str:
    """Returns a plain-text table with a line on the spectrum of every prunable layer.

    Args:
        model: a network with dense or masked layers.
        masks: bool masks by parameter name, as in `layer_spectra`.
    """
    return str(spectral_report(model, masks))
