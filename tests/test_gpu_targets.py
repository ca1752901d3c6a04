"""The table of reached/target in the summary of `make gpu`."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import gpu_targets, masked_linear_gpu, results
from benchmarks.bench_masked_linear import case
from benchmarks.gpu import Results
from benchmarks.gpu_targets import SQUARE, TARGETS, reached

ROW = results.Row(
    *("masked_linear", "F.linear", "forward_backward", SQUARE, "bfloat16", 0.99),
    *(4.0, 4.0, 4.0, 1.0, "GF/s", 0.0, "test-gpu", 1, "", "", "", "", ""),
)


def rows() -> list[results.Row]:
    ours = [
        replace(ROW, backend=name, p50=ms)
        for name, ms in (("ours, values", 1.6), ("ours, dense weight", 2.0), ("ours, panel", 1.0))
    ]
    return [ROW, *ours, replace(ROW, p50=50.0, dtype="float32"), replace(ROW, sparsity=0.999)]


def test_the_fastest_of_ours_counts_and_other_cases_do_not() -> None:
    target = TARGETS[0]
    assert reached(target, 0.99, rows()) == pytest.approx(2.5)
    assert reached(target, 0.999, rows()) is None
    assert reached(target, 0.98, rows()) is None


def test_cells_say_what_is_reached_missed_and_missing(tmp_path: Path) -> None:
    slow = [replace(row, sparsity=0.98) for row in rows()[:2]]
    slow[1] = replace(slow[1], p50=4.0)
    results.write_table(tmp_path / "masked_linear.csv", [*rows(), *slow], results.Row)
    line = next(line for line in gpu_targets.table(tmp_path) if "| dense | 4096" in line)
    assert "| 1.00/1.2! | 2.50/2.2 | missing/4 | missing/7 |" in line


def test_the_summary_of_a_gpu_has_the_table(tmp_path: Path) -> None:
    results.write_table(tmp_path / "masked_linear.csv", rows(), results.Row)
    Results(tmp_path, {"GPU": "Test GPU"}, fresh=True).write()
    assert "2.50/2.2" in (tmp_path / "summary.md").read_text()
    Results(tmp_path, {}, fresh=True).write()
    assert "2.50/2.2" not in (tmp_path / "summary.md").read_text()


def test_every_target_is_among_the_cases_that_are_measured() -> None:
    measured = {
        (found.shape, str(found.dtype).removeprefix("torch."), found.mode, found.sparsity)
        for found in masked_linear_gpu.cases(case)
    }
    providers = {provider.name for provider in masked_linear_gpu.PROVIDERS}
    for target in TARGETS:
        assert {target.peer, *target.ours} <= providers
        for sparsity in target.wanted:
            assert (target.shape, target.dtype, target.mode, sparsity) in measured, target
