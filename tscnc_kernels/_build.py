"""Loads the compiled library, or says which command builds it."""

import hashlib
import shlex
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent
SOURCES = PACKAGE.parent / "csrc"


def _source_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in {".cpp", ".h", ".cu", ".cuh"}:
            name = path.relative_to(SOURCES.parent).as_posix()
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _advice() -> str:
    if SOURCES.is_dir():
        folder = shlex.quote(str(PACKAGE.parent))
        return f"Run: cd {folder} && python setup.py build_ext --inplace   (or: make install)"
    return "Run: pip install --force-reinstall --no-deps tscnc-kernels"


def load() -> Any:
    """Import `tscnc_kernels._C` and check that it is the build of the sources beside it.

    Raises:
        ImportError: the library is missing, does not load, or is older than `csrc/`; the message
            holds the command that fixes it.
    """
    try:
        from tscnc_kernels import _C  # type: ignore[attr-defined]
    except ImportError as error:
        raise ImportError(
            f"the compiled library tscnc_kernels._C could not be loaded with torch "
            f"{torch.__version__}: {error}. {_advice()}"
        ) from error
    if Path(_C.__file__).resolve().parent != PACKAGE:
        raise ImportError(
            f"{PACKAGE} holds no compiled library; the one found is another installation's, "
            f"{_C.__file__}. {_advice()}"
        )
    if SOURCES.is_dir():
        built, found = _C.build_info()["source_digest"], _source_digest()
        if built != found:
            raise ImportError(
                f"the compiled library {_C.__file__} is stale: it was built from sources {built}, "
                f"but csrc/ is {found}. {_advice()}"
            )
    return _C


C = load()


def build_info() -> dict[str, Any]:
    """What the compiled library was built for, and what this machine offers it.

    Returns:
        A dict with `version`, `source_digest`, `cpu_isas` (instruction sets compiled), `cuda_archs`
        (None in a CPU-only build), `compiler`, `torch_stable_abi`, and as found now:
        `cpu_features`, `active_isa`, `torch`.
    """
    return {**C.build_info(), "active_isa": C.active_isa(), "torch": torch.__version__}
