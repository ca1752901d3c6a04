"""Times the tiles that the Triton products of block patterns could take, beside the rule's.

    python -m benchmarks.tune_tiles [--edge 64 128] [--batch 4096]

The products themselves take the tile of a rule, which needs no GPU to compile and no first call to
measure. On a GPU this prints, per product, the fastest tiles and the rule's, to correct it by.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tscnc_kernels import SparsityPattern

SIZE, SPARSITY, SHOWN = 4096, 0.9, 3
DTYPES = torch.bfloat16, torch.float32
Launch = Callable[..., object]


def layer(edge: int, batch: int, dtype: torch.dtype) -> tuple[SparsityPattern, list[Tensor]]:
    """A pattern of blocks with the input, values and gradient of a layer."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(SIZE // edge, SIZE // edge, generator=generator) >= SPARSITY
    mask = blocks.repeat_interleave(edge, 0).repeat_interleave(edge, 1)
    pattern = SparsityPattern.from_mask(mask).to("cuda")
    sizes = (batch, SIZE), (pattern.nnz,), (batch, SIZE)
    return pattern, [torch.randn(size, device="cuda", dtype=dtype) for size in sizes]


def products(edge: int, batch: int, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """What a step of the layer launches, by name."""
    from tscnc_kernels.triton import block_sparse

    pattern, (input, values, gradient) = layer(edge, batch, dtype)
    yield "forward", lambda tile: block_sparse.product(input, values, pattern, tile=tile)
    yield (
        "dX",
        lambda tile: block_sparse.product(gradient, values, pattern, transposed=True, tile=tile),
    )
    yield (
        "dW",
        lambda tile: block_sparse.weight_gradient(gradient, input, pattern, values=True, tile=tile),
    )


def candidates(name: str, edge: int) -> Iterator[tuple[int, ...]]:
    """Rows, columns, depth, warps and stages of the tiles that compute a product."""
    sides = [side for side in (16, 32, 64, 128) if side <= edge]
    rows, depths = (16, 64, 128, 256), [side for side in sides if side <= 64]
    for warps, stages in itertools.product((4, 8), (3, 4, 5, 6)):
        if name == "dW":
            yield from ((side, side, depth, warps, stages) for side in sides for depth in (32, 64))
        else:
            usual = itertools.product(rows, sides[-2:], depths[-2:])
            yield from ((*sizes, warps, stages) for sizes in usual)


def seconds(launch: Launch, tiles: Sequence[tuple[int, ...] | None]) -> dict[object, float]:
    """Of every tile that the GPU has room for; None is the rule's."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    from tscnc_kernels.triton._tiles import Tile

    found: dict[object, float] = {}
    for sizes in tiles:
        tile = None if sizes is None else Tile(*sizes)
        try:
            found[tile or "rule"] = 1e-3 * do_bench(lambda tile=tile: launch(tile), rep=20)
        except (CompilationError, OutOfResources, PTXASError):
            continue
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--edge", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 256, 4096])
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no GPU found")
        return
    for edge, batch, dtype in itertools.product(options.edge, options.batch, DTYPES):
        for name, launch in products(edge, batch, dtype):
            found = seconds(launch, [None, *candidates(name, edge)])
            fastest = sorted(found, key=lambda tile: found[tile])[:SHOWN]
            print(f"{name}, blocks of {edge}, {batch} samples, {dtype}:")
            for tile in dict.fromkeys([*fastest, "rule"]):
                print(f"    {1e6 * found[tile]:9.1f} us  {tile}")


if __name__ == "__main__":
    main()
