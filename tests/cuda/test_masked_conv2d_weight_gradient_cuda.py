"""The CUDA gradients of masked_conv2d's weight and bias, run by the emulation, against float64."""

import pytest
import torch

from tests.cuda.conv_calls import GEOMETRIES, Kernels, Problem, Shape, problem
from tests.cuda.masked_calls import DTYPES, check_close


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    name = "masked_conv2d_weight_gradient"
    return Kernels(name, tmp_path_factory.mktemp(name))


def check(kernels: Kernels, case: Problem) -> None:
    """The gradients of the kept values and of the bias against float64."""
    exact = case.double()
    _, grad_weight = exact.geometry.convolve_backward(
        exact.gradient, exact.input, exact.weight, (False, True)
    )
    check_close(kernels.grad_weight(case), case.pattern.gather(grad_weight))
    check_close(kernels.grad_bias(case), exact.gradient.sum((0, 2, 3)))


@pytest.mark.parametrize("shape", GEOMETRIES.values(), ids=list(GEOMETRIES))
def test_geometries(kernels: Kernels, shape: Shape) -> None:
    check(kernels, problem(shape))


@pytest.mark.parametrize("kind", ["full", "none", "empty_rows", "empty_columns", "one_row"])
def test_masks(kernels: Kernels, kind: str) -> None:
    check(kernels, problem(Shape(kind=kind, stride=(2, 1))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(kernels: Kernels, dtype: torch.dtype) -> None:
    check(kernels, problem(Shape(dtype=dtype, groups=2, out=4)))


def test_sums_over_slices_of_pixels(kernels: Kernels) -> None:
    check(kernels, problem(Shape(images=5, channels=1, out=1, size=(30, 30), kind="full")))


def test_no_images_have_no_gradient(kernels: Kernels) -> None:
    case = problem(Shape(images=0))
    assert not kernels.grad_weight(case).any()
    assert not kernels.grad_bias(case).any()
