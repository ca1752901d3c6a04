"""What the weights of a network span: singular values, condition numbers and effective ranks.

κ of a pruned matrix has two meanings. "Full" is the matrix as it is: κ is infinite when a row or
column is dead. "Structural" leaves dead rows and columns out and takes the last singular value that
the mask allows to differ from 0.

Formulas, with σ the singular values, w the weights, and p = x / ‖x‖₁ for x = σ or |w|:

    stable rank       ‖W‖_F² / σ_1²
    N_1(x) = exp(−Σ p log p),   N_2(x) = ‖x‖₁² / ‖x‖₂²,   N_∞(x) = ‖x‖₁ / max x
    effective rank    N_q(σ),     effective sparsity    N_q(|w|),   Rényi orders q = 1, 2, ∞

Source: Roy, Vetterli 2007 (N_1 of σ); Langenberg et al., arXiv 1901.10371 (effective rank and
sparsity, whose exact definition there we could not see: the Rényi family is our reading).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from tscnc_kernels._spectral import index_of
from tscnc_kernels.nn._names import MASKABLE, check_module, resolve
from tscnc_kernels.nn.masked_conv2d import MaskedConv2d
from tscnc_kernels.nn.masked_layer import MaskedLayer
from tscnc_kernels.ops.conv_singular_values import conv_singular_values
from tscnc_kernels.sparsity import SparsityPattern

Operator = Literal["matrix", "circular", "zeros"]

_CONVOLUTIONS = (nn.Conv2d, MaskedConv2d)
_UNIT = 2.0**-53
_ABSENT = "-"
_HEADS = (
    "layer",
    "operator",
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
    "stable rank",
    "effective rank 1, 2, inf",
    "effective sparsity 1, 2, inf",
)


class RenyiNumbers(NamedTuple):
    """Effective numbers of entries, for the Rényi orders 1, 2 and ∞; 0 where all are 0."""

    one: float
    two: float
    infinity: float


@dataclass(frozen=True)
class LayerSpectrum:
    """The singular values of one layer's weight, seen as a matrix or as a convolution.

    Attributes:
        name: parameter name.
        operator: what the singular values are those of: "matrix", the weight as (shape[0], rest);
            "circular" or "zeros", the convolution with that padding.
        shape: shape of the weight.
        density: share of the entries that are kept.
        dead_rows: rows of the matrix without a kept entry.
        dead_columns: columns without one.
        structural_rank: the largest rank that a matrix with this mask can have.
        sigma_max: the largest singular value; for "zeros" possibly an upper bound.
        sigma_min_full: the smallest of the operator as it is; NaN where it is not known.
        sigma_min_structural: of a matrix, the one at `structural_rank`; NaN for a convolution.
        stable_rank: ‖W‖_F² / σ_max² of the matrix; NaN for a convolution.
        effective_rank: Rényi numbers of the singular values; None for a convolution.
        effective_sparsity: Rényi numbers of the magnitudes of the weights.
        singular_values: (min(rows, columns),) float64, all of the matrix, descending; empty for a
            convolution.
    """

    name: str
    operator: Operator
    shape: tuple[int, ...]
    density: float
    dead_rows: int
    dead_columns: int
    structural_rank: int
    sigma_max: float
    sigma_min_full: float
    sigma_min_structural: float
    stable_rank: float
    effective_rank: RenyiNumbers | None
    effective_sparsity: RenyiNumbers
    singular_values: Tensor = field(repr=False, compare=False)

    @property
    def kappa_full(self) -> float:
        """Condition number of the operator as it is; infinite where a singular value is 0."""
        return _ratio(self.sigma_max, self.sigma_min_full)

    @property
    def kappa_structural(self) -> float:
        """Condition number of what the mask leaves; infinite where it is rank deficient still."""
        return _ratio(self.sigma_max, self.sigma_min_structural)


@dataclass(frozen=True)
class SpectralReport:
    """One entry per layer and operator; `print(report)` shows them as a table."""

    layers: tuple[LayerSpectrum, ...]

    def __str__(self) -> str:
        rows = [_HEADS, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADS))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        return "\n".join(lines)


def spectral_report(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    *,
    operator: Operator = "matrix",
    example_input: Tensor | None = None,
) -> SpectralReport:
    """Measure the spectrum of every Linear and Conv2d weight of a model, masked or not.

    Exact, by float64 singular value decompositions: seconds for a layer of 2048 × 2048. For the
    ends alone, at every step, there is `extreme_singular_values`.

    Args:
        model: any module.
        masks: bool masks by parameter or module name, as for `sparsify`: what is measured is W∘M. A
            layer that is not named has the mask of torch.nn.utils.prune, if any; a masked layer
            has its own always.
        operator: "matrix" for the weights as matrices alone. "circular" or "zeros" adds a line on
            the operator of every Conv2d on images of the size that it sees, taken as if it padded
            so; see `conv_singular_values`.
        example_input: input of the model for the latter, from which the layers' image sizes are
            taken; the model runs on it once, in evaluation mode and without gradient.

    Returns:
        A report with an entry per layer, in the model's order. A layer that is used several times
        comes once.

    Raises:
        ValueError: an unknown name, a mask of another shape, a weight with NaN or infinity or
            without data, an unknown operator, convolutions to measure without an example_input, or
            what `conv_singular_values` raises for such a layer, which is named.
        TypeError: not a module, or a mask that is not bool.
    """
    check_module(model)
    if operator not in get_args(Operator):
        raise ValueError(f"expected operator to be one of {get_args(Operator)}, got {operator!r}")
    named = {} if masks is None else resolve(model, masks)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, MASKABLE)]
    sizes: dict[nn.Module, tuple[int, int]] = {}
    if operator != "matrix" and any(isinstance(layer, _CONVOLUTIONS) for _, layer in layers):
        if example_input is None:
            raise ValueError(f"expected an example_input for operator {operator!r}, got None")
        sizes = _image_sizes(model, example_input)
    spectra = []
    for name, layer in layers:
        weight, pattern = _weight(name, layer, named.get(name))
        matrix = _of_matrix(f"{name}.weight" if name else "weight", weight, pattern)
        spectra.append(matrix)
        if isinstance(layer, _CONVOLUTIONS) and layer in sizes:
            spectra.append(_of_convolution(matrix, layer, weight, sizes[layer], operator))
    return SpectralReport(tuple(spectra))


def singular_values(weight: Tensor) -> Tensor:
    """(min(rows, cols),) float64 singular values of a weight as a matrix, descending."""
    matrix = weight.detach().flatten(1).double()
    # LAPACK takes several times as long for a wide matrix.
    return torch.linalg.svdvals(matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT)


def renyi_numbers(values: Tensor) -> RenyiNumbers:
    """Effective numbers N_1, N_2 and N_∞ of the entries of a non-negative tensor."""
    total = float(values.sum())
    if total == 0:
        return RenyiNumbers(0.0, 0.0, 0.0)
    shares = values.flatten().double() / total
    entropy = float(torch.special.entr(shares).sum())
    return RenyiNumbers(
        math.exp(entropy), 1 / float(shares.square().sum()), 1 / float(shares.max())
    )


@torch.no_grad()
def _weight(
    name: str, layer: nn.Module, mask: Tensor | None
) -> tuple[Tensor, SparsityPattern | None]:
    """A layer's dense weight without what its mask prunes, and the mask's pattern."""
    label = f"{name}.weight" if name else "weight"
    weight = layer.dense_weight if isinstance(layer, MaskedLayer) else layer.weight
    assert isinstance(weight, Tensor)
    if nn.parameter.is_lazy(weight) or weight.is_meta:
        raise ValueError(f"expected the weight {label!r} to have data, got a lazy or meta one")
    pattern = layer.pattern if isinstance(layer, MaskedLayer) else None
    own = layer._buffers.get("weight_mask")
    if mask is None and own is not None:
        mask = own != 0
    if mask is not None and pattern is None:
        pattern = SparsityPattern.from_mask(mask)
        if pattern.matrix_shape != (weight.shape[0], math.prod(weight.shape[1:])):
            raise ValueError(
                f"expected a mask of shape {tuple(weight.shape)} for {label!r}, got {pattern.shape}"
            )
    weight = weight.detach()
    if pattern is not None:
        pattern = pattern.to(weight.device)
        weight = torch.where(pattern.mask.reshape(weight.shape), weight, 0)
    if not weight.isfinite().all():
        raise ValueError(f"the weight {label!r} holds NaN or infinity: it has no spectrum")
    return weight, pattern


def _of_matrix(name: str, weight: Tensor, pattern: SparsityPattern | None) -> LayerSpectrum:
    values = singular_values(weight)
    largest = float(values[0])
    floor = max(weight.shape[0], weight[0].numel()) * 2 * _UNIT * largest
    # What is below the rounding of the decomposition is 0.
    values = torch.where(values > floor, values, 0.0)
    rank = len(values)
    if pattern is not None:
        rank = int(index_of(pattern, weight.flatten(1)).structure[0])
    return LayerSpectrum(
        name=name,
        operator="matrix",
        shape=tuple(weight.shape),
        density=1.0 if pattern is None else pattern.density,
        dead_rows=0 if pattern is None else _zeros(pattern.row_pointers),
        dead_columns=0 if pattern is None else _zeros(pattern.column_pointers),
        structural_rank=rank,
        sigma_max=largest,
        sigma_min_full=float(values[-1]),
        sigma_min_structural=float(values[rank - 1]) if rank else 0.0,
        stable_rank=float((values / largest).square().sum()) if largest else 0.0,
        effective_rank=renyi_numbers(values),
        effective_sparsity=renyi_numbers(weight.abs().double()),
        singular_values=values,
    )


def _of_convolution(
    matrix: LayerSpectrum,
    layer: nn.Conv2d | MaskedConv2d,
    weight: Tensor,
    size: tuple[int, int],
    operator: Operator,
) -> LayerSpectrum:
    try:
        if tuple(layer.dilation) != (1, 1):
            raise ValueError(f"expected dilation 1, got {layer.dilation}")
        found = conv_singular_values(
            weight, size, "zeros" if operator == "zeros" else "circular", layer.stride, layer.groups
        )
    except ValueError as error:
        raise ValueError(f"operator of {matrix.name!r}: {error}") from error
    return dataclasses.replace(
        matrix,
        operator=operator,
        sigma_max=float(found.sigma_max),
        sigma_min_full=float(found.sigma_min),
        sigma_min_structural=math.nan,
        stable_rank=math.nan,
        effective_rank=None,
        singular_values=matrix.singular_values[:0],
    )


@torch.no_grad()
def _image_sizes(model: nn.Module, example_input: Tensor) -> dict[nn.Module, tuple[int, int]]:
    """Height and width of the images that every Conv2d sees."""
    sizes: dict[nn.Module, tuple[int, int]] = {}

    def record(module: nn.Module, inputs: Sequence[Tensor]) -> None:
        sizes[module] = (inputs[0].shape[-2], inputs[0].shape[-1])

    convolutions = [m for m in model.modules() if isinstance(m, _CONVOLUTIONS)]
    hooks = [module.register_forward_pre_hook(record) for module in convolutions]
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        model(example_input)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return sizes


def _zeros(pointers: Tensor) -> int:
    """Counts the rows or columns whose entries begin where they end."""
    return int((pointers.diff() == 0).sum())


def _ratio(largest: float, smallest: float) -> float:
    if math.isnan(smallest):
        return math.nan
    return largest / smallest if smallest > 0 else math.inf


def _row(layer: LayerSpectrum) -> tuple[str, ...]:
    return (
        layer.name,
        layer.operator,
        " x ".join(map(str, layer.shape)),
        f"{100 * layer.density:.4g} %",
        str(layer.dead_rows),
        str(layer.dead_columns),
        str(layer.structural_rank),
        *map(
            _number,
            (
                layer.sigma_max,
                layer.sigma_min_full,
                layer.sigma_min_structural,
                layer.kappa_full,
                layer.kappa_structural,
                layer.stable_rank,
            ),
        ),
        _numbers(layer.effective_rank),
        _numbers(layer.effective_sparsity),
    )


def _number(value: float) -> str:
    if math.isnan(value):
        return _ABSENT
    return f"{value:.4g}" if math.isfinite(value) else "∞"


def _numbers(values: RenyiNumbers | None) -> str:
    return ", ".join(map(_number, values)) if values else _ABSENT
