"""The compiled library: what it says of itself, and what it says when missing, stale or misused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tscnc_kernels
from tests.conftest import runnable_isas
from tscnc_kernels import _backend

PACKAGE = Path(tscnc_kernels.__file__).resolve().parent
LIBRARY = Path(tscnc_kernels._build.C.__file__)
SOURCES = PACKAGE.parent / "csrc"
USE = "import torch, tscnc_kernels as t; print(t.build_info()['active_isa'])"


def run(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TSCNC_")}
    clean["PYTHONPATH"] = str(cwd)
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**clean, **environment},
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the package beside its sources, as in a source checkout."""
    if not SOURCES.is_dir():
        pytest.skip("not a source checkout")
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(PACKAGE, tmp_path / "tscnc_kernels", ignore=ignore)
    shutil.copytree(SOURCES, tmp_path / "csrc")
    shutil.copy(LIBRARY, tmp_path / "tscnc_kernels")
    return tmp_path


def test_build_info_names_instruction_sets_and_cuda():
    info = tscnc_kernels.build_info()
    assert info["cpu_isas"][0] == "portable"
    assert info["active_isa"] in info["cpu_isas"]
    assert info["torch_stable_abi"] == "2.11"
    assert info["cuda_archs"] is None or all(
        arch.startswith(("sm_", "compute_")) for arch in info["cuda_archs"]
    )
    assert tscnc_kernels.__version__ == info["version"]


@pytest.mark.parametrize(
    "op",
    [
        *("transformed_l1", "transformed_l1_backward", "masked_linear", "masked_linear_backward"),
        *("hard_concrete", "hard_concrete_backward", "masked_sgd_step", "masked_adamw_step"),
        *("sparsity_pack", "sparsity_build", "masked_conv2d", "masked_conv2d_backward"),
        *("batch_norm_relu", "batch_norm_relu_backward", "masked_linear_bitmap"),
        *("extreme_singular_values", "extreme_singular_values_backward"),
        *("extreme_singular_values_small", "extreme_singular_values_warm"),
    ],
)
def test_cuda_kernels_are_registered_exactly_if_they_were_compiled(op):
    has = torch._C._dispatch_has_kernel_for_dispatch_key(f"tscnc_kernels::{op}", "CUDA")
    assert has == (tscnc_kernels.build_info()["cuda_archs"] is not None)


@pytest.mark.parametrize("isa", runnable_isas())
def test_environment_lowers_the_instruction_set(checkout, isa):
    result = run(USE, checkout, TSCNC_ISA=isa)
    assert result.stdout.strip() == isa, result.stderr


def test_an_instruction_set_of_another_cpu_is_an_import_error(checkout):
    others = set(tscnc_kernels.build_info()["cpu_isas"]) - set(runnable_isas())
    if not others:
        pytest.skip("this CPU runs every compiled instruction set")
    for isa in others:
        result = run(USE, checkout, TSCNC_ISA=isa)
        assert result.returncode == 1
        assert f"this CPU does not run '{isa}', its best is '" in result.stderr


def test_unknown_instruction_set_is_an_import_error(checkout):
    result = run(USE, checkout, TSCNC_ISA="sse9")
    assert result.returncode == 1
    assert "got 'sse9'" in result.stderr


def test_missing_library_names_the_command(checkout):
    (checkout / "tscnc_kernels" / LIBRARY.name).unlink()
    result = run(USE, checkout)
    assert "ImportError" in result.stderr
    assert f"cd {checkout} && python setup.py build_ext --inplace" in result.stderr


def test_stale_library_names_the_command(checkout):
    source = next((checkout / "csrc").glob("*.cpp"))
    source.write_text(source.read_text() + "\n")
    result = run(USE, checkout)
    assert "ImportError" in result.stderr and "is stale" in result.stderr
    assert "python setup.py build_ext --inplace" in result.stderr


def test_backend_from_the_environment(checkout):
    code = "import torch, tscnc_kernels as t; t.transformed_l1([torch.ones(2)])"
    assert run(code, checkout, TSCNC_BACKEND="reference").returncode == 0
    result = run(code, checkout, TSCNC_BACKEND="fastest")
    assert "expected backend to be one of native, triton, reference, got 'fastest'" in result.stderr


def test_use_backend_returns_to_the_previous_choice():
    with tscnc_kernels.use_backend("reference"):
        assert _backend.select("transformed_l1", torch.device("cpu")) == "reference"
    assert _backend.select("transformed_l1", torch.device("cpu")) == "native"
    with pytest.raises(RuntimeError, match="got 'gpu'"):
        tscnc_kernels.use_backend("gpu")


def test_available_backends_knows_its_ops():
    assert "reference" in tscnc_kernels.available_backends("transformed_l1")
    with pytest.raises(ValueError, match="got 'transformed_l2'"):
        tscnc_kernels.available_backends("transformed_l2")


def test_setup_rejects_bad_settings(tmp_path):
    setup = SOURCES.parent / "setup.py"
    if not setup.exists():
        pytest.skip("not a source checkout")
    for name, value in (("TSCNC_WITH_CUDA", "yes"), ("TORCH_CUDA_ARCH_LIST", "hopper")):
        code = "from setup import find_nvcc, cuda_architectures as c; find_nvcc(); c()"
        stub = "import setuptools; setuptools.setup = lambda **_: None; "
        result = subprocess.run(
            [sys.executable, "-c", stub + code],
            capture_output=True,
            text=True,
            cwd=setup.parent,
            env={**os.environ, name: value},
        )
        assert result.returncode == 1 and f"got '{value}'" in result.stderr


FAKE_COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in
    -I*) [ -d "${1#-I}" ] || { echo "no folder ${1#-I}" >&2; exit 1; } ;;
    *.cpp) [ -f "$1" ] || { echo "no file $1" >&2; exit 1; } ;;
    -o) shift; : > "$1" ;;
  esac
  shift
done
"""


def test_a_checkout_whose_path_holds_a_space_builds(tmp_path):
    if not (SOURCES.parent / "setup.py").exists():
        pytest.skip("not a source checkout")
    root = tmp_path / "my projects"
    shutil.copytree(SOURCES, root / "csrc")
    (root / "tscnc_kernels").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(SOURCES.parent / name, root)
    compiler = tmp_path / "compiler"
    compiler.write_text(FAKE_COMPILER)
    compiler.chmod(0o755)
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "CXX": str(compiler), "TSCNC_WITH_CUDA": "0"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(list((root / "tscnc_kernels").glob("_C.*"))) == 1
