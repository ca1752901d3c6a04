"""What a run ran on: versions, processor, build and commit, for its `environment.json`."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tscnc_kernels

_OPTIONAL = ("triton", "safetensors", "pyyaml", "tqdm", "matplotlib")


def describe() -> dict[str, Any]:
    """Returns versions, threads, processor, kernel build and, in a checkout, the git commit."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "packages": {name: _version(name) for name in ("tscnc-kernels", *_OPTIONAL)},
        "threads": torch.get_num_threads(),
        "kernels": {name: _plain(value) for name, value in tscnc_kernels.build_info().items()},
        "commit": git_commit(Path(__file__).resolve().parent),
    }


def processor() -> str:
    """Returns the processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_commit(folder: Path) -> str | None:
    """Returns the commit checked out around `folder`, read from git's files, or None."""
    try:
        for parent in (folder, *folder.parents):
            entry = parent / ".git"
            if entry.exists():
                return _head_commit(_git_directory(entry))
    except (OSError, UnicodeDecodeError, ValueError):
        pass
    return None


def _git_directory(entry: Path) -> Path:
    """Follows the `.git` file of a linked work tree to its directory."""
    if entry.is_dir():
        return entry
    return entry.parent / entry.read_text(encoding="utf-8").removeprefix("gitdir:").strip()


def _head_commit(directory: Path) -> str | None:
    head = (directory / "HEAD").read_text(encoding="utf-8").strip()
    if not head.startswith("ref:"):
        return head
    reference = head.removeprefix("ref:").strip()
    common_file = directory / "commondir"
    common = directory
    if common_file.exists():
        common = directory / common_file.read_text(encoding="utf-8").strip()
    if (common / reference).exists():
        return (common / reference).read_text(encoding="utf-8").strip()
    for line in (common / "packed-refs").read_text(encoding="utf-8").splitlines():
        if line.endswith(" " + reference):
            return line.split()[0]
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """Returns a value in types JSON knows."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
