"""The roofs of this CPU: multiply-adds of one core, fed from registers, L1, L2, L3 and memory.

A panel product makes one multiply-add per vector of activations that it loads, so that the level
which holds the activation panel bounds its rate on the kept weights. Two flops per float read.
The kernel is compiled by the system's C++ compiler for this machine, `benchmarks/roofline.cpp`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Call, Case, Provider, UnavailableError

SOURCE = Path(__file__).with_name("roofline.cpp")
# Half a usual L1 or L2, a quarter of a usual L3, and more than any cache.
KIBIBYTES = {"L1": 16, "L2": 256, "L3": 8 << 10, "DRAM": 256 << 10}
FLOATS_PER_CALL = 1 << 24
REGISTER_STEPS = 1 << 16
STEP = 192


@functools.cache
def library() -> ctypes.CDLL:
    """Compile and load the kernels.

    Raises:
        UnavailableError: there is no compiler, or it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise UnavailableError("no C++ compiler is found; set CXX")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "roofline.so"
        options = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        command = [compiler, *options, str(SOURCE), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnavailableError(f"{compiler} failed: {done.stderr.strip()[-200:]}")
        loaded = ctypes.CDLL(str(target))
    loaded.roofline_registers.restype = loaded.roofline_loads.restype = ctypes.c_float
    loaded.roofline_step.restype = ctypes.c_int64
    return loaded


def _floats(level: str) -> int:
    return KIBIBYTES[level] * 256 // STEP * STEP


def _inputs(level: str, generator: torch.Generator, device: torch.device) -> tuple[Tensor]:
    """Integers, whose float sums are exact."""
    size = STEP if level == "registers" else _floats(level)
    return (torch.randint(-1, 2, (size,), generator=generator).float().to(device),)


def _passes(level: str) -> int:
    return max(1, FLOATS_PER_CALL // _floats(level))


def _fma(case: Case, data: Tensor) -> Call:
    if data.is_cuda:
        raise UnavailableError("the roofs of a CPU")
    kernels = library()
    if case.shape == "registers":
        factor, steps = ctypes.c_float(1.0), ctypes.c_int64(REGISTER_STEPS)
        unit = kernels.roofline_step()
        return lambda: torch.tensor([kernels.roofline_registers(factor, steps) / unit])
    passes = _passes(case.shape)
    arguments = (
        ctypes.c_void_p(data.data_ptr()),
        ctypes.c_int64(data.numel()),
        ctypes.c_float(1.0),
        ctypes.c_int64(passes),
    )
    return lambda: torch.tensor([kernels.roofline_loads(*arguments) / passes + 0 * data[0]])


def _expected(level: str, data: Tensor) -> Tensor:
    return torch.ones(1) if level == "registers" else data.double().sum()[None]


def _case(level: str) -> Case:
    if level == "registers":
        work = 2.0 * REGISTER_STEPS * _step()
    else:
        work = 2.0 * _floats(level) * _passes(level)
    return Case(
        op="roofline",
        mode="multiply_add",
        shape=level,
        dtype=torch.float32,
        inputs=partial(_inputs, level),
        expected=partial(_expected, level),
        work=work,
        unit="GF/s",
    )


def _step() -> int:
    try:
        return int(library().roofline_step())
    except UnavailableError:
        return STEP


PROVIDERS = [Provider("one core", _fma)]


def run(argv: Sequence[str] | None = None) -> list[harness.results.Row]:
    """Measure and print; see `--help`."""
    cases = [_case(level) for level in ("registers", *KIBIBYTES)]
    return harness.main(cases, PROVIDERS, cases, argv)


if __name__ == "__main__":
    run()
