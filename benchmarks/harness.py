"""The one timer of this folder: correctness first, then interleaved rounds, then one CSV schema.

A bench file lists `Case`s (what is computed, on what, how much work it is) and `Provider`s (who
computes it) and calls `main`. For each case every provider must first agree with the float64
reference; those that do are timed in turn, A B C A B C, each round in another order, so that a slow
moment of the machine hits all alike. A fixed dense control is read before and after: if it moved by
more than 5 % the case is measured again, and after three attempts it is dropped, not recorded.
"""

from __future__ import annotations

import argparse
import datetime
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import machine, results
from benchmarks.gate import TOLERANCES, Outputs, disagreement

CONTROL_TOLERANCE = 0.05
ATTEMPTS = 3
SAMPLE_SECONDS = 2e-3
ROTATED_BYTES = 256 << 20

Call = Callable[[], Outputs]
Clock = Callable[[], float]


class UnavailableError(RuntimeError):
    """A provider cannot run this case here: its package is missing or it has no such kernel."""


@dataclass(frozen=True)
class Case:
    """One computation to compare providers on.

    Attributes:
        op: the op's name; its rows go to `results/<device>/<op>.csv`.
        mode: what is timed, such as "forward", "backward" or "forward_backward".
        shape: the shape's name in the results, taken from the networks we train.
        dtype: the dtype of the inputs; chooses the tolerance.
        inputs: `(generator, device) -> arguments`, fresh random ones at each call.
        expected: `arguments -> outputs`, computed in float64.
        work: bytes moved or flops done by one call, from a formula stated in the bench file.
        unit: "GB/s" or "GF/s", the unit of `work` per nanosecond.
        sparsity: fraction of weights removed.
        tolerance: overrides the dtype's; the bench file says which accumulation needs it.
        rotate: call on buffers that exceed the last-level cache in turn (memory-bound cases).
    """

    op: str
    mode: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[torch.Generator, torch.device], tuple[Any, ...]]
    expected: Callable[..., Outputs]
    work: float
    unit: str
    sparsity: float = 0.0
    tolerance: float | None = None
    rotate: bool = False


@dataclass(frozen=True)
class Provider:
    """One way to compute a case; `prepare(case, *arguments)` returns the call that is timed."""

    name: str
    prepare: Callable[..., Call]


