"""Ways to find the ends of a spectrum, ours and the peers', for `bench_spectral_errors`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from benchmarks import bench_gram_iteration
from tscnc_kernels import SparsityPattern, extreme_singular_values, gram_iteration
from tscnc_kernels._spectral import CAP_REACHED

WARM_STEP, WARM_STEPS = 1e-3, 4
LOBPCG_STEPS = 20
# Smallest singular values that ARPACK and PROPACK are asked for; beyond, they take minutes.
SCIPY_SIDE, SCIPY_STEPS = 128, 300


@dataclass(frozen=True)
class Matrix:
    """A weight, zero where its pattern is."""

    weight: Tensor
    pattern: SparsityPattern | None = None

    @property
    def tall(self) -> Tensor:
        """The orientation that the peers are faster in."""
        rows, cols = self.weight.shape
        return self.weight if rows >= cols else self.weight.mT.contiguous()


@dataclass(frozen=True)
class Ends:
    """What a method says; nan where it does not. `kappa`: where it is not the quotient."""

    largest: float = math.nan
    smallest: float = math.nan
    kappa: float | None = None
    capped: bool = False
    bounds: Sequence[Sequence[float]] = ()


Method = Callable[[Matrix], Callable[[], Ends] | None]


def _ours(matrix: Matrix, state: Tensor | None = None, **options: Any) -> Callable[[], Ends]:
    patterns = None if matrix.pattern is None else [matrix.pattern]

    def call() -> Ends:
        found = extreme_singular_values([matrix.weight], patterns, state, **options)
        bounds = [] if found.bounds is None else [bound[0].tolist() for bound in found.bounds]
        capped = bool(int(found.flags[0]) & CAP_REACHED)
        return Ends(
            float(found.sigma_max[0]), float(found.sigma_min[0]), capped=capped, bounds=bounds
        )

    return call


def _warm(matrix: Matrix) -> Callable[[], Ends]:
    """From the state of a walk that ends at the matrix."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.ones_like(matrix.weight) if matrix.pattern is None else matrix.pattern.mask
    walk = [matrix.weight]
    for _ in range(WARM_STEPS):
        noise = torch.randn(matrix.weight.shape, generator=generator) * kept
        walk.append(walk[-1] + noise * (WARM_STEP * matrix.weight.norm() / noise.norm()))
    patterns = None if matrix.pattern is None else [matrix.pattern]
    state = None
    for weight in reversed(walk[1:]):
        state = extreme_singular_values([weight], patterns, state).state
    return _ours(matrix, state)


def _of(function: Callable[[Tensor], tuple[Tensor, Tensor]], matrix: Matrix) -> Callable[[], Ends]:
    tall = matrix.tall

    def call() -> Ends:
        largest, smallest = function(tall)
        return Ends(float(largest), float(smallest))

    return call


def _svdvals(tall: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.linalg.svdvals(tall)
    return values[0], values[-1]


def _svd(tall: Tensor) -> tuple[Tensor, Tensor]:
    values = torch.linalg.svd(tall, full_matrices=False).S
    return values[0], values[-1]


def _gram_eigvalsh(dtype: torch.dtype, tall: Tensor) -> tuple[Tensor, Tensor]:
    wide = tall.to(dtype)
    values = torch.linalg.eigvalsh(wide.mT @ wide).clamp(min=0).sqrt()
    return values[-1], values[0]


def _cond(matrix: Matrix) -> Callable[[], Ends]:
    tall = matrix.tall
    return lambda: Ends(kappa=float(torch.linalg.cond(tall)))


def _lobpcg(matrix: Matrix) -> Callable[[], Ends]:
    tall = matrix.tall
    start = torch.randn(tall.shape[1], 1, generator=torch.Generator().manual_seed(0))

    def call() -> Ends:
        gram = tall.mT @ tall
        largest, smallest = (
            float(torch.lobpcg(gram, X=start, niter=LOBPCG_STEPS, largest=end)[0][0])
            for end in (True, False)
        )
        return Ends(math.sqrt(largest), math.sqrt(max(smallest, 0.0)))

    return call


def _spectral_norm(matrix: Matrix) -> Callable[[], Ends]:
    """Fifteen steps when it is made, as its users have it, and one per call."""
    rows, cols = matrix.weight.shape
    layer = nn.Linear(cols, rows, bias=False)
    layer.weight = nn.Parameter(matrix.weight.clone())
    torch.manual_seed(0)
    parametrizations.spectral_norm(layer)

    def call() -> Ends:
        with torch.no_grad():
            normalized: Tensor = layer.weight
        return Ends(float(matrix.weight.norm() / normalized.norm()))

    return call


def _norm(function: Callable[[Tensor], Tensor], matrix: Matrix) -> Callable[[], Ends]:
    batch = matrix.weight[None]
    return lambda: Ends(float(function(batch)))


def _float32_gram_iteration(batch: Tensor) -> Tensor:
    return bench_gram_iteration._float32_iteration(batch, batch)


def _scipy(solver: str, matrix: Matrix) -> Callable[[], Ends] | None:
    if min(matrix.weight.shape) > SCIPY_SIDE:
        return None
    try:
        import numpy
        from scipy.sparse import linalg
    except ImportError:
        return None
    tall = matrix.tall.numpy()
    ones = numpy.ones(tall.shape[1], dtype=tall.dtype)

    def end(which: str) -> float:
        start = tall @ ones if solver == "propack" else ones
        try:
            values = linalg.svds(
                tall,
                k=1,
                which=which,
                v0=start,
                solver=solver,
                maxiter=SCIPY_STEPS,
                return_singular_vectors=False,
            )
        except (linalg.ArpackError, numpy.linalg.LinAlgError):
            return math.nan
        return float(values[0]) if len(values) else math.nan

    return lambda: Ends(end("LM"), end("SM"))


OURS: dict[str, Method] = {
    "ours, cold": _ours,
    "ours, warm": _warm,
    "ours, certified": partial(_ours, certify=True),
}
FAST: dict[str, Method] = {
    **OURS,
    "torch svdvals": partial(_of, _svdvals),
    "gram32 + eigvalsh": partial(_of, partial(_gram_eigvalsh, torch.float32)),
    "gram64 + eigvalsh": partial(_of, partial(_gram_eigvalsh, torch.float64)),
}
METHODS: dict[str, Method] = {
    **FAST,
    "ours, power iteration": partial(_ours, method="power"),
    "ours, gram iteration": partial(_norm, gram_iteration),
    "torch svd": partial(_of, _svd),
    "torch linalg.cond": _cond,
    "torch spectral_norm": _spectral_norm,
    f"torch lobpcg {LOBPCG_STEPS}": _lobpcg,
    "float32 gram iteration": partial(_norm, _float32_gram_iteration),
    "scipy svds ARPACK": partial(_scipy, "arpack"),
    "scipy svds PROPACK": partial(_scipy, "propack"),
}
ESSENTIAL = {*OURS, "torch svdvals", "gram32 + eigvalsh"}
