"""The CUDA gradients of kept entries and bias, run on the CPU by the emulation."""

import pytest
import torch

from tests.cuda.masked_calls import (
    DTYPES,
    LAYOUTS,
    MASKS,
    Kernels,
    check_close,
    check_grad_weight,
    problem,
    strided,
)
from tests.cuda_emulation.library import same_bits


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels("masked_linear_weight_gradient", tmp_path_factory.mktemp("weight_gradient"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", [True, False], ids=["values", "dense"])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_gradients_in_every_dtype(
    kernels: Kernels, dtype: torch.dtype, values: bool, activation: str
) -> None:
    case = problem((70, 67, 53), dtype, activation=activation)
    check_grad_weight(kernels, case, values)
    check_close(kernels.grad_bias(case), case.double().scaled_gradient().sum(0))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_of_mask(kernels: Kernels, dtype: torch.dtype, kind: str) -> None:
    check_grad_weight(kernels, problem((33, 70, 29), dtype, kind), values=False)


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 129), (64, 129, 1), (129, 3, 7), (0, 4, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_sizes(kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    case = problem(shape, dtype, density=0.5)
    check_grad_weight(kernels, case, values=True)
    check_close(kernels.grad_bias(case), case.double().gradient.sum(0))


@pytest.mark.parametrize("width", [512, 513, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_tiles_of_columns(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    check_grad_weight(kernels, problem((20, 9, width), dtype, "skewed"), values=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_of_the_batch_that_hold_several_chunks(kernels: Kernels, dtype: torch.dtype) -> None:
    """600 columns are two tiles, which want 32 slices: 33 chunks or more share them."""
    samples = 33 * 64 if dtype == torch.float32 else 33 * 128 + 5
    case = problem((samples, 2, 600), dtype, density=0.02)
    check_grad_weight(kernels, case, values=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_give_the_same_bits(kernels: Kernels, layout: str) -> None:
    changed, plain = strided(problem((41, 21, 35), activation="relu"), layout)
    assert same_bits(kernels.grad_weight(changed, True), kernels.grad_weight(plain, True))
    assert same_bits(kernels.grad_bias(changed), kernels.grad_bias(plain))


def test_inputs_that_no_entry_reads_stay_out(kernels: Kernels) -> None:
    case = problem((40, 17, 30), kind="empty_columns")
    clean = kernels.grad_weight(case, values=True)
    case.input[:, ::3] = torch.nan
    assert same_bits(kernels.grad_weight(case, values=True), clean)
