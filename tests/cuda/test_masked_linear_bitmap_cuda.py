"""The CUDA products that read the mask as bits, run on the CPU by the emulation."""

import ctypes
from ctypes import c_int, c_int32, c_int64, c_void_p
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cuda.masked_calls import (
    DTYPE_CODES,
    LAYOUTS,
    MASKS,
    Problem,
    SampleMatrix,
    check_close,
    problem,
    sample_matrix,
    strided,
)
from tests.cuda_emulation.library import (
    EmulatedLibrary,
    EmulationError,
    GuardedTensor,
    guarded_copy,
    same_bits,
)
from tscnc_kernels._activation import ACTIVATIONS
from tscnc_kernels._masked_bitmap import chunk_columns
from tscnc_kernels._tile_starts import tile_starts

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


class BitmapCall(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("bits", "starts", "values")),
        *((name, c_int64) for name in ("rows", "width", "kept")),
        *(("input", SampleMatrix), ("bias", c_void_p), ("activation", c_int64)),
        *(("output", c_void_p), ("preactivation", c_void_p), ("dtype", c_int32)),
    )


class Products:
    """The launchers; results are the same in every order of the threads."""

    def __init__(self, folder: Path) -> None:
        source = Path(__file__).parent / "masked_linear_bitmap_emulated.cpp"
        self.library = EmulatedLibrary(source, folder)

    def call(self, case: Problem, held: Tensor, starts: Tensor) -> BitmapCall:
        bias = None if case.bias is None else case.bias.data_ptr()
        return BitmapCall(
            *(case.pattern.bits.data_ptr(), starts.data_ptr(), held.data_ptr()),
            *(*case.pattern.matrix_shape, case.pattern.nnz, sample_matrix(case.input), bias),
            *(ACTIVATIONS[case.activation], None, None, DTYPE_CODES[case.input.dtype]),
        )

    def __call__(self, case: Problem) -> tuple[Tensor, Tensor]:
        """Y and Z."""
        held = guarded_copy(case.pattern.gather(case.weight))
        starts = tile_starts(case.pattern, chunk_columns(case.input.dtype))
        call = self.call(case, held.tensor, starts)
        launch = self.library.function("product", c_int, c_void_p)
        shape = len(case.input), case.pattern.shape[0]

        def run() -> list[Tensor]:
            results = [GuardedTensor(shape[0] * shape[1], case.input.dtype) for _ in range(2)]
            call.output, call.preactivation = (result.tensor.data_ptr() for result in results)
            self.library.call(launch, ctypes.byref(call))
            for result in results:
                result.check()
            return [result.tensor for result in results]

        output, preactivation = self.library.run_in_every_order(run)
        return output.view(shape), preactivation.view(shape)


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Products:
    return Products(tmp_path_factory.mktemp("bitmap"))


def check(products: Products, case: Problem) -> None:
    z = case.double().preactivation()
    output, preactivation = products(case)
    check_close(preactivation, z)
    check_close(output, {"none": z, "relu": z.relu(), "gelu": F.gelu(z)}[case.activation])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 7, 16])
def test_products_in_every_dtype(products: Products, dtype: torch.dtype, count: int) -> None:
    check(products, problem((count, 19, 320), dtype, activation="gelu", density=0.4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_every_kind_of_mask(products: Products, kind: str, dtype: torch.dtype) -> None:
    check(products, problem((3, 17, 192), dtype, kind, activation="relu"))


def test_one_row_and_one_word_of_the_mask(products: Products) -> None:
    for dtype, width in ((torch.bfloat16, 64), (torch.float32, 32)):
        case = replace(problem((1, 1, width), dtype, density=0.5), bias=None)
        check(products, case)


def test_more_samples_than_one_block_takes(products: Products) -> None:
    check(products, problem((19, 9, 128), torch.float16, density=0.3))


@pytest.mark.parametrize(("count", "width"), [(2, 4480), (9, 4160)])
def test_wide_layers_are_cut_into_slices(products: Products, count: int, width: int) -> None:
    check(products, problem((count, 11, width), torch.bfloat16, density=0.5))


def test_a_block_takes_several_tiles_of_rows(products: Products) -> None:
    # Of the emulation's two processors.
    check(products, problem((2, 100, 128), torch.bfloat16, density=0.3))


def test_more_tiles_than_the_blocks_that_run_at_once_keep(products: Products) -> None:
    check(products, problem((1, 8 * 32 * 4 + 3, 64), torch.bfloat16, density=0.2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_of_the_input_give_the_same_bits(products: Products, layout: str) -> None:
    changed, plain = strided(problem((5, 12, 64), torch.bfloat16), layout)
    assert same_bits(products(changed)[0], products(plain)[0])


def test_no_samples_leave_nothing_to_do(products: Products) -> None:
    assert products(problem((0, 5, 64), torch.bfloat16))[0].shape == (0, 5)


def test_what_has_no_kernel_is_refused(products: Products) -> None:
    fits = products.library.function("product_fits", c_int, c_void_p)
    launch = products.library.function("product", c_int, c_void_p)
    chunk = products.library.function("chunk", c_int64, c_int)
    assert [chunk(DTYPE_CODES[dtype]) for dtype in DTYPES] == [chunk_columns(d) for d in DTYPES]
    assert chunk(DTYPE_CODES[torch.float64]) == 0

    def found(width: int, dtype: torch.dtype, offset: int = 0) -> int:
        case = problem((2, 3, width), dtype)
        held = guarded_copy(case.pattern.gather(case.weight), offset=offset).tensor
        starts = torch.zeros(3, 1, dtype=torch.int32)
        call = products.call(case, held, starts)
        if not fits(ctypes.byref(call)):
            with pytest.raises(EmulationError, match="cudaError 1"):
                products.library.call(launch, ctypes.byref(call))
        return fits(ctypes.byref(call))

    assert found(64, torch.bfloat16) == found(32, torch.float32) == 1
    assert found(32, torch.bfloat16) == found(33, torch.float32) == 0
    assert found(64, torch.float64) == found(64, torch.bfloat16, offset=1) == 0
