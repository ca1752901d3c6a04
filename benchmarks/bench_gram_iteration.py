"""Benchmark of `gram_iteration`: the spectral norm of one layer's matrix, or of a batch.

Flops counted: m n² for the first Gram matrix of the small side n and 2 n³ for each of the other
five products. Six steps promise rank^(1/128), that is 5 % up to rank 500: every provider must be as
close to σ_1. Only ours and the float32 iteration bound it from above, and of the two only ours in
floating point. Peers get their good, tall orientation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Call, Case, Provider, UnavailableError
from tscnc_kernels import extreme_singular_values, gram_iteration, use_backend

STEPS = 6
TOLERANCE = 0.05
POWER_STEPS = 50

# Batch, rows and columns: convolutions as (out, in · kh · kw), square layers, and a batch.
SHAPES = [
    (1, 64, 576),
    (1, 128, 1152),
    (1, 256, 2304),
    (1, 512, 4608),
    (1, 512, 512),
    (1, 2048, 2048),
    (64, 64, 64),
]
MODES = ("forward", "forward_backward")
Function = Callable[[Tensor, Tensor], Tensor]
# Its default number of steps is too small for PROPACK to return anything.
SCIPY_TOLERANCE, SCIPY_STEPS = 1e-3, 300
SCIPY = {f"scipy svds {solver.upper()}": solver for solver in ("arpack", "propack")}


def _inputs(
    shape: tuple[int, int, int], generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Weights, and the start vectors of the methods that need some."""
    weight = torch.randn(shape, generator=generator).to(device)
    starts = torch.randn(shape[0], min(shape[1:]), 1, generator=generator).to(device)
    return weight.requires_grad_(), starts


