"""What an op has found out about a kind of call, kept by the pattern that it was made with.

A small layer's checks and choices take longer than its product; a call like an earlier one needs
neither again.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from tscnc_kernels import _autotune, _backend
from tscnc_kernels._apply import is_eager
from tscnc_kernels.sparsity import SparsityPattern

# Kinds of calls that one pattern keeps: batches of ever new sizes must not fill the memory.
MOST = 64

_plain = frozenset((Tensor, torch.nn.Parameter))
_is_autocast_on = torch._C._is_any_autocast_enabled
_tracing_state = torch._C._get_tracing_state


def call_key(
    input: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Hashable, ...]
) -> Hashable | None:
    """All that an op's checks and choices look at, beside the pattern.

    None where that is not known or not worth to be: under tracing, functorch and autocast, for
    subclasses of tensors, and for tensors that do not agree in dtype and device.
    """
    if not is_eager() or _is_autocast_on() or _tracing_state() is not None:
        return None
    if type(input) is not Tensor or type(weight) not in _plain:
        return None
    dtype, device, strided = input.dtype, input.device, torch.strided
    if not (input.layout is strided and weight.layout is strided):
        return None
    if not (weight.dtype is dtype and weight.device == device):
        return None
    if bias is not None and not (
        type(bias) in _plain
        and bias.layout is strided
        and bias.dtype is dtype
        and bias.device == device
    ):
        return None
    layout = input.is_contiguous() or input.stride()
    shapes = input.shape, weight.shape, None if bias is None else bias.shape
    choice = _backend.forced(), _autotune.is_on(), torch.get_num_threads()
    return shapes, layout, dtype, device, settings, choice


def known_call(pattern: SparsityPattern, key: Hashable | None) -> Any:
    """What `remember_call` was given for the key, or None."""
    if key is None or type(pattern) is not SparsityPattern:
        return None
    try:
        return pattern.__dict__["_known_calls"].get(key)
    except (KeyError, TypeError):
        # The first call, or a setting of a wrong type that cannot be hashed.
        return None


def remember_call(pattern: SparsityPattern, key: Hashable | None, found: Any) -> None:
    """Keep what was found for a call that has passed all checks.

    It must not hold the pattern: cycles keep memory until the next collection.
    """
    if key is None:
        return
    calls = pattern.__dict__.setdefault("_known_calls", {})
    if len(calls) >= MOST:
        calls.clear()
    calls[key] = found
