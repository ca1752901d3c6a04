"""Measured decisions kept between processes: one small JSON file per machine and build.

The folder is TSCNC_CACHE_DIR, else `tscnc_kernels` in the user's cache folder (XDG_CACHE_HOME, else
~/.cache). A file that is missing, damaged or not writable costs a log line and a measurement,
never an error; deleting it is always safe.
"""

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tscnc_kernels._build import build_info

try:
    import fcntl
except ImportError:  # not a Unix system: two processes may then lose one of two measurements
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("tscnc_kernels")

FORMAT = 1
Times = dict[str, float]


def folder() -> Path:
    """Where the files are."""
    forced = os.environ.get("TSCNC_CACHE_DIR")
    if forced:
        return Path(forced).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "tscnc_kernels"


def fingerprint() -> dict[str, Any]:
    """What a timing on a CPU depends on, apart from the call itself."""
    build = build_info()
    return {
        "format": FORMAT,
        "cpu": _cpu_model(),
        "features": build["cpu_features"],
        "caches": _cache_sizes(),
        "torch": str(torch.__version__),
        "library": build["source_digest"],
    }


class DecisionFile:
    """The measured times by key. `read` and `add` are safe against other processes."""

    def __init__(self) -> None:
        self._machine = fingerprint()
        digest = hashlib.sha256(json.dumps(self._machine).encode()).hexdigest()[:16]
        self.path = folder() / f"autotune-{digest}.json"
        self._warned = False

    def read(self) -> dict[str, Times]:
        """All decisions of the file; an unusable file has none."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            self._warn("cannot be read", error)
            return {}
        try:
            return _checked(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            self._warn("is damaged and will be replaced", error)
            return {}

    def add(self, key: str, times: Mapping[str, float]) -> None:
        """Write one more decision beside those that other processes have written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                seconds = {**self.read(), key: dict(times)}
                self._replace({"machine": self._machine, "seconds": seconds})
        except OSError as error:
            self._warn("cannot be written", error)

    def _replace(self, content: Mapping[str, Any]) -> None:
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.stem)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
            os.replace(name, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if fcntl is None:
            yield
            return
        with open(self.path.with_suffix(".lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _warn(self, what: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "%s %s (%s); timings are measured again in each process", self.path, what, error
            )


def _checked(content: Any) -> dict[str, Times]:
    """The times in a file's content; whatever has another form is left out."""
    if not isinstance(content, dict) or not isinstance(content.get("seconds"), dict):
        raise ValueError("expected an object with an object named seconds")
    return {
        key: {name: float(time) for name, time in times.items()}
        for key, times in content["seconds"].items()
        if isinstance(times, dict)
        and times
        and all(isinstance(time, int | float) and 0 <= time < 1e6 for time in times.values())
    }


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = [
        re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
        for name in ("model name", "cpu family", "model")
    ]
    parts = [match[1] for match in found if match]
    return " ".join(parts) if parts else platform.processor() or platform.machine()


def _cache_sizes() -> list[str]:
    """Of the first core, nearest first; empty where the system does not tell."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    try:
        return [path.read_text().strip() for path in sorted(folder.glob("index*/size"))]
    except OSError:
        return []
