"""Which algorithm computes each product of a masked convolution."""

from collections.abc import Sequence

import torch

from tscnc_kernels._autotune import DENSE
from tscnc_kernels._build import C
from tscnc_kernels._conv_geometry import ConvGeometry
from tscnc_kernels._masked_algorithms import Algorithms
from tscnc_kernels.sparsity import SparsityPattern

# Algorithms of the native backend on the kept entries, and their codes in csrc/masked_conv2d.cpp.
SPARSE = {"plane": 0, "batch": 1}
ALGORITHMS = (*SPARSE, DENSE)
# Above this density torch's convolution is expected to win over a training step.
SPARSE_DENSITY = 0.45


def choose(
    op: str,
    pattern: SparsityPattern,
    geometry: ConvGeometry,
    backend: str,
    input_shape: Sequence[int],
    forced: str | None = None,
) -> Algorithms:
    """The algorithms that an op runs: the one asked for, else by a closed-form rule.

    The rule is a sparse one where the native backend runs, the density is at most
    `SPARSE_DENSITY` and the convolution is not depthwise: "batch" if images fill the lanes of
    vectors, else "plane".

    Raises:
        RuntimeError: a sparse algorithm was asked for on a backend without it.
    """
    if forced in SPARSE and backend != "native":
        raise RuntimeError(
            f"{op}: algorithm {forced!r} needs the native backend, got {backend!r} "
            f"on {pattern.device}"
        )
    if forced is not None:
        return Algorithms(forced, forced, forced)
    depthwise = pattern.shape[1] == 1 and geometry.groups > 1
    if backend != "native" or depthwise or pattern.density > SPARSE_DENSITY:
        return Algorithms(DENSE, DENSE, DENSE)
    images, lanes = input_shape[0], _lanes()
    groups = (images + lanes - 1) // lanes
    name = "batch" if images >= 0.75 * groups * lanes else "plane"
    return Algorithms(name, name, name)


@torch.compiler.assume_constant_result
def _lanes() -> int:
    """float32 elements of the kernels' vectors."""
    return {"portable": 4, "avx2": 8}.get(C.active_isa(), 16)
