"""The CUDA kernels between a matrix and its kept entries, run on the CPU by the emulation."""

from collections.abc import Callable
from ctypes import byref, c_int, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda.masked_calls import DTYPE_CODES, DTYPES, MASKS, make_mask, row_entries
from tests.cuda_emulation.library import EmulatedLibrary, GuardedTensor, guarded_copy, same_bits
from tscnc_kernels import SparsityPattern


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> EmulatedLibrary:
    source = Path(__file__).parent / "sparsity_values_emulated.cpp"
    return EmulatedLibrary(source, tmp_path_factory.mktemp("sparsity_values"))


def run(
    library: EmulatedLibrary,
    size: int,
    dtype: torch.dtype,
    launch: Callable[[int], None],
    offset: int = 0,
) -> Tensor:
    """What `launch(address)` writes, the same in every order of the threads."""

    def once() -> list[Tensor]:
        result = GuardedTensor(size, dtype, offset)
        launch(result.tensor.data_ptr())
        result.check()
        return [result.tensor]

    return library.run_in_every_order(once)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_gather_and_scatter(library: EmulatedLibrary, kind: str, dtype: torch.dtype) -> None:
    pattern = SparsityPattern.from_mask(make_mask(kind, 33, 47))
    entries, code = row_entries(pattern), DTYPE_CODES[dtype]
    strided = torch.randn(47, 66).to(dtype)[:, ::2].t()
    gather = library.function("gather", c_int, *(c_void_p,) * 2, *(c_int64,) * 2, c_void_p, c_int)
    scatter = library.function("scatter", c_int, *(c_void_p,) * 3, c_int)

    def launch_gather(address: int) -> None:
        matrix = strided.data_ptr(), *strided.stride()
        library.call(gather, byref(entries), *matrix, address, code)

    values = run(library, pattern.nnz, dtype, launch_gather)
    assert same_bits(values, strided[pattern.mask])

    def launch_scatter(address: int) -> None:
        library.call(scatter, byref(entries), values.data_ptr(), address, code)

    matrix = run(library, 33 * 47, dtype, launch_scatter).view(33, 47)
    assert same_bits(matrix, strided.where(pattern.mask, strided.new_zeros(())))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 8, 1023, 8192 + 5])
@pytest.mark.parametrize("offset", [0, 1])
def test_mask(library: EmulatedLibrary, size: int, offset: int, dtype: torch.dtype) -> None:
    pattern = SparsityPattern.from_mask(make_mask("random", 1, size))
    source = torch.randn(size).to(dtype)
    source[~pattern.mask[0]] = torch.nan
    held = guarded_copy(source, offset)
    types = c_void_p, c_void_p, c_int64, c_void_p, c_int
    mask = library.function("mask", c_int, *types)

    def launch(address: int) -> None:
        data = held.tensor.data_ptr(), pattern.bits.data_ptr(), size
        library.call(mask, *data, address, DTYPE_CODES[dtype])

    found = run(library, size, dtype, launch, offset)
    assert same_bits(found, source.where(pattern.mask[0], source.new_zeros(())))
