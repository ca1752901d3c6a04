"""Poisoned allocations, fixed seeds, and CPU kernels of every instruction set."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Tests of the tuner switch it on; all others want the same algorithms on every machine.
os.environ.setdefault("TSCNC_AUTOTUNE", "off")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import tscnc_kernels
from tests.interpreter import mend
from tscnc_kernels import _autotune
from tscnc_kernels._build import C

mend()


@pytest.fixture(autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """Torch fills what torch.empty returns, in C++ too, with NaN: unwritten outputs fail."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(20250326)


@pytest.fixture
def tuner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A tuner that measures everything, with a file of its own, and as in a new process."""
    monkeypatch.setenv("TSCNC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(_autotune.state, "mode", "on")
    monkeypatch.setattr(_autotune, "WORTH", 0.0)
    _autotune.state.forget()
    yield
    _autotune.state.forget()


def runnable_isas() -> list[str]:
    """Instruction sets that are compiled in and that this CPU runs."""
    compiled = tscnc_kernels.build_info()["cpu_isas"]
    best = C.active_isa()
    return compiled[: compiled.index(best) + 1]


@pytest.fixture(params=runnable_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once per instruction set."""
    previous = C.active_isa()
    C.set_isa(request.param)
    yield request.param
    C.set_isa(previous)
