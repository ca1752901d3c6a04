"""Builds CUDA sources with a plain C++ compiler and runs them on the CPU (see fibers.h)."""

import ctypes
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

EMULATION = Path(__file__).resolve().parent
CSRC = EMULATION.parent.parent / "csrc"
# Shared memory is thread-local storage: every library has its own, which no constructor fills.
FLAGS = [
    *("-x", "c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing"),
    # Fibers jump between stacks, which the fortified longjmp takes for an error.
    *("-fno-gnu-unique", "-fno-extern-tls-init", "-U_FORTIFY_SOURCE"),
    *("-fsanitize=alignment,bounds", "-Wl,--as-needed"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
]

# The lowest thread first, the highest thread first, and two random orders.
ORDERS = (0, 1, 2, 3)

GUARD_BYTES = 256


class EmulationError(RuntimeError):
    """A launch that failed: a block whose threads wait for each other, or a wrong configuration."""


class EmulatedLibrary:
    """A CUDA source with a C interface, built for the CPU and loaded.

    Functions of the source that return `cudaError_t` raise EmulationError through `call`.
    """

    def __init__(self, source: Path, folder: Path) -> None:
        path = folder / f"{source.stem}.so"
        includes = [f"-I{EMULATION}", f"-I{CSRC}"]
        command = [os.environ.get("CXX", "g++"), *FLAGS, *includes, str(source), "-o", str(path)]
        build = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if build.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{build.stderr}")
        self._library = ctypes.CDLL(str(path))
        self._library.emulation_error.restype = ctypes.c_char_p

    def function(self, name: str, result: type, *arguments: type) -> Callable[..., int]:
        """The C function of this name with its ctypes signature."""
        function = getattr(self._library, name)
        function.restype, function.argtypes = result, arguments
        return function

    def call(self, function: Callable[..., int], *arguments: object) -> None:
        """Calls a function that returns `cudaError_t`, and raises if it reports an error."""
        code = function(*arguments)
        if code:
            message = self._library.emulation_error().decode()
            raise EmulationError(f"cudaError {code}: {message}")

    def run_in_every_order(self, run: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Results of `run`, after checking that no order of threads and blocks changes a bit."""
        results = []
        for order in ORDERS:
            self._library.emulation_set_order(order)
            results.append(run())
        for order, result in zip(ORDERS, results, strict=True):
            for first, other in zip(results[0], result, strict=True):
                if not same_bits(first, other):
                    raise AssertionError(f"thread order {order} changes the result: a race")
        return results[0]


class GuardedTensor:
    """A tensor between two guard zones of 0xff bytes, NaN for whoever reads there.

    Args:
        numel: number of elements.
        dtype: element type.
        offset: elements by which the tensor misses 256-byte alignment.
    """

    def __init__(self, numel: int, dtype: torch.dtype, offset: int = 0) -> None:
        size = numel * dtype.itemsize
        self._begin = GUARD_BYTES + offset * dtype.itemsize
        self._end = self._begin + size
        # Over-allocated, because torch promises less alignment than the guards are wide.
        storage = torch.full((self._end + 2 * GUARD_BYTES,), 0xFF, dtype=torch.uint8)
        shift = -storage.data_ptr() % GUARD_BYTES
        self._storage = storage[shift : shift + self._end + GUARD_BYTES]
        self.tensor = self._storage[self._begin : self._end].view(dtype)

    def check(self) -> None:
        """Raises if anything was written into a guard zone."""
        guards = torch.cat((self._storage[: self._begin], self._storage[self._end :]))
        if not bool((guards == 0xFF).all()):
            raise AssertionError("the kernel wrote outside of its output")


def guarded_copy(source: Tensor, offset: int = 0) -> GuardedTensor:
    """A guarded tensor with the elements of `source`, flattened."""
    guarded = GuardedTensor(source.numel(), source.dtype, offset)
    guarded.tensor.copy_(source.reshape(-1))
    return guarded


def pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """A C array of the tensors' addresses."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same bytes: a NaN equals itself, and -0 differs from 0."""
    return torch.equal(
        *(tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (first, second))
    )
