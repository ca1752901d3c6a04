"""The CUDA products of masked_conv2d, run on the CPU by the emulation, against float64."""

import ctypes
from ctypes import c_bool, c_int, c_int64, c_void_p

import pytest
import torch

from tests.cuda.conv_calls import GEOMETRIES, Kernels, Problem, Shape, problem
from tests.cuda.masked_calls import DTYPE_CODES, DTYPES, check_close
from tests.cuda_emulation.library import GuardedTensor
from tscnc_kernels._activation import ACTIVATIONS, activate, activation_gradient


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels("masked_conv2d", tmp_path_factory.mktemp("masked_conv2d"))


def check(kernels: Kernels, case: Problem, values: bool = False, activation: str = "none") -> None:
    """Y, Z and dX against float64."""
    exact = case.double()
    held = case.pattern.gather(case.weight) if values else case.weight
    z = exact.preactivation()
    output, preactivation = kernels.forward(case, held, activation)
    check_close(preactivation, z)
    check_close(output, activate(z, activation))
    masked = exact.weight * case.pattern.mask
    grad_input, _ = exact.geometry.convolve_backward(
        exact.gradient, exact.input, masked, (True, False)
    )
    check_close(kernels.grad_input(case, held), grad_input)


@pytest.mark.parametrize("shape", GEOMETRIES.values(), ids=list(GEOMETRIES))
def test_geometries(kernels: Kernels, shape: Shape) -> None:
    check(kernels, problem(shape))


@pytest.mark.parametrize("kind", ["full", "none", "empty_rows", "empty_columns", "one_row"])
def test_masks_and_values(kernels: Kernels, kind: str) -> None:
    check(kernels, problem(Shape(kind=kind, stride=(2, 1))), values=True)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_activations(kernels: Kernels, dtype: torch.dtype, activation: str) -> None:
    check(kernels, problem(Shape(dtype=dtype, groups=2, out=4)), activation=activation)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_gradients_through_activations(kernels: Kernels, activation: str) -> None:
    generator = torch.Generator().manual_seed(3)
    gradient, z = (torch.randn(130, generator=generator) for _ in range(2))
    z[::9] = 0
    saved = z.relu() if activation == "relu" else z
    run = kernels.library.function(
        "scaled_gradient", c_int, c_void_p, c_void_p, c_int64, c_int64, c_int, c_void_p
    )
    result = GuardedTensor(130, torch.float32)
    kernels.library.call(
        *(run, gradient.data_ptr(), saved.data_ptr(), 130, ACTIVATIONS[activation]),
        *(DTYPE_CODES[torch.float32], result.tensor.data_ptr()),
    )
    result.check()
    check_close(result.tensor, activation_gradient(gradient.double(), z.double(), activation))


def test_images_beyond_the_kernels_offsets_do_not_fit(kernels: Kernels) -> None:
    fits = kernels.library.function("fits", c_bool, c_void_p)
    case = problem(Shape())
    call = case.call(case.weight)
    assert fits(ctypes.byref(call))
    call.height.size = 32768
    assert not fits(ctypes.byref(call))
    call.height.size, call.in_channels = 6, 1 << 27
    assert not fits(ctypes.byref(call))
