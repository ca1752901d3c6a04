"""The CUDA product of many samples with a sparse matrix, run on the CPU by the emulation."""

import ctypes

import pytest
import torch

from tests.cuda.masked_calls import (
    DTYPES,
    LAYOUTS,
    MASKS,
    Kernels,
    ProductCall,
    check_forward,
    check_grad_input,
    problem,
    sample_matrix,
    strided,
)
from tests.cuda_emulation.library import EmulationError, same_bits


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels("masked_linear", tmp_path_factory.mktemp("masked_linear"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", [True, False], ids=["values", "dense"])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_products_in_every_dtype(
    kernels: Kernels, dtype: torch.dtype, values: bool, activation: str
) -> None:
    case = problem((70, 37, 53), dtype, activation=activation)
    check_forward(kernels, case, values)
    check_grad_input(kernels, case, values)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_of_mask(kernels: Kernels, dtype: torch.dtype, kind: str) -> None:
    case = problem((33, 41, 29), dtype, kind)
    check_forward(kernels, case, values=True)
    check_grad_input(kernels, case, values=True)


@pytest.mark.parametrize("shape", [(1, 1, 1), (63, 1, 129), (64, 129, 1), (65, 300, 7), (9, 5, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_sizes(kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    case = problem(shape, dtype, density=0.5)
    case.bias = None
    check_forward(kernels, case, values=False)
    check_grad_input(kernels, case, values=False)


# Features that fit into shared memory in teams of 8, 4 and 2, and in several tiles.
@pytest.mark.parametrize("width", [1815, 1816, 3632, 15001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_layers(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    case = problem((65, 6, width), dtype, "skewed", activation="gelu")
    check_forward(kernels, case, values=True)


def test_several_tiles_add_up_as_one_does(kernels: Kernels) -> None:
    """Float64 has teams of 2: 7263 features are one tile."""
    wide = problem((3, 5, 9001), torch.float64, "skewed")
    check_forward(kernels, wide, values=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_give_the_same_bits(kernels: Kernels, dtype: torch.dtype, layout: str) -> None:
    changed, plain = strided(problem((41, 21, 35), dtype, activation="relu"), layout)
    assert same_bits(kernels.forward(changed, False)[0], kernels.forward(plain, False)[0])
    assert same_bits(kernels.grad_input(changed, False), kernels.grad_input(plain, False))


def test_inputs_that_no_entry_reads_stay_out(kernels: Kernels) -> None:
    case = problem((40, 17, 30), kind="empty_columns")
    clean, _ = kernels.forward(case, values=True)
    case.input[:, ::3] = torch.nan
    found, _ = kernels.forward(case, values=True)
    assert same_bits(found, clean)


def test_weights_off_the_mask_stay_out(kernels: Kernels) -> None:
    case = problem((20, 17, 30))
    clean, _ = kernels.forward(case, values=False)
    case.weight[~case.pattern.mask] = torch.inf
    found, _ = kernels.forward(case, values=False)
    assert same_bits(found, clean)


def test_values_and_dense_weight_give_the_same_bits(kernels: Kernels) -> None:
    case = problem((50, 40, 60), torch.float16, activation="gelu")
    for found, other in zip(kernels.forward(case, True), kernels.forward(case, False), strict=True):
        assert same_bits(found, other)


def test_no_samples_need_no_launch(kernels: Kernels) -> None:
    output, _ = kernels.forward(problem((0, 7, 5)), values=True)
    assert output.shape == (0, 7)


def test_unknown_dtype_code_is_an_error(kernels: Kernels) -> None:
    launch = kernels.library.function("product", ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    call = ProductCall(input=sample_matrix(torch.zeros(2, 3)), dtype=99)
    call.entries.rows = 4
    with pytest.raises(EmulationError, match="cudaError 1"):
        kernels.library.call(launch, ctypes.byref(call), None)
