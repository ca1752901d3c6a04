"""Every GPU kernel, compiled for GPUs that are not here: no spills and the loads that are meant."""

import fcntl
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compile_report

ROOT = Path(__file__).resolve().parent.parent
TRITON_FILES = sorted(
    module.name
    for module in pkgutil.iter_modules([str(ROOT / "tscnc_kernels/triton")])
    if not module.name.startswith("_")
)
CUDA_FILES = sorted(path.name for path in (ROOT / "csrc/cuda").glob("*.cu"))

# Kernels (by source and a pattern of the name) and the instructions that they must contain.
INSTRUCTIONS = [
    ("transformed_l1.cu", r"transformed_l1_kernel<float, true, false>", ["LDG.E.128"]),
    ("transformed_l1.cu", r"transformed_l1_kernel<float, .*, true>", ["LDG.E.128", "STG.E.128"]),
    ("transformed_l1.cu", r"transformed_l1_kernel<__nv_bfloat16, .*", ["LDG.E.128"]),
    ("masked_linear.cu", r"panel_product_kernel<.*", ["LDG.E.128", "LDS.128", "STS.128"]),
    ("masked_linear_weight_gradient.cu", r"weight_gradient_kernel<.*", ["LDS.128", "STS.128"]),
    ("masked_linear_small.cu", r"small_product_kernel<float, .*", ["LDG.E.128"]),
    ("masked_linear_small.cu", r"small_product_kernel<__nv_bfloat16, .*", ["LDG.E.128"]),
    ("masked_linear_small.cu", r"small_product_kernel<__half, unsigned short, .*", ["LDG.E.128"]),
    ("masked_linear_bitmap.cu", r"bitmap_.*", ["LDGSTS.E.BYPASS.128"]),
    ("masked_linear_bitmap.cu", r"bitmap_product_kernel<float, .*", ["LDS.128"]),
    ("masked_linear_bitmap.cu", r"bitmap_product_kernel<__.*", ["HMMA.16816.F32", "LDG.E.64"]),
    ("hard_concrete.cu", r"map_kernel<.*", ["LDG.E.128", "STG.E.128"]),
    ("batch_norm_relu.cu", r"apply_kernel<.*", ["LDG.E.128", "STG.E.128"]),
    ("masked_conv2d.cu", r"gather_product_kernel<(float|__.*)>", ["LDG.E.128"]),
    ("extreme_singular_values.cu", r"extreme_singular_values_kernel", ["LDS.128"]),
    ("sparsity_values.cu", r"mask_kernel<.*", ["LDG.E.128", "STG.E.128"]),
    ("triton/masked_linear.py", r".*\[bf16.*", ["LDGSTS"]),
    ("triton/block_sparse.py", r".*", ["LDGSTS"]),
    ("triton/block_sparse.py", r".*(SAMPLES|SIDE)=(64|128).*", ["LDGSTS.E.BYPASS.128"]),
    ("triton/gram_iteration.py", r".*", ["LDGSTS.E.BYPASS.128", "DMMA"]),
    ("triton/gated_transformed_l1.py", r".*IS_ALIGNED.*", ["LDG.E.128"]),
    ("triton/gated_transformed_l1.py", r".*gradient.*IS_ALIGNED.*", ["STG.E.128"]),
    ("triton/transformed_l1.py", r"transformed_l1_kernel\[.*", ["LDG.E.128"]),
    ("triton/transformed_l1.py", r".*WITH_GRADIENT.*", ["STG.E.128"]),
]


def compile_all(path: Path) -> None:
    """Runs the report in a process without the interpreter."""
    command = [sys.executable, "-m", "benchmarks.compile_report", "--json", str(path)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert path.exists(), f"the report failed:\n{run.stderr}"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `python -m benchmarks.compile_report` finds."""
    run_id = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    folder = tmp_path_factory.getbasetemp()
    # The workers of a parallel run share one report: the first one makes it, the others wait.
    path = folder.parent / f"compile-{run_id}.json" if run_id else folder / "compile.json"
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            compile_all(path)
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def rows_of(report: dict[str, Any], source: str) -> list[dict[str, Any]]:
    rows = [row for row in report["rows"] if row["source"] == source]
    if not rows:
        reasons = [
            note for note in report["notes"] if source.startswith("triton") == ("triton" in note)
        ]
        assert reasons, f"nothing was compiled from {source}"
        pytest.skip(reasons[0])
    return rows


def test_no_kernel_spills_registers(report: dict[str, Any]) -> None:
    assert [row for row in report["rows"] if row["spill_bytes"]] == []


def is_distinct(row: dict[str, Any]) -> bool:
    """Whether a kernel is compiled for every architecture, see `compile_report.archs_for`."""
    return not row["source"].startswith("triton") or compile_report.is_distinct(row["kernel"])


@pytest.mark.parametrize("source", [f"triton/{name}.py" for name in TRITON_FILES] + CUDA_FILES)
def test_every_source_is_compiled_for_every_architecture(
    report: dict[str, Any], source: str
) -> None:
    rows = rows_of(report, source)
    every, newest = compile_report.ARCHITECTURES, compile_report.ARCHITECTURES[-1:]
    assert {(row["kernel"], row["arch"]) for row in rows} == {
        (row["kernel"], arch) for row in rows for arch in (every if is_distinct(row) else newest)
    }
    assert all(0 < row["registers"] <= 255 for row in rows)


@pytest.mark.parametrize(("source", "pattern", "instructions"), INSTRUCTIONS)
def test_kernels_contain_the_instructions_meant(
    report: dict[str, Any], source: str, pattern: str, instructions: list[str]
) -> None:
    if compile_report.find_tool("cuobjdump") is None:
        pytest.skip("cuobjdump was not found")
    rows = [row for row in rows_of(report, source) if re.fullmatch(pattern, row["kernel"])]
    assert rows, f"no kernel of {source} matches {pattern}"
    for row in rows:
        for instruction in instructions:
            found = row["instructions"]
            assert any(opcode.startswith(instruction) for opcode in found), (row["kernel"], found)


@pytest.mark.parametrize("name", ["masked_linear", "block_sparse"])
def test_half_precision_products_use_the_tensor_cores_of_their_architecture(
    report: dict[str, Any], name: str
) -> None:
    if compile_report.find_tool("cuobjdump") is None:
        pytest.skip("cuobjdump was not found")
    for row in rows_of(report, f"triton/{name}.py"):
        if "[bf16" in row["kernel"]:
            # The instruction of sm_90 has 64 rows at least; tiles of fewer take the older one.
            is_low = re.search(r"product.*SAMPLES=16,|SIDE=(16|32),", row["kernel"])
            wanted = "HGMMA" if row["arch"] == 90 and not is_low else "HMMA"
            assert any(opcode.startswith(wanted) for opcode in row["instructions"]), row


def test_kernels_fit_into_the_shared_memory_of_their_architecture(report: dict[str, Any]) -> None:
    # KiB that a block may use on an A100 and an H100.
    limits = {80: 163, 90: 227}
    for row in report["rows"]:
        limit = limits[row["arch"]] if is_distinct(row) else min(limits.values())
        assert row["shared_bytes"] <= 1024 * limit, row


def test_spills_in_the_assembler_log_are_counted() -> None:
    log = """
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size, 64 bytes smem
"""
    assert compile_report.parse_ptxas(log) == {
        ("kernel", 90): compile_report.Usage(
            registers=255, shared_bytes=64, stack_bytes=24, spill_bytes=36
        )
    }
