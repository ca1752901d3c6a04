"""The CUDA kernels of batch_norm_relu, run on the CPU by the emulation, against float64."""

import ctypes
from ctypes import c_bool, c_double, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda_emulation.library import EmulatedLibrary, GuardedTensor, guarded_copy
from tscnc_kernels.ops.batch_norm_relu import reference

DTYPE_CODES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
DTYPES = list(DTYPE_CODES)
# One rounding to the storage type, of numbers of order one, on top of arithmetic in float32.
TOLERANCES = {
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
    torch.float32: 2e-5,
    torch.float64: 1e-12,
}
EPS = 1e-3
# (outer, channels, length): planes, rows of short ones, and one slice or many of each.
SHAPES = {
    "planes": (3, 5, 50),
    "long_planes": (1, 2, 700),
    "many_planes": (600, 2, 32),
    "rows": (40, 70, 1),
    "short_planes": (9, 3, 7),
    "many_rows": (1100, 3, 2),
    "one_entry": (1, 3, 1),
    "one_plane_each": (2, 1, 33),
}


class BatchNormCall(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("outer", "channels", "length")),
        *(("dtype", c_int32), ("eps", c_double), ("relu", c_bool)),
        *(("weight", c_void_p), ("bias", c_void_p)),
    )


class Kernels:
    """The launchers; results are the same in every order of the threads."""

    def __init__(self, library: EmulatedLibrary) -> None:
        self.library = library
        self._size_of = library.function("workspace", c_int64, c_void_p)
        self._forward = library.function(
            "forward", c_int, c_void_p, c_void_p, c_bool, *[c_void_p] * 4
        )
        self._backward = library.function(
            "backward", c_int, *[c_void_p] * 5, c_bool, *[c_void_p] * 4
        )

    def _call(self, input: Tensor, affine: list[Tensor | None], relu: bool) -> BatchNormCall:
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in affine]
        return BatchNormCall(*input.shape, DTYPE_CODES[input.dtype], EPS, relu, *addresses)

    def forward(
        self,
        input: Tensor,
        affine: list[Tensor | None],
        relu: bool = True,
        given: tuple[Tensor, Tensor] | None = None,
        offset: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output, mean and variance."""
        call, source = self._call(input, affine, relu), guarded_copy(input, offset)
        size, channels = self._size_of(ctypes.byref(call)), input.shape[1]

        def run() -> list[Tensor]:
            output = GuardedTensor(input.numel(), input.dtype, offset)
            statistics = [GuardedTensor(channels, torch.float64) for _ in range(2)]
            workspace = GuardedTensor(size, torch.uint8)
            for guarded, value in zip(statistics, given or (), strict=given is not None):
                guarded.tensor.copy_(value)
            self.library.call(
                *(self._forward, ctypes.byref(call), source.tensor.data_ptr(), given is not None),
                *(one.tensor.data_ptr() for one in (*statistics, output, workspace)),
            )
            for guarded in (output, *statistics, workspace):
                guarded.check()
            return [guarded.tensor for guarded in (output, *statistics)]

        output, mean, variance = self.library.run_in_every_order(run)
        return output.view(input.shape), mean, variance

    def backward(
        self,
        gradient: Tensor,
        input: Tensor,
        affine: list[Tensor | None],
        statistics: tuple[Tensor, Tensor],
        relu: bool,
        training: bool,
        offset: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of input, weight and bias."""
        call = self._call(input, affine, relu)
        given = guarded_copy(gradient, offset), guarded_copy(input, offset)
        held = tuple(guarded_copy(value) for value in statistics)

        def run() -> list[Tensor]:
            results = [GuardedTensor(input.numel(), input.dtype, offset)]
            results += [GuardedTensor(input.shape[1], torch.float64) for _ in range(2)]
            workspace = GuardedTensor(self._size_of(ctypes.byref(call)), torch.uint8)
            self.library.call(
                *(self._backward, ctypes.byref(call)),
                *(one.tensor.data_ptr() for one in (*given, *held)),
                training,
                *(one.tensor.data_ptr() for one in (*results, workspace)),
            )
            for guarded in (*results, workspace):
                guarded.check()
            return [guarded.tensor for guarded in results]

        grad_input, *rest = self.library.run_in_every_order(run)
        return grad_input.view(input.shape), *rest


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    source = Path(__file__).parent / "batch_norm_relu_emulated.cpp"
    return Kernels(EmulatedLibrary(source, tmp_path_factory.mktemp("batch_norm_relu")))


def check_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def check(
    kernels: Kernels,
    shape: tuple[int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    relu: bool = True,
    affine: bool = True,
    given: bool = False,
    level: float = 0.0,
    offset: int = 0,
) -> None:
    """Forward and backward against float64; `level` is added to the input."""
    generator = torch.Generator().manual_seed(2)
    input, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    input = (input + level).to(dtype)
    # The sum of many products is as exact as its terms are small.
    gradient = (gradient / max(1.0, shape[0] * shape[2]) ** 0.5).to(dtype)
    noise = torch.rand(4, shape[1], generator=generator, dtype=torch.float64)
    maps: list[Tensor | None] = [noise[0] + 0.5, noise[1] - 0.5] if affine else [None, None]
    statistics = (noise[2] + level, noise[3] + 0.5) if given else None
    leaves = [input.double().requires_grad_()]
    leaves += [tensor.clone().requires_grad_() for tensor in maps if tensor is not None]
    mean, variance = statistics or (None, None)
    weight, bias = leaves[1:] if affine else (None, None)
    expected = reference(leaves[0], weight, bias, mean, variance, eps=EPS, relu=relu)
    tolerance = TOLERANCES[dtype]
    output, *found = kernels.forward(input, maps, relu, statistics, offset)
    check_close(output, expected.detach(), tolerance)
    variance, mean = torch.var_mean(input.double(), (0, 2), correction=0)
    for value, wanted in zip(found, statistics or (mean, variance), strict=True):
        check_close(value, wanted, max(1e-12, min(tolerance, 1e-5)))
    results = kernels.backward(gradient, input, maps, tuple(found), relu, not given, offset)
    wanted = torch.autograd.grad(expected, leaves, gradient.double())
    for value, one in zip(results, wanted, strict=affine):
        check_close(value, one, tolerance)


@pytest.mark.parametrize("given", [False, True], ids=["training", "given"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_shapes(kernels: Kernels, shape: tuple[int, int, int], given: bool) -> None:
    check(kernels, shape, given=given)


@pytest.mark.parametrize("shape", [(3, 4, 40), (30, 5, 3)], ids=["planes", "rows"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(kernels: Kernels, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check(kernels, shape, dtype)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_with_and_without_relu_and_affine_map(kernels: Kernels, relu: bool, affine: bool) -> None:
    check(kernels, (4, 3, 35), relu=relu, affine=affine)


@pytest.mark.parametrize("shape", [(5, 3, 41), (41, 5, 3)], ids=["planes", "rows"])
def test_misaligned_tensors(kernels: Kernels, shape: tuple[int, int, int]) -> None:
    check(kernels, shape, offset=1)


@pytest.mark.parametrize("shape", [(20, 2, 64), (700, 3, 1)], ids=["planes", "rows"])
def test_a_mean_far_above_the_deviation_costs_no_digits(
    kernels: Kernels, shape: tuple[int, int, int]
) -> None:
    check(kernels, shape, level=1000.0)


def test_no_entries_have_zero_statistics_and_gradients(kernels: Kernels) -> None:
    empty = torch.empty(0, 3, 40)
    _, mean, variance = kernels.forward(empty, [None, None])
    assert mean.tolist() == variance.tolist() == [0, 0, 0]
    _, grad_weight, grad_bias = kernels.backward(
        empty, empty, [None, None], (mean, variance), True, True
    )
    assert grad_weight.tolist() == grad_bias.tolist() == [0, 0, 0]