def _expected(weight: Tensor, starts: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(_tall(weight.detach().double()), 2)


def _tall(weight: Tensor) -> Tensor:
    return weight if weight.shape[-2] >= weight.shape[-1] else weight.mT.contiguous()


def _ours(weight: Tensor, starts: Tensor) -> Tensor:
    return gram_iteration(weight, STEPS)


def _plain_torch(weight: Tensor, starts: Tensor) -> Tensor:
    """The same bound by torch's own products, which do not know that the result is symmetric."""
    with use_backend("reference"):
        return gram_iteration(weight, STEPS)


def _both_ends(weight: Tensor, starts: Tensor) -> Tensor:
    return extreme_singular_values(list(weight)).sigma_max


def _float32_iteration(weight: Tensor, starts: Tensor) -> Tensor:
    """The published iteration: Frobenius rescaling, logarithms of the scales, no charges."""
    power, logs = _tall(weight), torch.zeros(len(weight), device=weight.device)
    for _ in range(STEPS):
        scale = torch.linalg.matrix_norm(power)
        power = power / scale[:, None, None]
        logs = 2 * (logs + scale.log())
        power = power.mT @ power
    return ((torch.linalg.matrix_norm(power).log() + logs) / 2**STEPS).exp()


def _power_iteration(weight: Tensor, starts: Tensor) -> Tensor:
    """Fifty steps on a vector, then uᵀ W v with the vectors as constants."""
    tall = _tall(weight)
    with torch.no_grad():
        v = starts / torch.linalg.matrix_norm(starts)[:, None, None]
        for _ in range(POWER_STEPS):
            u = tall @ v
            u = u / torch.linalg.matrix_norm(u)[:, None, None]
            v = tall.mT @ u
            v = v / torch.linalg.matrix_norm(v)[:, None, None]
        u = tall @ v
        u = u / torch.linalg.matrix_norm(u)[:, None, None]
    return (u.mT @ tall @ v).flatten()


def _svdvals(weight: Tensor, starts: Tensor) -> Tensor:
    return torch.linalg.svdvals(_tall(weight))[:, 0]


def _gram_eigvalsh(weight: Tensor, starts: Tensor) -> Tensor:
    tall = _tall(weight)
    return torch.linalg.eigvalsh(tall.mT @ tall)[:, -1].sqrt()


def _lobpcg(weight: Tensor, starts: Tensor) -> Tensor:
    tall = _tall(weight)
    return torch.lobpcg(tall.mT @ tall, X=starts, niter=20)[0][:, 0].sqrt()


def _prepare_scipy(solver: str, case: Case, weight: Tensor, starts: Tensor) -> Call:
    try:
        import numpy
        from scipy.sparse import linalg
    except ImportError as error:
        raise UnavailableError("the package scipy is not installed") from error
    if case.mode != "forward" or len(weight) > 1 or weight.device.type != "cpu":
        raise UnavailableError("one matrix on the CPU, without gradient")
    tall, start = _tall(weight.detach())[0].numpy(), starts.flatten().numpy()
    if solver == "propack":
        start = tall @ start

    def call() -> Tensor:
        try:
            values = linalg.svds(
                tall,
                k=1,
                v0=start,
                solver=solver,
                tol=SCIPY_TOLERANCE,
                maxiter=SCIPY_STEPS,
                return_singular_vectors=False,
            )
        except (linalg.ArpackError, numpy.linalg.LinAlgError) as error:
            raise UnavailableError(f"no result: {error}") from error
        return torch.tensor(values[:1].copy())

    return call


def _prepare(function: Function, case: Case, weight: Tensor, starts: Tensor) -> Call:
    if function is _plain_torch and not weight.is_cuda:
        raise UnavailableError("gram_iteration has a kernel of its own on a GPU alone")
    if case.mode == "forward":
        frozen = weight.detach()
        return lambda: function(frozen, starts)
    if function is _lobpcg:
        raise UnavailableError("its gradient needs a full decomposition")

    def call() -> Tensor:
        norms = function(weight, starts)
        torch.autograd.grad(norms.sum(), weight)
        return norms.detach()

    return call


def _case(shape: tuple[int, int, int], mode: str) -> Case:
    batch, m, n = shape[0], max(shape[1:]), min(shape[1:])
    forward = batch * (m * n**2 + (STEPS - 1) * 2 * n**3)
    # The gradient repeats the products, with two for one, and multiplies by the weight.
    backward = batch * (m * n**2 + (STEPS - 1) * 4 * n**3 + 2 * m * n**2)
    return Case(
        op="gram_iteration",
        mode=mode,
        shape="x".join(map(str, shape if batch > 1 else shape[1:])),
        dtype=torch.float32,
        inputs=partial(_inputs, shape),
        expected=_expected,
        work=forward if mode == "forward" else forward + backward,
        unit="GF/s",
        tolerance=TOLERANCE,
    )


CASES = [_case(shape, mode) for shape in SHAPES for mode in MODES]
QUICK = [_case(shape, mode) for shape in ((1, 64, 576), (64, 64, 64)) for mode in MODES]
PROVIDERS = [
    Provider(name, partial(_prepare, function))
    for name, function in (
        ("gram_iteration", _ours),
        ("gram_iteration in torch", _plain_torch),
        ("extreme_singular_values", _both_ends),
        ("float32 gram iteration", _float32_iteration),
        (f"power iteration {POWER_STEPS}", _power_iteration),
        ("torch svdvals", _svdvals),
        ("gram32 + eigvalsh", _gram_eigvalsh),
        ("torch lobpcg 20", _lobpcg),
    )
]
PROVIDERS += [Provider(name, partial(_prepare_scipy, solver)) for name, solver in SCIPY.items()]


def essential(case: Case, provider: Provider) -> bool:
    """The norms alone of all but the largest matrix."""
    return case in QUICK or (case.mode == "forward" and case.shape != "2048x2048")


def run(argv: Sequence[str] | None = None) -> list[harness.results.Row]:
    """Measure and print; see `--help`."""
    return harness.main(CASES, PROVIDERS, QUICK, argv, essential)


if __name__ == "__main__":
    run()
