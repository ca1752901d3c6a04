"""The singular values of a network's prunable weights, and what their masks leave possible.

κ of a pruned matrix has two meanings. "Full" is the matrix as it is: κ is infinite when a row or
column is dead. "Structural" leaves dead rows and columns out and takes the last singular value that
the mask allows to differ from 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tscnc.layers import dense_weight, pattern_of, prunable_layers
from tscnc_kernels import SparsityPattern, extreme_singular_values

_HEADS = (
    "layer",
    "shape",
    "density",
    "dead rows",
    "dead columns",
    "structural rank",
    "σ max",
    "σ min, full",
    "σ min, structural",
    "κ full",
    "κ structural",
)


@dataclass(frozen=True)
class LayerSpectrum:
    """The extreme singular values of one layer's weight, seen as a matrix, and of its mask.

    Attributes:
        shape: shape of the weight; a convolution's matrix is (shape[0], product of the rest).
        density: share of the entries that are kept.
        dead_rows: rows of the matrix without a kept entry.
        dead_columns: columns without one.
        structural_rank: the largest rank that a matrix with this mask can have.
        sigma_max: the largest singular value.
        sigma_min_full: the smallest of the matrix as it is.
        sigma_min_structural: the one at `structural_rank`, without dead rows and columns.
    """

    shape: tuple[int, ...]
    density: float
    dead_rows: int
    dead_columns: int
    structural_rank: int
    sigma_max: float
    sigma_min_full: float
    sigma_min_structural: float

    @property
    def kappa_full(self) -> float:
        """Condition number of the matrix as it is; infinite where a singular value is 0."""
        return _ratio(self.sigma_max, self.sigma_min_full)

    @property
    def kappa_structural(self) -> float:
        """Condition number of what the mask leaves; infinite where it is rank deficient still."""
        return _ratio(self.sigma_max, self.sigma_min_structural)


def singular_values(model: nn.Module) -> dict[str, Tensor]:
    """Computes all singular values of every prunable weight.

    Args:
        model: a network with dense or masked layers.

    Returns:
        By parameter name a float64 tensor of min(rows, columns) values, descending.

    Raises:
        ValueError: a weight holds NaN or infinity.
    """
    return {name: torch.linalg.svdvals(_tall(matrix)) for name, matrix in _matrices(model).items()}


def layer_spectra(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, LayerSpectrum]:
    """Computes the extreme singular values of every prunable weight.

    Args:
        model: a network with dense or masked layers.
        masks: bool masks by parameter name; a weight that is not named has its layer's own mask,
            or none.

    Returns:
        What each layer's spectrum spans, by parameter name, in the model's order.

    Raises:
        ValueError: a mask of another shape than its weight, or a weight with NaN or infinity.
        TypeError: a mask that is not bool.
    """
    matrices = _matrices(model)
    if not matrices:
        return {}
    layers = prunable_layers(model)
    patterns = {name: _pattern(layers[name], masks.get(name)) for name in matrices}
    stacked, kept = list(matrices.values()), list(patterns.values())
    full = extreme_singular_values(stacked, kept, rank="full")
    structural = extreme_singular_values(stacked, kept, rank="structural")
    spectra = {}
    for index, (name, pattern) in enumerate(patterns.items()):
        shape = pattern.shape if pattern else tuple(dense_weight(layers[name]).shape)
        spectra[name] = LayerSpectrum(
            shape=tuple(shape),
            density=pattern.density if pattern else 1.0,
            dead_rows=_zeros(pattern.row_pointers) if pattern else 0,
            dead_columns=_zeros(pattern.column_pointers) if pattern else 0,
            structural_rank=int(structural.rank[index]),
            sigma_max=float(full.sigma_max[index]),
            sigma_min_full=float(full.sigma_min[index]),
            sigma_min_structural=float(structural.sigma_min[index]),
        )
    return spectra


def table(model: nn.Module, masks: Mapping[str, Tensor]) -> str:
    """Returns a plain-text table with a line on the spectrum of every prunable layer.

    Args:
        model: a network with dense or masked layers.
        masks: bool masks by parameter name, as in `layer_spectra`.
    """
    rows = [_HEADS, *(_row(name, each) for name, each in layer_spectra(model, masks).items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADS))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _row(name: str, layer: LayerSpectrum) -> tuple[str, ...]:
    return (
        name,
        " x ".join(map(str, layer.shape)),
        f"{100 * layer.density:.4g} %",
        str(layer.dead_rows),
        str(layer.dead_columns),
        str(layer.structural_rank),
        f"{layer.sigma_max:.4g}",
        f"{layer.sigma_min_full:.4g}",
        f"{layer.sigma_min_structural:.4g}",
        _condition(layer.kappa_full),
        _condition(layer.kappa_structural),
    )


def _condition(kappa: float) -> str:
    return f"{kappa:.4g}" if math.isfinite(kappa) else "∞"


def _ratio(largest: float, smallest: float) -> float:
    return largest / smallest if smallest > 0 else math.inf


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    """Returns the prunable weights as float64 matrices without gradient."""
    matrices = {}
    for name, layer in prunable_layers(model).items():
        matrices[name] = dense_weight(layer).detach().flatten(1).double()
        if not matrices[name].isfinite().all():
            raise ValueError(f"the weight {name!r} holds NaN or infinity: it has no spectrum")
    return matrices


def _tall(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


def _pattern(layer: nn.Module, mask: Tensor | None) -> SparsityPattern | None:
    own = pattern_of(layer)
    return own if own is not None or mask is None else SparsityPattern.from_mask(mask)


def _zeros(pointers: Tensor) -> int:
    """Counts the rows or columns whose entries begin where they end."""
    return int((pointers.diff() == 0).sum())
