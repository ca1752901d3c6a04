"""The driver of `make gpu`: steps that fail, hang or are interrupted leave a summary behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import ROOT, Outcome, Results, Step, run_step, run_steps

MACHINE = {"GPU": "Test GPU"}


def python(name: str, code: str, limit_s: float = 60.0) -> Step:
    return Step(name, (sys.executable, "-c", code), limit_s)


def run(folder: Path, steps: list[Step], *, seconds: float = 60.0, sources: str = "s") -> Results:
    results = Results(folder, MACHINE, fresh=False)
    results.steps = steps
    run_steps(results, time.monotonic() + seconds, sources)
    return results


def statuses(results: Results) -> list[str]:
    return [status for _, status, _, _ in results.rows()]


def counting(folder: Path, name: str) -> Step:
    """A step that adds a line to a file whenever it runs."""
    return python(name, f"open({str(folder / name)!r}, 'a').write('ran\\n')")


def is_running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_failing_step_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    steps = [python("breaks", "print('why'); raise SystemExit(3)"), counting(tmp_path, "after")]
    results = run(tmp_path, steps)
    assert statuses(results) == ["failed", "passed"]
    summary = (tmp_path / "summary.md").read_text()
    assert "1 of 2 steps passed" in summary
    assert "## breaks: failed" in summary
    assert "why" in summary


def test_nothing_runs_without_a_working_build(tmp_path: Path) -> None:
    results = run(tmp_path, [python("build", "import not_there"), counting(tmp_path, "after")])
    assert statuses(results) == ["failed", "not reached"]


def test_a_step_beyond_its_limit_is_ended_with_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = "import subprocess, sys; p = subprocess.Popen(['sleep', '100'])"
    code = f"{child}; open({str(pid_file)!r}, 'w').write(str(p.pid)); p.wait()"
    outcome = run_step(python("hangs", code, limit_s=3), 60, "s")
    assert outcome.status == "timed out"
    child_pid = pid_file.read_text()
    deadline = time.monotonic() + 20
    while is_running(child_pid) and time.monotonic() < deadline:
        time.sleep(0.02)  # the kernel delivers SIGKILL after killpg has returned
    assert not is_running(child_pid)


def test_a_second_run_does_only_what_has_not_passed(tmp_path: Path) -> None:
    steps = [counting(tmp_path, "first"), python("second", "raise SystemExit(1)")]
    run(tmp_path, steps)
    results = run(tmp_path, [steps[0], counting(tmp_path, "second")])
    assert statuses(results) == ["passed", "passed"]
    assert (tmp_path / "first").read_text() == "ran\n"


def test_changed_sources_run_again(tmp_path: Path) -> None:
    run(tmp_path, [counting(tmp_path, "step")], sources="old")
    run(tmp_path, [counting(tmp_path, "step")], sources="new")
    assert (tmp_path / "step").read_text() == "ran\nran\n"


def test_steps_without_time_are_summarised_as_not_reached(tmp_path: Path) -> None:
    run(tmp_path, [counting(tmp_path, "step")], seconds=0)
    assert not (tmp_path / "step").exists()
    assert "| step | **not reached** |" in (tmp_path / "summary.md").read_text()


def test_benchmark_tables_are_part_of_the_summary(tmp_path: Path) -> None:
    header = "op,backend,mode,shape,dtype,sparsity,p50,p20,p80,rate,unit"
    row = "my_op,native,forward,4096|1,float32,0.9,0.5,0.4,0.6,77,GB/s"
    (tmp_path / "my_op.csv").write_text(f"{header}\n{row}\n")
    Results(tmp_path, MACHINE, fresh=True).write()
    expected = "| native | forward | 4096/1 | float32 | 0.9 | 0.5 | 77 | GB/s |"
    assert expected in (tmp_path / "summary.md").read_text()


def test_last_line_of_the_output_skips_decoration() -> None:
    assert Outcome("passed", 1.0, "one\n== 3 passed ==\n====\n\n", "s").last_line == "3 passed"


INTERRUPTED = """
import sys
from pathlib import Path
from benchmarks import gpu

waiting = f"open({sys.argv[1] + '/up'!r}, 'w').close(); import time; time.sleep(60)"
gpu.describe_machine = dict
gpu.results_folder = lambda: Path(sys.argv[1])
gpu.build_step = lambda: gpu.Step("waits", (sys.executable, "-c", waiting))
sys.exit(gpu.main([]))
"""


def test_an_interrupted_run_leaves_its_summary(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "**interrupted**" in (tmp_path / "summary.md").read_text()
