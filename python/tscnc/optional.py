"""Optional dependencies: imported where they are used, named when they are missing."""

from __future__ import annotations

import importlib
from typing import Any

_PACKAGES = {
    "yaml": "pyyaml",
    "safetensors.torch": "safetensors",
    "matplotlib.pyplot": "matplotlib",
}


def require(module: str) -> Any:
    """Imports an optional module.

    Raises:
        ModuleNotFoundError: it is not installed; the message holds the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = _PACKAGES.get(module, module)
        raise ModuleNotFoundError(
            f"this needs the package {package!r}, which is not installed: pip install {package}",
            name=error.name,
        ) from error
