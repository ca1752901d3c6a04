"""Parametrizations with the signatures of torch.nn.utils.parametrizations."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tscnc_kernels.nn.masked_layer import MaskedLayer
from tscnc_kernels.ops.extreme_singular_values import extreme_singular_values
from tscnc_kernels.sparsity import SparsityPattern

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    pattern: SparsityPattern | None = None,
) -> nn.Module:
    """Divide a module's weight by its spectral norm, W / σ_max(W), at every forward.

    Drop-in for torch.nn.utils.parametrizations.spectral_norm, on `extreme_singular_values` with
    ends="max" and a warm start: σ_max is exact to 1e-3 from the first call on, where one power step
    is short by percents, and after a small step of the weight costs one to three reads of it. The
    weight is seen as the matrix (shape[dim], rest), which for a convolution is not its operator
    (see `conv_singular_values`). Pruned entries stay zero and get no gradient.

    Args:
        module: the module; it is changed in place.
        name: name of its parameter.
        n_power_iterations: at least 1. Accepted so that calls written for torch run unchanged: the
            kernel takes as many steps as its promised error needs.
        eps: smallest divisor.
        dim: the dimension that counts the outputs; by default 1 for transposed convolutions, else
            0.
        pattern: the entries to keep, of the weight's shape; W is W∘M. By default that of a
            masked layer, whose mask then cannot be changed, and none for other modules.

    Returns:
        The module. Its `parametrizations.<name>.original` holds the parameter, and a buffer the
        warm start, which is part of the state_dict and moves in training mode only.

    Raises:
        ValueError: no such parameter, a lazy or meta one, n_power_iterations below 1, a dim or
            pattern that does not fit.
        TypeError: not a module, or a pattern that is not a SparsityPattern.

    Autograd: to second order.

    Source: Miyato et al., arXiv 1802.05957.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"expected an nn.Module, got {type(module).__name__}")
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"expected {type(module).__name__} to have a parameter named {name!r}")
    if n_power_iterations < 1:
        raise ValueError(f"expected n_power_iterations >= 1, got {n_power_iterations}")
    if nn.parameter.is_lazy(weight) or weight.is_meta:
        raise ValueError(f"expected {name!r} to have data, got a lazy or meta parameter")
    if pattern is None and isinstance(module, MaskedLayer) and name == "weight":
        pattern = module.pattern
    if dim is None:
        dim = 1 if isinstance(module, _TRANSPOSED) else 0
    parametrize.register_parametrization(module, name, SpectralNorm(weight, dim, eps, pattern))
    return module


class SpectralNorm(nn.Module):
    """W / σ_max(W); see `spectral_norm`.

    Args:
        weight: the weight, dense or the (nnz,) kept values of `pattern`.
        dim: the dimension that counts the outputs.
        eps: smallest divisor.
        pattern: the entries to keep, or None for all.
    """

    state: Tensor

    def __init__(
        self, weight: Tensor, dim: int, eps: float, pattern: SparsityPattern | None = None
    ) -> None:
        super().__init__()
        _check(weight, dim, pattern)
        self.dim = dim
        self.eps = eps
        self.pattern = pattern
        with torch.no_grad():
            matrix = self._matrix(self._dense(weight))
            found = extreme_singular_values([matrix], self._patterns(weight.device), ends="max")
        self.register_buffer("state", found.state)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight over its spectral norm, in the weight's own form."""
        dense = self._dense(weight)
        patterns = self._patterns(weight.device)
        # `module.half()` casts buffers too: a coarser start, no more.
        matrix, start = self._matrix(dense), self.state.double()
        found = extreme_singular_values([matrix], patterns, start, ends="max")
        if self.training:
            with torch.no_grad():
                # A step that overflowed must not spoil the ones after it.
                usable = found.state.isfinite().all()
                self.state.copy_(torch.where(usable, found.state, self.state))
        norm = found.sigma_max[0].clamp(min=self.eps).to(weight.dtype)
        return (dense if weight.shape == dense.shape else weight) / norm

    def right_inverse(self, value: Tensor) -> Tensor:
        """The weight itself: what is assigned to it is divided at the next forward."""
        return value

    def extra_repr(self) -> str:
        kept = f", density={self.pattern.density:.2%}" if self.pattern else ""
        return f"dim={self.dim}, eps={self.eps:g}{kept}"

    def _dense(self, weight: Tensor) -> Tensor:
        if self.pattern is None:
            return weight
        pattern = self.pattern.to(weight.device)
        if weight.dim() == 1:
            return pattern.scatter(weight)
        return torch.where(pattern.mask, weight, 0)

    def _patterns(self, device: torch.device) -> list[SparsityPattern] | None:
        """The pattern for the sparse kernels, which index its rows as the outputs."""
        if self.pattern is None or self.dim % len(self.pattern.shape) != 0:
            return None
        return [self.pattern.to(device)]

    def _matrix(self, dense: Tensor) -> Tensor:
        return dense[None] if dense.dim() == 1 else dense.movedim(self.dim, 0).flatten(1)


def _check(weight: Tensor, dim: int, pattern: SparsityPattern | None) -> None:
    if pattern is not None and not isinstance(pattern, SparsityPattern):
        raise TypeError(
            f"expected pattern to be a SparsityPattern or None, got {type(pattern).__name__}"
        )
    shape = tuple(weight.shape)
    if pattern is not None and shape not in (pattern.shape, (pattern.nnz,)):
        raise ValueError(f"expected a pattern of shape {shape}, got {pattern.shape}")
    dims = weight.dim() if pattern is None else len(pattern.shape)
    if dims > 1 and not -dims <= dim < dims:
        raise ValueError(f"expected dim to be one of the weight's {dims} dimensions, got {dim}")
