"""Which algorithm computes each product of a masked layer."""

from typing import NamedTuple

from torch import Tensor

from tscnc_kernels.sparsity import SparsityPattern

DENSE = "dense"
# Algorithms of the native backend on the kept entries, and their codes in csrc/masked_linear.cpp.
SPARSE = {"panel": 0, "blocked": 1}
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


def row_index(pattern: SparsityPattern, algorithm: str) -> tuple[Tensor, Tensor]:
    """What the native forward and weight gradient read: row pointers, and the kept entries in the
    algorithm's form.
    """
    blocked = algorithm == "blocked"
    return pattern.row_pointers, pattern.blocked_rows if blocked else pattern.columns


def column_index(pattern: SparsityPattern, algorithm: str) -> tuple[Tensor, Tensor, Tensor]:
    """As row_index for the input gradient, with the way from its order of entries to row-major."""
    if algorithm == "blocked":
        return pattern.column_pointers, *pattern.blocked_columns
    return pattern.column_pointers, pattern.column_rows, pattern.permutation
