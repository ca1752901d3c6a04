"""The correctness gate: what a provider must agree with before it is timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Outputs = torch.Tensor | Sequence[torch.Tensor]

TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 1.6e-2,
}


def disagreement(actual: Outputs, expected: Outputs, tolerance: float) -> str | None:
    """Return why `actual` fails the gate, or None: element-wise closeness and relative RMS."""
    got, want = _tuple(actual), _tuple(expected)
    if len(got) != len(want):
        return f"expected {len(want)} outputs, got {len(got)}"
    for index, pair in enumerate(zip(got, want, strict=True)):
        value, target = (tensor.detach().double().cpu() for tensor in pair)
        if value.shape != target.shape:
            return f"output {index}: expected shape {list(target.shape)}, got {list(value.shape)}"
        if value.numel() == 0:
            continue
        error = (value - target).abs()
        scale = target.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        rms = float(error.square().mean().sqrt() / scale)
        # A long sum's error grows with the size of its terms, also where they cancel.
        close = bool((error <= tolerance * (max(1.0, float(scale)) + target.abs())).all())
        if not (close and rms <= tolerance):
            return f"output {index}: error up to {float(error.max()):.2g}, relative RMS {rms:.2g}"
    return None


def _tuple(outputs: Outputs) -> tuple[torch.Tensor, ...]:
    return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
