"""What `bench_masked_linear` measures on a GPU: shapes, sparsities, cuSPARSE and BSR as peers.

A 4096-wide layer in bfloat16 and in strict float32 around the sparsities where sparse and dense
products should cross, the same layer pruned by blocks, and few samples through a feed-forward
layer: with what the L2 cache holds from the call before, and with weights that it has lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks import ours, peers
from benchmarks.harness import Case, Provider, Timed, UnavailableError
from benchmarks.peers import Layer, Problem
from tscnc_kernels import SparsityPattern, masked_linear
from tscnc_kernels._block_index import block_edge
from tscnc_kernels._masked_cuda import SMALL_BATCH, SPARSE

SQUARE, FEED_FORWARD = (4096, 4096, 4096), (8, 4096, 11008)
SINGLE = (1, 4096, 11008)
SPARSITIES = [0.9, 0.95, 0.98, 0.99, 0.995, 0.999]
FEW_SPARSITIES = [0.5, 0.8, 0.9, 0.95, 0.98, 0.99]
BLOCKS, BLOCK_SPARSITIES = [64, 128], [0.8, 0.9, 0.95]

MakeCase = Callable[..., Case]


def is_wanted(argv: Sequence[str]) -> bool:
    """Whether the arguments of a bench file ask for a GPU."""
    return any(text.removeprefix("--device=").startswith("cuda") for text in argv)


def cases(case: MakeCase) -> list[Case]:
    """All of them; `case` is the bench file's."""
    both = torch.bfloat16, torch.float32
    modes = "forward_backward", "forward"
    large = [case(SQUARE, s, mode, d) for mode in modes for d in both for s in SPARSITIES]
    shapes = FEED_FORWARD, SINGLE
    blocks = [(block, s) for block in BLOCKS for s in BLOCK_SPARSITIES]
    return [
        *[case(SQUARE, s, "forward", both[0], block) for block, s in blocks],
        *large,
        case(SQUARE, 0.8, modes[0], torch.float32),
        *[case(SQUARE, s, "forward_backward", both[0], block) for block, s in blocks],
        *[case(SQUARE, 0.9, "forward", both[1], block) for block in BLOCKS],
        *both_caches(
            case(shape, s, "forward", both[0]) for shape in shapes for s in FEW_SPARSITIES
        ),
    ]


def both_caches(cases: Iterable[Case]) -> list[Case]:
    """Each case, and the same on weights in turn that together exceed the L2 cache."""
    found = []
    for warm in cases:
        found += [warm, dataclasses.replace(warm, shape=f"{warm.shape}-cold", rotate=True)]
    return found


def quick_cases(case: MakeCase) -> list[Case]:
    """Those that fit into a step of `make gpu`."""
    return [
        *[case(SQUARE, s, "forward_backward", torch.bfloat16) for s in (0.95, 0.98, 0.99)],
        *[case(SQUARE, s, "forward_backward", torch.float32) for s in (0.9, 0.99)],
        *[case(SQUARE, 0.95, "forward", dtype) for dtype in (torch.bfloat16, torch.float32)],
        *[case(FEED_FORWARD, s, "forward", torch.bfloat16) for s in (0.5, 0.95)],
        *both_caches([case(FEED_FORWARD, 0.8, "forward", torch.bfloat16)]),
        *[case(SQUARE, 0.9, "forward", torch.bfloat16, block) for block in BLOCKS],
    ]


def _edge(problem: Problem) -> int:
    edge = block_edge(SparsityPattern.from_mask(problem.mask))
    if edge is None:
        raise UnavailableError("the mask is not made of blocks")
    return edge


def _ours(backend: str, algorithm: str | None, values: bool, case: Case, problem: Problem) -> Timed:
    if algorithm in SPARSE:
        count = len(problem.input)
        usual = "panel" if count > SMALL_BATCH else "spmv" if count == 1 else "small_batch"
        if algorithm not in (usual, "bitmap" if count <= SMALL_BATCH else usual):
            raise UnavailableError("not for this batch")
        if algorithm == "bitmap" and case.mode != "forward":
            raise UnavailableError("its gradients are those of small_batch; forward only")
    if algorithm == "block":
        _edge(problem)
    op = partial(masked_linear, backend=backend)
    return ours.timed(case.mode, problem, ours.layer(op, values, algorithm, problem))


def cusparse(problem: Problem) -> Layer:
    """`torch.sparse.mm` with a CSR weight, which calls cuSPARSE, on an input of any layout."""
    weight = problem.weight.detach().to_sparse_csr()
    return Layer(lambda x: torch.sparse.mm(weight, x.t()).t() + problem.bias, weight, problem.bias)


def bsr(problem: Problem) -> Layer:
    """`F.linear` with a weight of torch's block layout, which on CUDA calls torch's Triton kernel.

    Raises:
        UnavailableError: the mask has no blocks, or torch cannot multiply them here.
    """
    edge = _edge(problem)
    weight = problem.weight.detach().to_sparse_bsr((edge, edge))
    try:
        F.linear(problem.input, weight, problem.bias)
    except RuntimeError as error:
        raise UnavailableError(str(error).splitlines()[0]) from error
    return Layer(lambda x: F.linear(x, weight, problem.bias), weight, problem.bias)


def _forward_peer(adapter: Callable[[Problem], Layer], case: Case, problem: Problem) -> Timed:
    if case.mode != "forward":
        raise UnavailableError("it samples no dense product in half types; forward only")
    return _peer(adapter, case, problem)


def _peer(adapter: Callable[[Problem], Layer], case: Case, problem: Problem) -> Timed:
    return ours.timed(case.mode, problem, adapter(problem))


PROVIDERS = [
    Provider("ours, values", partial(_ours, "native", None, True)),
    Provider("ours, dense weight", partial(_ours, "native", None, False)),
    *[Provider(f"ours, {name}", partial(_ours, "native", name, True)) for name in SPARSE],
    Provider("ours, block", partial(_ours, "native", "block", True)),
    Provider("ours, dense", partial(_ours, "native", "dense", False)),
    Provider("ours, triton", partial(_ours, "triton", None, False)),
    Provider("F.linear", partial(_peer, peers.dense)),
    Provider("F.linear(W * mask)", partial(_peer, peers.multiplied)),
    Provider("cuSPARSE CSR", partial(_forward_peer, cusparse)),
    Provider("torch BSR", partial(_forward_peer, bsr)),
]