def time_interleaved(
    calls: Mapping[str, Sequence[Call]], rounds: int, device: torch.device, threads: int
) -> dict[str, list[float]]:
    """Return each name's seconds per call, one figure per round, the names taking turns.

    The order is shuffled in each round: a fixed one can fall in step with the scheduler's slices.
    """
    now = machine.clock(device, threads)
    order = random.Random(0)
    repeats = {name: _repeats(copies, device, now) for name, copies in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in order.sample(list(calls), len(calls)):
            samples[name].append(_sample(calls[name], repeats[name], device, now))
    return samples


def run_case(
    case: Case, providers: Sequence[Provider], device: torch.device, threads: int, quick: bool
) -> list[results.Row]:
    """Gate and time every provider on one case; print each row and return those that count."""
    calls: dict[str, list[Call]] = {}
    for provider in providers:
        try:
            calls[provider.name] = _gated_calls(case, provider, device)
        except (UnavailableError, AssertionError) as reason:
            print(f"  {provider.name:<22} not timed: {reason}")
    if not calls:
        return []
    control = machine.control(device, case.rotate, machine.clock(device, threads))
    for _ in range(ATTEMPTS):
        before, load = control(), machine.load_average()
        samples = time_interleaved(calls, 5 if quick else 25, device, threads)
        moved = abs(control() / before - 1)
        if moved <= CONTROL_TOLERANCE:
            break
        print(f"  control moved by {moved:.0%} (load {load:.1f}): measured again")
    else:
        print(f"  dropped: the machine was disturbed in each of {ATTEMPTS} attempts")
        return []
    print(f"  control {before * 1e3:.3f} ms, moved {moved:.1%}, load {load:.1f}")
    rows = [
        _row(case, name, samples[name], machine.peak_mib(copies[0], device), device, threads)
        for name, copies in calls.items()
    ]
    for row in rows:
        print(
            f"  {row.backend:<22} {row.p50:10.4f} ms   p20 {row.p20:10.4f}   {row.rate:8.2f} "
            f"{row.unit}   peak {row.peak_mib:8.1f} MiB"
        )
    return rows


def main(
    cases: Sequence[Case],
    providers: Sequence[Provider],
    quick_cases: Sequence[Case] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Parse the command line of a bench file, measure, and save when asked.

    Args:
        cases: all cases; measured without `--quick`.
        providers: all providers; `--backend` selects among them by name.
        quick_cases: the cases of `--quick`; by default the first two.
        argv: the arguments; by default those of the process.
    """
    options = _parser().parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cpu":
        machine.pin(options.threads)
    unknown = set(options.backend or []) - {provider.name for provider in providers}
    if unknown:
        raise SystemExit(f"unknown backend {sorted(unknown)}; known: {[p.name for p in providers]}")
    chosen = [p for p in providers if not options.backend or p.name in options.backend]
    selected = (quick_cases or cases[:2]) if options.quick else cases
    for case in selected:
        if options.mode and case.mode not in options.mode:
            continue
        label = f"{case.op} {case.mode} {case.shape} {_dtype_name(case.dtype)}"
        print(f"{label} sparsity {case.sparsity:g}" if case.sparsity else label, flush=True)
        wanted = chosen
        if options.save and not options.overwrite:
            saved = results.saved_backends(_key(case, device, options.threads))
            wanted = [p for p in chosen if p.name not in saved]
            for name in sorted({p.name for p in chosen} & saved):
                print(f"  {name:<22} saved before; --overwrite measures it again")
        rows = run_case(case, wanted, device, options.threads, options.quick)
        if options.save:
            results.save(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time one op's cases on this machine.")
    parser.add_argument("--quick", action="store_true", help="few cases, few rounds")
    parser.add_argument("--save", action="store_true", help="write rows to benchmarks/results")
    parser.add_argument("--overwrite", action="store_true", help="replace rows saved before")
    parser.add_argument("--backend", nargs="+", metavar="NAME", help="only these providers")
    parser.add_argument("--mode", nargs="+", metavar="MODE", help="only these modes")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    return parser


def _gated_calls(case: Case, provider: Provider, device: torch.device) -> list[Call]:
    generator = torch.Generator().manual_seed(0)
    arguments = case.inputs(generator, device)
    call = provider.prepare(case, *arguments)
    tolerance = case.tolerance or TOLERANCES[case.dtype]
    reason = disagreement(call(), case.expected(*arguments), tolerance)
    if reason is not None:
        raise AssertionError(f"WRONG beyond {tolerance:g}, {reason}")
    calls = [call]
    size = max(1, _bytes(arguments))
    while case.rotate and len(calls) * size < ROTATED_BYTES:
        calls.append(provider.prepare(case, *case.inputs(generator, device)))
    return calls


def _repeats(copies: Sequence[Call], device: torch.device, now: Clock) -> int:
    _sample(copies, len(copies), device, now)
    once = _sample(copies, 1, device, now)
    return max(1, min(1000, int(SAMPLE_SECONDS / max(once, 1e-7))))


def _sample(copies: Sequence[Call], repeats: int, device: torch.device, now: Clock) -> float:
    machine.synchronize(device)
    start = now()
    for index in range(repeats):
        copies[index % len(copies)]()
    machine.synchronize(device)
    return (now() - start) / repeats


def _row(
    case: Case, name: str, seconds: list[float], peak: float, device: torch.device, threads: int
) -> results.Row:
    versions = machine.versions()
    p20, p50, p80 = torch.tensor(seconds).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return results.Row(
        **_key(case, device, threads),
        backend=name,
        p50=p50 * 1e3,
        p20=p20 * 1e3,
        p80=p80 * 1e3,
        rate=case.work / p50 / 1e9,
        unit=case.unit,
        peak_mib=peak,
        torch=versions["torch"],
        triton=versions["triton"],
        cuda=versions["cuda"],
        commit=machine.commit(),
        date=datetime.date.today().isoformat(),
    )


def _key(case: Case, device: torch.device, threads: int) -> dict[str, Any]:
    return {
        "op": case.op,
        "mode": case.mode,
        "shape": case.shape,
        "dtype": _dtype_name(case.dtype),
        "sparsity": case.sparsity,
        "device": machine.device_name(device),
        "threads": threads,
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(arguments: Any) -> int:
    if isinstance(arguments, torch.Tensor):
        return arguments.numel() * arguments.element_size()
    return sum(map(_bytes, arguments)) if isinstance(arguments, (list, tuple)) else 0
