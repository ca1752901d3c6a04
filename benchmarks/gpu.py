"""From a GPU to tested, measured, committed results, in one command that may be interrupted.

    python -m benchmarks.gpu [--minutes 8] [--fresh]

Checks the build, runs on a GPU the suite of every op on CUDA, its benchmarks, and compute-sanitizer
where it is installed, and compiles every kernel ahead of time. What every step gave is kept in
`benchmarks/results/<gpu>/state.json`: a second run goes on with the steps that have not passed with
the present sources. `summary.md` is written after every step, so that it is there when time runs
out. Without a GPU only the steps that need none are run, and their summary is in `build/gpu`.
"""

import argparse
import csv
import dataclasses
import datetime
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import gpu_targets

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("csrc", "tscnc_kernels", "tests", "benchmarks")
SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh"}
KEPT_LINES = 25
NO_TESTS_COLLECTED = 5
BUILD = "build"
# Every tensor its own allocation, so that the sanitizer sees an access beyond its end.
UNCACHED = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
# Of a results file, the columns that the summary shows; p50 is in milliseconds.
COLUMNS = ("backend", "mode", "shape", "dtype", "sparsity", "p50", "rate", "unit")


@dataclasses.dataclass(frozen=True)
class Step:
    """A command that passes if its exit status is 0.

    limit_s: seconds after which it counts as timed out, so that one step cannot eat the run.
    variables: environment variables and their values.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float = 150.0
    variables: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """status: "passed", "failed", "timed out" or "interrupted"; output: its last lines."""

    status: str
    seconds: float
    output: str
    sources: str

    @property
    def last_line(self) -> str:
        """The last line that says something."""
        lines = [line.strip(" =") for line in self.output.splitlines() if line.strip(" =")]
        return lines[-1] if lines else ""


def source_digest() -> str:
    """Hash of everything that a step's result depends on."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SOURCE_SUFFIXES:
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def write_atomically(path: Path, text: str) -> None:
    """A reader sees the old content or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def run_step(step: Step, seconds: float, sources: str) -> Outcome:
    """Runs the command and, when its time is up, ends it with all that it started."""
    limit = min(step.limit_s, seconds)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment |= dict(step.variables)
    start = time.monotonic()
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        is_passed = process.returncode in (0, NO_TESTS_COLLECTED)
        status = "passed" if is_passed else "failed"
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = "interrupted" if isinstance(reason, KeyboardInterrupt) else "timed out"
    kept = "\n".join(output.splitlines()[-KEPT_LINES:])
    return Outcome(status, round(time.monotonic() - start, 1), kept, sources)


class Results:
    """The outcomes in a results folder, written after every change."""

    def __init__(self, folder: Path, machine: dict[str, str], fresh: bool) -> None:
        self.folder, self.machine = folder, machine
        self.steps: list[Step] = []
        self.outcomes: dict[str, Outcome] = {}
        folder.mkdir(parents=True, exist_ok=True)
        state = folder / "state.json"
        if state.exists() and not fresh:
            stored = json.loads(state.read_text())
            self.outcomes = {name: Outcome(**fields) for name, fields in stored.items()}

    def is_done(self, step: Step, sources: str) -> bool:
        """Whether the step has passed with these sources."""
        outcome = self.outcomes.get(step.name)
        return outcome is not None and outcome.status == "passed" and outcome.sources == sources

    def record(self, step: Step, outcome: Outcome) -> None:
        """Keeps an outcome and writes it down."""
        self.outcomes[step.name] = outcome
        self.write()

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Step, status, seconds and last line, in the order of the steps."""
        table = []
        for step in self.steps:
            outcome = self.outcomes.get(step.name)
            if outcome is None:
                table.append((step.name, "not reached", "", ""))
            else:
                seconds = f"{outcome.seconds:.1f}"
                table.append((step.name, outcome.status, seconds, outcome.last_line))
        return table

    def targets(self) -> list[str]:
        """The table of what was reached; a file that cannot be read leaves its reason."""
        try:
            return gpu_targets.table(self.folder)
        except ValueError as error:
            return [str(error)]

    def write(self) -> None:
        """Writes state.json and summary.md."""
        state = {name: dataclasses.asdict(outcome) for name, outcome in self.outcomes.items()}
        write_atomically(self.folder / "state.json", json.dumps(state, indent=1))
        write_atomically(self.folder / "summary.md", self.markdown())

    def markdown(self) -> str:
        """The one-page summary."""
        rows = self.rows()
        passed = sum(status == "passed" for _, status, _, _ in rows)
        lines = [f"# {self.machine.get('GPU', 'No GPU')}: {passed} of {len(rows)} steps passed", ""]
        lines += [f"- {what}: {value}" for what, value in self.machine.items()]
        lines += ["", "| step | status | seconds | |", "|---|---|---|---|"]
        for name, status, seconds, last_line in rows:
            shown = status if status == "passed" else f"**{status}**"
            lines.append(f"| {name} | {shown} | {seconds} | {last_line.replace('|', '/')} |")
        if "GPU" in self.machine:
            lines += ["", "## reached/target", "", *self.targets()]
        for path in sorted(self.folder.glob("*.csv")):
            lines += ["", f"## {path.name}", "", *markdown_table(path)]
        for step in self.steps:
            outcome = self.outcomes.get(step.name)
            if outcome is not None and outcome.status != "passed":
                lines += ["", f"## {step.name}: {outcome.status}", "", "```", outcome.output, "```"]
        return "\n".join(lines) + "\n"


