"""Which algorithm computes each product of a masked layer."""

from typing import NamedTuple

from tscnc_kernels.sparsity import SparsityPattern

DENSE = "dense"
# Algorithms of the native backend on the kept entries, and their codes in csrc/masked_linear.cpp.
SPARSE = {"panel": 0, "small_batch": 2, "spmv": 3, "block": 4}
ALGORITHMS = (*SPARSE, DENSE)
# Above this density torch's GEMM is expected to win over a training step: without cache blocking
# the panel kernel reaches about a third of the GEMM's rate (rows of
# benchmarks/results/*/masked_linear.csv).
PANEL_DENSITY = 0.35


class Algorithms(NamedTuple):
    """The algorithm of each of a layer's three products."""

    forward: str
    grad_input: str
    grad_weight: str


def choose(
    op: str, pattern: SparsityPattern, backend: str, batch: int, forced: str | None = None
) -> Algorithms:
    """The algorithms that an op runs: the one asked for, else by a closed-form rule.

    The rule is "panel" where the native backend runs and the density is at most `PANEL_DENSITY`,
    else "dense".

    Raises:
        RuntimeError: a sparse algorithm was asked for on a backend without it.
    """
    if forced in SPARSE and backend != "native":
        raise RuntimeError(
            f"{op}: algorithm {forced!r} needs the native backend, got {backend!r} "
            f"on {pattern.device}"
        )
    sparse = backend == "native" and pattern.density <= PANEL_DENSITY
    name = forced or ("panel" if sparse else DENSE)
    return Algorithms(name, name, name)
