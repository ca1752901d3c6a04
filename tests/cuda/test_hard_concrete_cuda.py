"""The CUDA kernels of hard_concrete, run on the CPU by the emulation, against float64 formulas."""

import ctypes
from ctypes import c_double, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda_emulation.library import (
    EmulatedLibrary,
    EmulationError,
    GuardedTensor,
    guarded_copy,
    same_bits,
)
from tscnc_kernels.ops.hard_concrete import reference, reference_backward

DTYPE_CODES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}
DTYPES = list(DTYPE_CODES)
# One rounding to the storage type, of numbers of order one, on top of arithmetic in float32.
TOLERANCES = {
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
    torch.float32: 1e-6,
    torch.float64: 1e-14,
}
CONSTANTS = {"beta": 2 / 3, "gamma": -0.1, "zeta": 1.1}
# Around the sizes of a pack and of a block's share (2048 float32 elements), and nothing at all.
SIZES = [0, 1, 7, 8, 2049, 4100]


class GateCall(ctypes.Structure):
    _fields_ = (
        *(("log_alpha", c_void_p), ("uniform", c_void_p), ("count", c_int64), ("dtype", c_int32)),
        *((name, c_double) for name in CONSTANTS),
    )


class Kernels:
    """The launchers; results are the same in every order of the threads."""

    def __init__(self, library: EmulatedLibrary) -> None:
        self.library = library

    def __call__(
        self, log_alpha: Tensor, uniform: Tensor | None, *grad_output: Tensor, offset: int = 0
    ) -> Tensor:
        """The gates, or with `grad_output` the gradient of log_alpha."""
        name = "hard_concrete_backward" if grad_output else "hard_concrete"
        given = [t for t in (log_alpha, uniform, *grad_output) if t is not None]
        held = [guarded_copy(tensor, offset) for tensor in given]
        call = GateCall(
            held[0].tensor.data_ptr(),
            None if uniform is None else held[1].tensor.data_ptr(),
            *(log_alpha.numel(), DTYPE_CODES[log_alpha.dtype], *CONSTANTS.values()),
        )
        scale = [held[-1].tensor.data_ptr()] if grad_output else []
        run = self.library.function(name, c_int, *[c_void_p] * (2 + len(scale)))

        def results() -> list[Tensor]:
            result = GuardedTensor(log_alpha.numel(), log_alpha.dtype, offset)
            self.library.call(run, ctypes.byref(call), *scale, result.tensor.data_ptr())
            result.check()
            return [result.tensor]

        (result,) = self.library.run_in_every_order(results)
        for copy, tensor in zip(held, given, strict=True):
            assert same_bits(copy.tensor, tensor)
        return result


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    source = Path(__file__).parent / "hard_concrete_emulated.cpp"
    return Kernels(EmulatedLibrary(source, tmp_path_factory.mktemp("hard_concrete")))


def random_gates(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """log_alpha, noise and the gradient of the gates, of which some are clipped."""
    generator = torch.Generator().manual_seed(size)
    log_alpha, gradient = (torch.randn(size, generator=generator) for _ in range(2))
    uniform = torch.rand(size, generator=generator) * 0.98 + 0.01
    return (2 * log_alpha).to(dtype), uniform.to(dtype), gradient.to(dtype)


def check_gates(kernels: Kernels, size: int, dtype: torch.dtype, noisy: bool, offset: int) -> None:
    log_alpha, noise, gradient = random_gates(size, dtype)
    uniform = noise if noisy else None
    exact = [None if t is None else t.double() for t in (log_alpha, uniform, gradient)]
    tolerance = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
    expected = reference(exact[0], exact[1], **CONSTANTS)
    found = kernels(log_alpha, uniform, offset=offset)
    torch.testing.assert_close(found.double(), expected, **tolerance)
    # Near its clipping points a gate may be on either side of them.
    is_clipped = (expected == 0) | (expected == 1)
    is_clear = (expected > 1e-4) & (expected < 1 - 1e-4)
    inner = is_clipped | is_clear
    slope = reference_backward(exact[2], exact[0], exact[1], *CONSTANTS.values())
    found = kernels(log_alpha, uniform, gradient, offset=offset)
    wider = {"rtol": 4 * TOLERANCES[dtype], "atol": 4 * TOLERANCES[dtype]}
    torch.testing.assert_close(found.double()[inner], slope[inner], **wider)


@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_and_gradients(kernels: Kernels, dtype: torch.dtype, noisy: bool) -> None:
    check_gates(kernels, 300, dtype, noisy, 0)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_misaligned_arrays(kernels: Kernels, size: int, offset: int) -> None:
    check_gates(kernels, size, torch.float32, True, offset)


def test_every_case_of_the_noise_and_of_log_alpha(kernels: Kernels) -> None:
    ends = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5, 0.5, 0.5])
    log_alpha = torch.tensor([9.0, -9.0, torch.inf, -torch.inf, torch.inf, -torch.inf, torch.nan])
    gates = kernels(log_alpha, ends)
    expected = reference(log_alpha.double(), ends.double(), **CONSTANTS)
    torch.testing.assert_close(gates.double(), expected, equal_nan=True, rtol=0, atol=0)
    assert gates.tolist()[:6] == [0, 1, 1, 0, 1, 0]
    gradient = kernels(log_alpha, ends, torch.ones(7))
    assert gradient.tolist()[:6] == [0] * 6
    assert kernels(torch.zeros(1), torch.full((1,), 1.5)).isnan().all()


def test_unknown_dtype_code_is_an_error(kernels: Kernels) -> None:
    run = kernels.library.function("hard_concrete", c_int, c_void_p, c_void_p)
    call = GateCall(None, None, 0, 99, 1.0, -0.1, 1.1)
    with pytest.raises(EmulationError, match="cudaError 1"):
        kernels.library.call(run, ctypes.byref(call), None)