def markdown_table(path: Path) -> list[str]:
    """The main columns of a benchmark's results file as the lines of a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            cells = [row.get(column, "").replace("|", "/") for column in COLUMNS]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def build_step() -> Step:
    """Whether the library loads, and what it was built for."""
    build = "import tscnc_kernels; print(tscnc_kernels.build_info())"
    return Step(BUILD, (sys.executable, "-c", build))


def compile_step(folder: Path) -> Step:
    """Registers, shared memory and spills of every kernel."""
    report = ("-m", "benchmarks.compile_report", "--json", str(folder / "compile_report.json"))
    return Step("compile report", (sys.executable, *report), limit_s=450)


def steps_with_gpu(folder: Path) -> list[Step]:
    """The suite of every op on CUDA, then the benchmarks, then the sanitizer, the slowest."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short")
    suites = sorted((ROOT / "tests/ops").glob("test_*.py"))
    steps = []
    for path in suites:
        name = path.stem.removeprefix("test_")
        steps.append(Step(f"test {name}", (*pytest, str(path), "-k", "cuda")))
    steps.append(Step("test triton launchers", (*pytest, str(ROOT / "tests/triton"))))
    for path in sorted((ROOT / "benchmarks").glob("bench_*.py")):
        op = path.stem.removeprefix("bench_")
        arguments = ("-m", "benchmarks", op, "--device", "cuda", "--save", "--overwrite")
        steps.append(Step(f"benchmark {op}", (sys.executable, *arguments)))
    if importlib.util.find_spec("matplotlib"):
        steps.append(Step("plots", (sys.executable, "-m", "benchmarks.plot", str(folder))))
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck") if sanitizer else ():
        for path in suites:
            name = path.stem.removeprefix("test_")
            small = "cuda and native and float32 and float64_reference"
            checked = (sanitizer or "", "--tool", tool, "--error-exitcode", "9")
            command = (*checked, *pytest, str(path), "-k", small)
            steps.append(Step(f"{tool} {name}", command, 120, UNCACHED))
    return steps


def describe_machine() -> dict[str, str]:
    """GPU, if there is one, versions, commit and date."""
    import torch

    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    machine = {}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine["GPU"] = properties.name
        machine["Compute capability"] = f"{properties.major}.{properties.minor}"
        machine["Memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        machine["CUDA of torch"] = str(torch.version.cuda)
    machine["torch"] = torch.__version__
    machine["Commit"] = commit
    machine["Date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return machine


def results_folder() -> Path:
    """Where the harness writes this GPU's results; without a GPU, a folder that git ignores."""
    import torch

    from benchmarks.machine import device_name

    if not torch.cuda.is_available():
        return ROOT / "build/gpu"
    return ROOT / "benchmarks/results" / device_name(torch.device("cuda"))


def run_steps(results: Results, deadline: float, sources: str) -> bool:
    """Runs what is not done yet; False if the user interrupts or there is no library to test."""
    results.write()
    for step in results.steps:
        if results.is_done(step, sources):
            print(f"{step.name}: passed before", flush=True)
            continue
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            print(f"{step.name}: no time left", flush=True)
            continue
        outcome = run_step(step, seconds, sources)
        results.record(step, outcome)
        print(f"{step.name}: {outcome.status} in {outcome.seconds} s: {outcome.last_line}")
        if outcome.status == "failed":
            print(outcome.output, flush=True)
        if outcome.status == "interrupted" or (step.name == BUILD and outcome.status != "passed"):
            return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything; returns 1 if a step failed, 130 if interrupted, else 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of this run")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs found")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    machine = describe_machine()
    gpu = machine.get("GPU")
    results = Results(results_folder(), machine, options.fresh)
    sources = source_digest()
    gpu_steps = steps_with_gpu(results.folder) if gpu else []
    # What needs no GPU can wait where there is one.
    results.steps = [build_step(), *gpu_steps, compile_step(results.folder)]
    is_complete = run_steps(results, deadline, sources)
    print(f"summary: {results.folder / 'summary.md'}")
    statuses = {status for _, status, _, _ in results.rows()}
    if "interrupted" in statuses:
        return 130
    if is_complete and not gpu:
        print("no GPU found")
    return 1 if "failed" in statuses else 0


if __name__ == "__main__":
    sys.exit(main())
