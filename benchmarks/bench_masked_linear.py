"""Benchmark of `masked_linear` beside every peer, random masks.

Work is counted on the kept entries alone, for every provider: 2·B·nnz flops forward, three times
that with the gradients of the input and of the weight. So a dense provider's rate falls with the
sparsity, and the ratio of two rates is the ratio of their times. All columns include bias, autograd
and layout conversions but two: "MKL CSR, feature-major" reads a transposed input, "ours, raw ops"
leaves out Python and autograd. The dense layer's weight gradient is masked, as ours is. "(N, K)
gradient fill" is the price of the zeros that a dense weight's gradient must hold, inside "ours,
dense weight".

A dense bf16 product is emulated on CPUs without bf16 instructions; "F.linear in fp32" is then the
baseline to beat.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks import harness, masked_linear_gpu, ours, peers
from benchmarks.harness import Call, Case, Provider, Timed, UnavailableError
from benchmarks.peers import Layer, Problem
from tscnc_kernels import masked_linear
from tscnc_kernels._masked_algorithms import ALGORITHMS

# (batch, in, out): a 2048-wide MLP, a transformer's feed-forward layer, and smaller layers.
SHAPES = [
    (128, 2048, 2048),
    (256, 768, 3072),
    (2048, 768, 3072),
    (256, 4096, 4096),
    (512, 1024, 1024),
    (128, 512, 256),
]
SMALL_BATCHES = [(1, 4096, 4096), (8, 4096, 4096), (16, 4096, 4096)]
SPARSITIES = [0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999]
MODES = ["forward", "forward_backward"]
# Batches that an algorithm is for; random masks have no blocks.
BATCHES = {"spmv": (1, 1), "small_batch": (2, 16)}
FORCED = [name for name in ALGORITHMS if name != "block"]
# These form (B, K) x nnz products or dense copies: minutes per call on the large layers.
SLOW_WORK = 3e9


def inputs(
    shape: tuple[int, int, int],
    sparsity: float,
    dtype: torch.dtype,
    block: int,
    generator: torch.Generator,
    device: torch.device,
) -> tuple[Problem]:
    """Draw a layer whose outputs have unit size at any sparsity, pruned by square blocks."""
    batch, width, rows = shape
    mask = torch.rand(rows // block, width // block, generator=generator) >= sparsity
    mask = mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
    scale = max(1.0, (1 - sparsity) * width) ** -0.5
    weight = torch.randn(rows, width, generator=generator) * scale * mask
    draw = [(batch, width), (rows,), (batch, rows)]
    input, bias, gradient = (torch.randn(size, generator=generator) for size in draw)
    float_tensors = (t.to(device, dtype) for t in (input, weight, bias, gradient))
    input, weight, bias, gradient = float_tensors
    return (Problem(input, weight, mask.to(device), bias, gradient),)


def case(
    shape: tuple[int, int, int],
    sparsity: float,
    mode: str,
    dtype: torch.dtype = torch.float32,
    block: int = 1,
) -> Case:
    """One cell of the table; `block` is the edge of the squares that are kept or pruned."""
    batch, width, rows = shape
    dense_work = 2.0 * batch * width * rows * (1 if mode == "forward" else 3)
    return Case(
        op="masked_linear",
        mode=mode,
        shape=f"{batch}x{width}x{rows}" + (f"-b{block}" if block > 1 else ""),
        dtype=dtype,
        inputs=partial(inputs, shape, sparsity, dtype, block),
        expected=partial(peers.expected, mode),
        work=(1 - sparsity) * dense_work,
        dense_work=dense_work,
        unit="GF/s",
        sparsity=sparsity,
    )


def _peer(adapter: Callable[[Problem], Layer], case: Case, problem: Problem) -> Timed:
    return ours.timed(case.mode, problem, adapter(problem))


def _slow_peer(adapter: Callable[[Problem], Layer], case: Case, problem: Problem) -> Timed:
    if case.work > SLOW_WORK:
        raise UnavailableError("far slower than dense; measured on fewer kept entries only")
    return _peer(adapter, case, problem)


def _ours(values: bool, algorithm: str | None, case: Case, problem: Problem) -> Timed:
    smallest, largest = BATCHES.get(algorithm or "", (1, len(problem.input)))
    if not smallest <= len(problem.input) <= largest:
        raise UnavailableError("not for this batch")
    layer = ours.layer(masked_linear, values, algorithm, problem)
    return ours.timed(case.mode, problem, layer)


def _raw(case: Case, problem: Problem) -> Call:
    return ours.raw_ops(case.mode, problem, ours.layer(masked_linear, True, None, problem))


def _fill(case: Case, problem: Problem) -> Callable[[], Tensor]:
    if case.mode == "forward":
        raise UnavailableError("the forward product has no gradient")
    return lambda: torch.empty_like(problem.weight).zero_()


CASES = [
    *[case(shape, s, mode) for shape in SHAPES for mode in MODES for s in SPARSITIES],
    *[case(shape, s, "forward") for shape in SMALL_BATCHES for s in SPARSITIES],
    *[case(shape, s, "forward", torch.bfloat16) for shape in SHAPES[:4] for s in SPARSITIES],
]
QUICK = [case(SHAPES[0], s, "forward_backward") for s in (0.5, 0.8, 0.9, 0.99)]
PROVIDERS = [
    Provider("ours, values", partial(_ours, True, None)),
    Provider("ours, dense weight", partial(_ours, False, None)),
    *[Provider(f"ours, {name}", partial(_ours, True, name)) for name in FORCED],
    Provider("ours, raw ops", _raw, gated=False),
    Provider("(N, K) gradient fill", _fill, gated=False),
    Provider("F.linear", partial(_peer, peers.dense)),
    Provider("F.linear in fp32", partial(_peer, peers.dense_in_fp32)),
    Provider("F.linear(W * mask)", partial(_peer, peers.multiplied)),
    Provider("SparseProp", partial(_peer, peers.sparseprop_linear)),
    Provider("torch.sparse.mm CSR", partial(_peer, peers.sparse_mm)),
    Provider("MKL CSR, feature-major", partial(_peer, peers.mkl_feature_major)),
    Provider("F.linear CSR", partial(_slow_peer, peers.sparse_linear)),
    Provider("torchsparsegradutils", partial(_slow_peer, peers.torchsparsegradutils)),
    Provider("condensed gather", partial(_slow_peer, peers.condensed)),
]
TRAINING = {
    *("ours, values", "ours, dense weight", "(N, K) gradient fill"),
    *("F.linear", "SparseProp", "torch.sparse.mm CSR"),
}
INFERENCE = {"ours, values", "F.linear", "F.linear in fp32", "MKL CSR, feature-major"}


def essential(case: Case, provider: Provider) -> bool:
    """What the table of targets needs."""
    if case.mode == "forward_backward":
        # Seconds per call where most weights are kept, and no target asks for it.
        is_slow = provider.name == "torch.sparse.mm CSR" and case.sparsity < 0.8
        return provider.name in TRAINING and not is_slow
    is_half, is_single = case.dtype == torch.bfloat16, case.shape.startswith("1x")
    return (is_half or is_single) and provider.name in INFERENCE


def run(argv: Sequence[str] | None = None) -> list[harness.results.Row]:
    """Measure and print; see `--help`. A GPU has cases and peers of its own."""
    if masked_linear_gpu.is_wanted(sys.argv[1:] if argv is None else argv):
        quick = masked_linear_gpu.quick_cases(case)
        gpu = masked_linear_gpu.cases(case), masked_linear_gpu.PROVIDERS
        return harness.main(*gpu, quick, argv)
    return harness.main(CASES, PROVIDERS, QUICK, argv, essential)


if __name__ == "__main__":
    run()
