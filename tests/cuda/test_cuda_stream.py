"""Torch's current stream is found in a locally loaded libtorch_cuda.so; its absence is named."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.cuda_emulation.library import CSRC, EMULATION

MAIN = Path(__file__).parent / "cuda_stream_main.cpp"
# Stands in for torch's library: stream 100 + device; device 3 is an error.
WITH_FUNCTION = """
extern "C" int aoti_torch_get_current_cuda_stream(int device, void** stream) {
  *stream = reinterpret_cast<void*>(100L + device);
  return device == 3;
}
"""


def compile_cpp(*arguments: object) -> None:
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O0", *map(str, arguments), "-ldl"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "main"
    flags = ("-fno-extern-tls-init", f"-I{EMULATION}", f"-I{CSRC}")
    compile_cpp(*flags, MAIN, "-o", path)
    return path


def run(program: Path, library_source: str | None) -> list[str]:
    command = [str(program)]
    if library_source is not None:
        source = program.parent / "library.cpp"
        library = program.parent / "libtorch_cuda.so"
        source.write_text(library_source)
        compile_cpp("-shared", "-fPIC", source, "-Wl,-soname,libtorch_cuda.so", "-o", library)
        command.append(str(library))
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()


def test_stream_comes_from_the_loaded_library(program: Path) -> None:
    assert run(program, WITH_FUNCTION) == [
        "stream 100",
        "tscnc_kernels: torch gives no current stream for CUDA device 3",
    ]


def test_cpu_torch_is_named(program: Path) -> None:
    (message, _) = run(program, None)
    assert "libtorch_cuda.so is not loaded; expected a CUDA build of torch" in message


def test_torch_without_the_function_is_named(program: Path) -> None:
    (message, _) = run(program, "int unrelated;")
    assert "has no aoti_torch_get_current_cuda_stream; expected torch 2.11 or later" in message
