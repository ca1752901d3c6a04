"""masked_linear's "semi_structured" on CUDA: torch's own product with weights that keep 2 of 4.

It never runs by default. Asked for, it races with the dense product, and runs where it was measured
to be faster; gradients are those of other algorithms.
"""

import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tscnc_kernels._activation import ACTIVATIONS, activate
from tscnc_kernels._masked_weight import masked_weight
from tscnc_kernels.sparsity import SparsityPattern

SEMI_STRUCTURED = "semi_structured"
_NAMES = {code: name for name, code in ACTIVATIONS.items()}
_HALF = torch.float16, torch.bfloat16


class _Compressed(NamedTuple):
    weight: "weakref.ref[Tensor]"
    version: int
    compressed: Tensor


def is_semi_structured(pattern: SparsityPattern) -> bool:
    """Whether the mask keeps at most 2 of every 4 neighbours in a row; the pattern keeps it."""
    known: bool | None = pattern.__dict__.get("_is_semi_structured")
    if known is None:
        width = pattern.matrix_shape[1]
        known = width % 4 == 0 and int(pattern.mask.view(-1, 4).sum(1).max()) <= 2
        pattern.__dict__["_is_semi_structured"] = known
    return known


def why_not(pattern: SparsityPattern, backend: str) -> str | None:
    """None if torch may multiply by a weight of this pattern, else the reason why not."""
    if backend != "native" or pattern.device.type != "cuda":
        return f"it needs the native backend on a GPU, got {backend!r} on {pattern.device}"
    if not is_semi_structured(pattern):
        return "it needs a mask that keeps at most 2 of every 4 neighbours in a row"
    return None


def compressed_weight(weight: Tensor, pattern: SparsityPattern) -> Tensor:
    """W ∘ M in torch's format, made anew unless the weight is a constant that has not changed."""
    constant = not weight.requires_grad and not weight.is_inference()
    known: _Compressed | None = pattern.__dict__.get("_compressed")
    if constant and known and known.weight() is weight and known.version == weight._version:
        return known.compressed
    dense = masked_weight(weight.detach(), pattern)
    compressed: Tensor = torch.sparse.to_sparse_semi_structured(dense)  # type: ignore[no-untyped-call]
    if constant:
        found = _Compressed(weakref.ref(weight), weight._version, compressed)
        pattern.__dict__["_compressed"] = found
    return compressed


def semi_structured_product(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pattern: SparsityPattern,
    activation: int,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Y for a 2-d input, and Z if it has to be saved (else a tensor of no rows).

    Raises:
        RuntimeError: torch has no such product for the dtype.
    """
    if input.dtype not in _HALF:
        raise RuntimeError(
            f"masked_linear: algorithm {SEMI_STRUCTURED!r} needs float16 or bfloat16, "
            f"got {input.dtype}"
        )
    z = F.linear(input, compressed_weight(weight, pattern), bias)
    return activate(z, _NAMES[activation]), z if save else z.new_empty((0, z.shape[1]))
