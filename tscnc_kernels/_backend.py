"""Which implementation of an op runs: native (compiled), triton, or reference (plain torch).

An explicit choice — the `backend=` argument, `use_backend()`, or the environment variable
TSCNC_BACKEND — runs exactly that or raises with the reason. Without one, the first backend of the
op's `BACKENDS` that can run on the tensors' device is taken.
"""

import functools
import importlib.util
import logging
import os
from types import TracebackType

import torch

logger = logging.getLogger("tscnc_kernels")

NAMES = ("native", "triton", "reference")
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}

_forced: str | None = os.environ.get("TSCNC_BACKEND") or None
_registry: dict[str, tuple[str, ...]] = {}
_chosen: dict[tuple[str, str], str | None] = {}


def register(op: str, backends: tuple[str, ...]) -> None:
    """Declare the backends of an op in order of preference."""
    _registry[op] = backends


@functools.cache
def why_no_triton(device_type: str) -> str | None:
    """None if Triton kernels run on this device, else the reason why not."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "Triton needs a CUDA device, or TRITON_INTERPRET=1 set before the first import"


@torch.compiler.assume_constant_result
def why_unavailable(op: str, backend: str, device_type: str) -> str | None:
    """None if this backend of the op runs on the device, else the reason why not."""
    if backend not in _registry[op]:
        return f"this op has only {', '.join(_registry[op])}"
    if backend == "triton":
        return why_no_triton(device_type)
    if backend == "native":
        key = _DISPATCH_KEYS.get(device_type)
        if key is None:
            return "native kernels exist for cpu and cuda"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"tscnc_kernels::{op}", key):
            return f"this build has no {key} kernel of it (see tscnc_kernels.build_info())"
    return None


@torch.compiler.assume_constant_result
def _first_available(op: str, device_type: str) -> str:
    if (op, device_type) not in _chosen:
        runs = (b for b in _registry[op] if why_unavailable(op, b, device_type) is None)
        _chosen[op, device_type] = next(runs, None)
        logger.debug("%s on %s: backend %s", op, device_type, _chosen[op, device_type])
    backend = _chosen[op, device_type]
    if backend is None:
        raise RuntimeError(f"{op}: no backend runs on {device_type}")
    return backend


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise RuntimeError(f"expected backend to be one of {', '.join(NAMES)}, got {name!r}")


def select(op: str, device: torch.device, backend: str | None = None) -> str:
    """The backend that runs `op` on `device`.

    Raises:
        RuntimeError: an explicitly chosen backend is unknown or cannot run here.
    """
    wanted = backend if backend is not None else _forced
    if wanted is None:
        return _first_available(op, device.type)
    _check_name(wanted)
    reason = why_unavailable(op, wanted, device.type)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {wanted!r} cannot run on {device.type}: {reason}")
    return wanted


def uses_triton(op: str, device: torch.device) -> bool:
    """Whether an op that has a Triton kernel beside its reference, and is not registered with
    `backend=`, runs the kernel: on CUDA, unless another backend was chosen for all ops.

    Raises:
        RuntimeError: Triton was chosen and cannot run on the device.
    """
    if _forced is None:
        return device.type == "cuda" and why_no_triton("cuda") is None
    reason = why_no_triton(device.type) if _forced == "triton" else None
    if reason is not None:
        raise RuntimeError(f"{op}: backend 'triton' cannot run on {device.type}: {reason}")
    return _forced == "triton"


def forced() -> str | None:
    """The backend that TSCNC_BACKEND or `use_backend` asks for, None where ops choose."""
    return _forced


class use_backend:
    """Run every op on one backend from now on, or inside a `with` block.

    Args:
        name: "native", "triton" or "reference"; None returns to the automatic choice.

    Raises:
        RuntimeError: unknown name. Ops raise it when the backend cannot run on their tensors'
            device.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        if name is not None:
            _check_name(name)
        self._previous = _forced
        _forced = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _forced
        _forced = self._previous


def available_backends(op: str, device: str | torch.device = "cpu") -> list[str]:
    """Backends of the op that run on the device, in order of preference.

    Args:
        op: name of an op, e.g. "transformed_l1".
        device: where the op's tensors would be, e.g. "cpu" or "cuda".

    Returns:
        Names out of "native", "triton" and "reference".

    Raises:
        ValueError: no op has that name.
    """
    if op not in _registry:
        raise ValueError(f"expected op to be one of {', '.join(sorted(_registry))}, got {op!r}")
    device_type = torch.device(device).type
    return [name for name in _registry[op] if why_unavailable(op, name, device_type) is None]
