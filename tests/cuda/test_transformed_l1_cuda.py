"""The CUDA kernels of transformed_l1, run on the CPU by the emulation, against float64 formulas."""

from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda_emulation.library import (
    EmulatedLibrary,
    EmulationError,
    GuardedTensor,
    guarded_copy,
    pointers,
    same_bits,
)

DTYPE_CODES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
DTYPES = list(DTYPE_CODES)
# Relative error of the value, whose arithmetic is float32 for every type but float64.
VALUE_TOLERANCE = {dtype: 1e-6 for dtype in DTYPES} | {torch.float64: 1e-14}
# One rounding to the storage type on top of it.
GRADIENT_TOLERANCE = {
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
    torch.float32: 1e-6,
    torch.float64: 1e-14,
}
# Around the sizes of a pack, of a warp and of a chunk (4096 float32 elements), and nothing at all.
SIZES = [1, 3, 0, 31, 4, 257, 4096, 4097, 8195, 0]


class Kernels:
    """The launchers with the interface of the op."""

    def __init__(self, library: EmulatedLibrary) -> None:
        self.library = library
        self._run = library.function(
            "transformed_l1",
            c_int,
            *(c_void_p, c_void_p, c_void_p, c_int64, c_int, c_double, c_void_p, c_void_p, c_void_p),
        )
        self._workspace_length = library.function(
            "workspace_length", c_int64, c_void_p, c_int64, c_int
        )

    def __call__(
        self,
        tensors: list[Tensor],
        a: float,
        *,
        value: bool = True,
        gradient: bool = True,
        grad_output: float | None = None,
        offset: int = 0,
    ) -> list[Tensor]:
        """The value, if asked for, then the gradients, the same in every order of the threads."""
        dtype = tensors[0].dtype
        value_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        inputs = [guarded_copy(tensor, offset) for tensor in tensors]
        numels = (c_int64 * len(tensors))(*(tensor.numel() for tensor in tensors))
        length = self._workspace_length(numels, len(tensors), DTYPE_CODES[dtype])
        scale = None if grad_output is None else torch.tensor(grad_output, dtype=value_dtype)

        def run() -> list[Tensor]:
            workspace = GuardedTensor(length, torch.float64)
            total = GuardedTensor(1, value_dtype)
            grads = [GuardedTensor(tensor.numel(), dtype, offset) for tensor in tensors]
            self.library.call(
                self._run,
                pointers([guarded.tensor for guarded in inputs]),
                pointers([guarded.tensor for guarded in grads]) if gradient else None,
                numels,
                len(tensors),
                DTYPE_CODES[dtype],
                a,
                total.tensor.data_ptr() if value else None,
                workspace.tensor.data_ptr() if value else None,
                None if scale is None else scale.data_ptr(),
            )
            for guarded in (workspace, total, *grads):
                guarded.check()
            results = [total.tensor] if value else []
            return results + ([guarded.tensor for guarded in grads] if gradient else [])

        results = list(self.library.run_in_every_order(run))
        for guarded, tensor in zip(inputs, tensors, strict=True):
            assert same_bits(guarded.tensor, tensor)
        return results


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    source = Path(__file__).parent / "transformed_l1_emulated.cpp"
    return Kernels(EmulatedLibrary(source, tmp_path_factory.mktemp("transformed_l1")))


def random_tensors(sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    for tensor in tensors:
        tensor[::7] = 0
    return [tensor.to(dtype) for tensor in tensors]


def expected_value(tensors: list[Tensor], a: float) -> Tensor:
    magnitudes = torch.cat([tensor.double() for tensor in tensors]).abs()
    return ((a + 1) * magnitudes / (a + magnitudes)).sum().reshape(1)


def expected_gradient(tensor: Tensor, a: float) -> Tensor:
    t = tensor.double()
    return t.sign() * a * (a + 1) / (a + t.abs()) ** 2


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradients_of_many_sizes(kernels: Kernels, dtype: torch.dtype) -> None:
    tensors = random_tensors(SIZES, dtype)
    value, *grads = kernels(tensors, 0.7)
    assert_close(value, expected_value(tensors, 0.7), VALUE_TOLERANCE[dtype])
    for grad, tensor in zip(grads, tensors, strict=True):
        assert_close(grad, expected_gradient(tensor, 0.7), GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_tensors(kernels: Kernels, dtype: torch.dtype, offset: int) -> None:
    tensors = random_tensors([5, 2049], dtype)
    value, *grads = kernels(tensors, 2.0, offset=offset)
    assert_close(value, expected_value(tensors, 2.0), VALUE_TOLERANCE[dtype])
    for grad, tensor in zip(grads, tensors, strict=True):
        assert_close(grad, expected_gradient(tensor, 2.0), GRADIENT_TOLERANCE[dtype])


def test_one_pass_agrees_with_value_and_gradient_alone(kernels: Kernels) -> None:
    tensors = random_tensors([4099, 17], torch.float32)
    value, *grads = kernels(tensors, 1.0)
    assert torch.equal(kernels(tensors, 1.0, gradient=False)[0], value)
    for alone, grad in zip(kernels(tensors, 1.0, value=False), grads, strict=True):
        assert torch.equal(alone, grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_output_scales_the_gradients(kernels: Kernels, dtype: torch.dtype) -> None:
    tensors = random_tensors([130], dtype)
    (grad,) = kernels(tensors, 1.5, value=False, grad_output=-2.5)
    assert_close(grad, -2.5 * expected_gradient(tensors[0], 1.5), 2.5 * GRADIENT_TOLERANCE[dtype])


def test_more_tensors_than_one_launch_takes(kernels: Kernels) -> None:
    tensors = random_tensors([index % 5 for index in range(230)], torch.float32)
    value, *grads = kernels(tensors, 0.3)
    assert_close(value, expected_value(tensors, 0.3), VALUE_TOLERANCE[torch.float32])
    for grad, tensor in zip(grads, tensors, strict=True):
        assert_close(grad, expected_gradient(tensor, 0.3), GRADIENT_TOLERANCE[torch.float32])


def test_empty_tensors_have_value_zero(kernels: Kernels) -> None:
    value, grad = kernels([torch.empty(0)], 1.0)
    assert value.item() == 0
    assert grad.numel() == 0


def test_hand_worked_values(kernels: Kernels) -> None:
    value, grad = kernels([torch.tensor([-3.0, 0.0, 1.0, -0.0])], 1.0)
    # rho_1(3) = 2*3/4, rho_1(1) = 2*1/2; slopes 2/(1+3)^2 and 2/(1+1)^2.
    assert value.item() == 2.5
    assert grad.tolist() == [-0.125, 0.0, 0.5, 0.0]


def test_extreme_elements_stay_finite_and_nan_spreads(kernels: Kernels) -> None:
    largest = torch.finfo(torch.float32).max
    value, grad = kernels([torch.tensor([largest, -largest, 1e-38])], 3.0)
    assert value.item() == pytest.approx(8.0, rel=1e-6)
    assert grad.isfinite().all()
    value, grad = kernels([torch.tensor([1.0, float("nan")])], 3.0)
    assert value.isnan().all()
    assert grad.isnan().tolist() == [False, True]


def test_unknown_dtype_code_is_an_error(kernels: Kernels) -> None:
    launch = kernels.library.function(
        "transformed_l1",
        c_int,
        *(c_void_p, c_void_p, c_void_p, c_int64, c_int, c_double, c_void_p, c_void_p, c_void_p),
    )
    with pytest.raises(EmulationError, match="cudaError 1"):
        kernels.library.call(launch, None, None, None, 0, 99, 1.0, None, None, None)
