"""What the masked layers of a model run, what it costs, and what would make it faster."""

import math
from collections.abc import Sequence

from torch import nn

from tscnc_kernels import _backend
from tscnc_kernels._autotune import DENSE, Decision, Plan
from tscnc_kernels._masked_algorithms import (
    BACKWARD,
    DIRECTIONS,
    SEPARATE,
    plan_for,
    plans_of,
    predict_step,
    usual_call,
)
from tscnc_kernels.nn._gain import break_even
from tscnc_kernels.nn._names import check_module
from tscnc_kernels.nn.masked_layer import MaskedLayer

HEADER = ("layer", "product", "runs", "predicted", "measured", "dense", "reason")


def explain(module: nn.Module) -> str:
    """What each masked layer of a module runs, and why.

    A layer that has been called is explained for its last kind of call (batch, dtype, threads), one
    that has not for a batch of 128 (a convolution: 4096 output pixels). Times are of one product.

    Args:
        module: a module, or a model that contains some.

    Returns:
        A table with one line per product of every masked layer: the algorithm, its predicted and
        its measured time, the time of dense, and the reason; then what would make the layer faster.

    Raises:
        RuntimeError: a backend was forced that cannot run here.
        TypeError: not a module.
    """
    check_module(module)
    rows: list[tuple[str, ...]] = [HEADER]
    advice = []
    for name, layer in module.named_modules():
        if isinstance(layer, MaskedLayer):
            name = name or type(layer).__name__
            plan = current_plan(layer)
            rows += _rows(name, layer, plan)
            advice += [f"{name}: {line}" for line in _advice(layer, plan)]
    if len(rows) == 1:
        return "no masked layer"
    return "\n".join([table(rows), *advice])


def current_plan(layer: MaskedLayer) -> Plan:
    """The plan of the layer's last kind of call, or of a usual one."""
    seen = plans_of(layer.pattern)
    if seen:
        return seen[-1]
    backend = _backend.select(layer.op, layer.pattern.device)
    call = usual_call(layer.pattern.shape, layer.mode == "values")
    return plan_for(layer.op, layer.pattern, backend, call._replace(dtype=layer.weight.dtype))


def _rows(name: str, layer: MaskedLayer, plan: Plan) -> list[tuple[str, ...]]:
    shape, call = " x ".join(map(str, layer.pattern.shape)), plan.call
    layout = ", feature-major" if getattr(layer, "feature_major", False) else ""
    title = [
        f"{name}: {shape}, {layer.pattern.density:.2%} kept, {layer.mode}{layout}",
        f"  batch {call.batch}, {str(call.dtype).removeprefix('torch.')}",
        "",
    ]
    rows = []
    for line, (product, found) in zip(title, products(plan), strict=False):
        known = found.measured or found.predicted
        times = found.predicted.get(found.algorithm), found.measured.get(found.algorithm)
        shown = [milliseconds(seconds) for seconds in (*times, known.get(DENSE))]
        rows.append((line, product, found.algorithm, *shown, found.reason))
    return rows


def _advice(layer: MaskedLayer, plan: Plan) -> list[str]:
    backend = _backend.select(layer.op, layer.pattern.device)
    if backend != "native":
        return [f"the backend {backend!r} has no sparse kernel, 'native' has"]
    found, pattern = [decision for _, decision in products(plan)], layer.pattern
    lines, here = [], seconds(found)
    if layer.mode == "dense":
        case = layer.op, pattern.shape, pattern.nnz
        values = predict_step(*case, plan.call._replace(values=True))
        dense = predict_step(*case, plan.call)
        if values < 0.95 * dense:
            lines.append(f"mode='values' would take about {values / dense:.0%} of the time")
    if all(decision.algorithm == DENSE for decision in found):
        limit = break_even(layer.op, pattern.shape, plan.call.batch)
        if 0 < limit < pattern.density:
            lines.append(f"sparse kernels are expected to win once at most {limit:.0%} are kept")
    if here < 1e-4 and plan.call.batch < 64:
        lines.append("the call itself costs most of this; a larger batch is cheaper per sample")
    return lines


def products(plan: Plan) -> list[tuple[str, Decision]]:
    """What runs, by name: the forward product and each gradient, or both gradients in one pass."""
    forward, *gradients = [(way, plan.preview(way)) for way in DIRECTIONS]
    both = plan.preview(BACKWARD)
    if both.algorithm == DENSE or both.algorithm not in both.predicted.keys() - {SEPARATE}:
        return [forward, *gradients]
    dense = [(found.measured or found.predicted).get(DENSE, math.nan) for _, found in gradients]
    known = {**(both.measured or both.predicted), DENSE: sum(dense)}
    shown = both._replace(measured=known) if both.measured else both._replace(predicted=known)
    return [forward, ("both gradients", shown)]


def seconds(decisions: Sequence[Decision]) -> float:
    """Of all products, measured where that is known."""
    return sum((d.measured or d.predicted).get(d.algorithm, 0.0) for d in decisions)


def milliseconds(time: float | None) -> str:
    """Three digits, and nothing for what is not known."""
    return f"{1e3 * time:.3g} ms" if time is not None and time < 1e6 else ""


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
