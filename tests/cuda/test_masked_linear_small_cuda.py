"""The CUDA products of few samples, run on the CPU by the emulation."""

import ctypes

import pytest
import torch
import torch.nn.functional as F

from tests.cuda.masked_calls import (
    DTYPES,
    LAYOUTS,
    MASKS,
    Kernels,
    ProductCall,
    check_close,
    check_forward,
    check_grad_input,
    check_grad_weight,
    problem,
    row_entries,
    sample_matrix,
    strided,
)
from tests.cuda_emulation.library import guarded_copy, same_bits
from tscnc_kernels import SparsityPattern


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels("masked_linear_small", tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", [True, False], ids=["values", "dense"])
@pytest.mark.parametrize("count", [1, 5, 16])
def test_products_and_gradients_in_every_dtype(
    kernels: Kernels, dtype: torch.dtype, values: bool, count: int
) -> None:
    case = problem((count, 37, 53), dtype, activation="gelu")
    check_forward(kernels, case, values)
    check_grad_input(kernels, case, values)
    check_grad_weight(kernels, case, values)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("count", [1, 3])
def test_every_kind_of_mask(kernels: Kernels, count: int, kind: str) -> None:
    case = problem((count, 41, 29), torch.bfloat16, kind, activation="relu")
    check_forward(kernels, case, values=True)
    check_grad_input(kernels, case, values=True)
    check_grad_weight(kernels, case, values=False)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 129), (17, 129, 1), (40, 3, 7)])
def test_odd_sizes(kernels: Kernels, shape: tuple[int, int, int]) -> None:
    case = problem(shape, density=0.5)
    case.bias = None
    check_forward(kernels, case, values=False)
    check_grad_input(kernels, case, values=False)


@pytest.mark.parametrize("values", [True, False], ids=["values", "dense"])
def test_long_rows_take_a_warp_each(kernels: Kernels, values: bool) -> None:
    case = problem((2, 19, 700), torch.bfloat16, density=0.5)
    check_forward(kernels, case, values)


def test_features_that_need_several_tiles_of_samples(kernels: Kernels) -> None:
    case = problem((7, 4, 20000), density=0.05)
    check_forward(kernels, case, values=True)


def test_unaligned_values(kernels: Kernels) -> None:
    case = problem((3, 20, 50))
    shifted = guarded_copy(case.pattern.gather(case.weight), offset=1).tensor
    expected = kernels.forward(case, values=True)
    assert same_bits(kernels.forward(case, values=True, held=shifted)[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("values", [True, False], ids=["values", "dense"])
@pytest.mark.parametrize("shape", [(1, 23, 700), (5, 9, 41), (13, 6, 130)])
def test_narrow_columns(
    kernels: Kernels, shape: tuple[int, int, int], values: bool, dtype: torch.dtype
) -> None:
    case = problem(shape, dtype, density=0.4, activation="gelu")
    expected = case.double().preactivation()
    for offset in (0, shape[0]):
        narrow = guarded_copy(case.pattern.columns.to(torch.uint16), offset=offset).tensor
        output, preactivation = kernels.forward(case, values, narrow=narrow)
        check_close(preactivation, expected)
        check_close(output, F.gelu(expected))


def test_the_last_of_65536_narrow_columns(kernels: Kernels) -> None:
    case = problem((1, 2, 1 << 16), torch.bfloat16, density=0.001)
    mask = case.pattern.mask.clone()
    mask[:, -1] = True
    case.pattern = SparsityPattern.from_mask(mask)
    narrow = case.pattern.columns.to(torch.uint16)
    assert narrow.int().max() == (1 << 16) - 1
    check_close(kernels.forward(case, True, narrow=narrow)[1], case.double().preactivation())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_give_the_same_bits(kernels: Kernels, layout: str) -> None:
    changed, plain = strided(problem((11, 21, 35), activation="relu"), layout)
    assert same_bits(kernels.forward(changed, False)[0], kernels.forward(plain, False)[0])
    assert same_bits(kernels.grad_input(changed, False), kernels.grad_input(plain, False))
    assert same_bits(kernels.grad_weight(changed, True), kernels.grad_weight(plain, True))


def test_what_does_not_fit_is_left_to_the_other_kernels(kernels: Kernels) -> None:
    fits = kernels.library.function("product_fits", ctypes.c_int, ctypes.c_void_p)
    found = []
    for width in (58112, 58113):
        case = problem((1, 1, width), kind="none")
        call = ProductCall(row_entries(case.pattern), input=sample_matrix(case.input), dtype=6)
        found.append(fits(ctypes.byref(call)))
    assert found == [1, 0]
