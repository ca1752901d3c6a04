"""Where a benchmark ran: device, versions, commit, load. Every results row carries these facts."""

from __future__ import annotations

import atexit
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tscnc_kernels import build_info


def device_name(device: torch.device) -> str:
    """Return the results folder of a device: `cpu-<model>-<ISA>` or the GPU's name, as a slug.

    A virtual machine may name only the family, so the instruction set that runs tells its models
    apart.
    """
    if device.type == "cuda":
        return _slug(torch.cuda.get_device_name(device))
    return _slug(f"cpu-{_cpu_model()}-{build_info()['active_isa']}")


def versions() -> dict[str, str]:
    """Return the versions that a timing depends on; an absent library is an empty string."""
    return {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "",
    }


def commit() -> str:
    """Return the short commit of the working tree, `-dirty` when tracked files differ from it.

    The results do not count: they change with every row that is saved.
    """
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    code = [".", ":!benchmarks/results"]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        differs = [*git, "diff", "--quiet", "HEAD", "--", *code]
        changed = subprocess.run(differs, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if changed else "")


def load_average() -> float:
    """Return the one-minute load average (nan where the system has none)."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def pin(threads: int) -> None:
    """Give torch `threads` threads and tie the process to as many CPUs where the system can.

    A peer's OpenMP library reads its number of threads when it is loaded, which comes later.
    """
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, set(allowed[-threads:]))


def decide_anew() -> None:
    """Keep this run's choices of algorithms apart from those of the user's cache.

    What a disturbed machine once measured must not decide what is measured now.
    """
    if "TSCNC_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="tscnc-benchmark-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["TSCNC_CACHE_DIR"] = folder


def clock(device: torch.device, threads: int) -> Callable[[], float]:
    """Return the clock to time with, in seconds.

    One CPU thread is timed by the processor time it used, which leaves out what the scheduler
    gave to other processes; several threads, or a GPU, by the wall.
    """
    return time.process_time if device.type == "cpu" and threads == 1 else time.perf_counter


def control(
    device: torch.device, memory_bound: bool, now: Callable[[], float]
) -> Callable[[], float]:
    """Return a reading of the machine itself: seconds of a fixed product, or of a fixed copy.

    Its value moves only when the machine does (another load, a frequency change), so a case is
    trusted only if the control reads the same before and after it. Memory-bound cases need the
    copy: a busy memory bus leaves a product that lives in the cache untouched.
    """
    size = 4 << 20 if memory_bound else 384 * 384
    source = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)
    target = torch.empty_like(source)

    def once() -> float:
        synchronize(device)
        start = now()
        if memory_bound:
            target.copy_(source)
        else:
            torch.mm(source.view(384, 384), source.view(384, 384))
        synchronize(device)
        return now() - start

    def read() -> float:
        return sorted(once() for _ in range(15))[3]

    read()
    return read


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """Return the most memory torch's allocator held for one call, results included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - held) / 2**20
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    recorded = profile.profiler.kineto_results.events()
    events = sorted((e for e in recorded if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1) if match else platform.machine()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
