"""The one timer of this folder: correctness first, then interleaved rounds, then one CSV schema.

A bench file lists `Case`s (what is computed, on what, how much work it is) and `Provider`s (who
computes it) and calls `main`. For each case every provider must first agree with the float64
reference; those that do are timed in turn, A B C A B C, each round in another order, so that a slow
moment of the machine hits all alike. Each turn begins with one call that is not timed, so that it
tells how the provider runs, not in what state the one before has left the caches; and freed memory
stays with the process (`tscnc_kernels.keep_freed_memory`). A fixed dense control is read before and
after: if it moved by more than 5 % the case is measured again, after three attempts dropped. Where
nothing is saved, the first attempt is shown with a warning.

A run saves after every case and skips what is saved, so an interrupted one goes on where it was. It
says beforehand, and at every case, how long it expects to take.
"""

from __future__ import annotations

import argparse
import datetime
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from benchmarks import machine, results
from benchmarks.gate import TOLERANCES, Outputs, disagreement
from tscnc_kernels import keep_freed_memory

CONTROL_TOLERANCE = 0.05
ATTEMPTS = 3
SAMPLE_SECONDS = 2e-3
SLOW_ROUND_SECONDS, SLOW_ROUNDS = 3.0, 3
ROTATED_BYTES = 256 << 20
# Rates assumed to predict how long a case takes, where its provider is no faster than a dense one.
ASSUMED_GFLOPS, ASSUMED_GBYTES = 50.0, 5.0

Call = Callable[[], Any]
Clock = Callable[[], float]


class Rounds(NamedTuple):
    """As many rounds as fit into `seconds` of one case, at least `least`, at most `most`."""

    least: int
    most: int
    seconds: float

    def fitting(self, one: float) -> int:
        """Rounds for a case of which one round takes `one` seconds."""
        least = self.least if one < SLOW_ROUND_SECONDS else SLOW_ROUNDS
        return max(least, min(self.most, int(self.seconds / max(one, 1e-6))))


QUICK_ROUNDS, ESSENTIAL_ROUNDS, FULL_ROUNDS = Rounds(3, 5, 0.5), Rounds(5, 15, 2), Rounds(9, 25, 8)


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
        dense_work: `work` of a provider that takes no advantage of the sparsity, by default `work`;
            used to predict the duration.
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
    dense_work: float | None = None


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        name: the column of the results.
        prepare: `(case, *arguments) -> call`, the call that is timed; or a `Timed`.
        gated: whether the call computes the case; a price shown beside it (a fill, say) does not.
    """

    name: str
    prepare: Callable[..., Call | Timed]
    gated: bool = True


@dataclass(frozen=True)
class Timed:
    """A call whose result has to be converted, outside of the timing, for the gate to read it."""

    call: Call
    outputs: Callable[[Any], Outputs]


@dataclass(frozen=True)
class Stepped:
    """A call with something to do before it, outside of the timing: a step of the weights, say."""

    call: Call
    before: Callable[[], None]

    def __call__(self) -> Any:
        return self.call()


def time_interleaved(
    calls: Mapping[str, Sequence[Call]], rounds: Rounds, device: torch.device, threads: int
) -> dict[str, list[float]]:
    """Return each name's seconds per call, one figure per round, the names taking turns.

    The order is shuffled in each round: a fixed one can fall in step with the scheduler's slices.
    """
    now = machine.clock(device, threads)
    order = random.Random(0)
    once = {name: _warm_seconds(copies, device, now) for name, copies in calls.items()}
    repeats = {name: max(1, min(1000, int(SAMPLE_SECONDS / s))) for name, s in once.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds.fitting(sum(repeats[name] * once[name] for name in calls))):
        for name in order.sample(list(calls), len(calls)):
            calls[name][-1]()
            samples[name].append(_sample(calls[name], repeats[name], device, now))
    return samples


def run_case(
    case: Case,
    providers: Sequence[Provider],
    device: torch.device,
    threads: int,
    rounds: Rounds = FULL_ROUNDS,
    keep_disturbed: bool = False,
) -> list[results.Row]:
    """Gate and time every provider on one case; print each row and return those that count."""
    calls = _gated_calls(case, providers, device)
    if not calls:
        return []
    control = machine.control(device, case.rotate, machine.clock(device, threads))
    for _ in range(ATTEMPTS):
        before, load = control(), machine.load_average()
        samples = time_interleaved(calls, rounds, device, threads)
        moved = abs(control() / before - 1)
        if moved <= CONTROL_TOLERANCE:
            break
        if keep_disturbed:
            print("  the machine was disturbed: these figures are not reliable")
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
            f"  {row.backend:<24} {row.p50:10.4f} ms   p20 {row.p20:10.4f}   {row.rate:8.2f} "
            f"{row.unit}   peak {row.peak_mib:8.1f} MiB"
        )
    return rows


def main(
    cases: Sequence[Case],
    providers: Sequence[Provider],
    quick_cases: Sequence[Case] | None = None,
    argv: Sequence[str] | None = None,
    essential: Callable[[Case, Provider], bool] | None = None,
) -> list[results.Row]:
    """Parse the command line of a bench file, measure, save when asked, and return the rows.

    Args:
        cases: all cases; measured without `--quick`.
        providers: all providers; `--backend` selects among them by name.
        quick_cases: the cases of `--quick`; by default the first two.
        argv: the arguments; by default those of the process.
        essential: which providers of which cases `--essential` and `--quick` measure; default all.
    """
    options = _parser().parse_args(argv)
    device = torch.device(options.device)
    machine.decide_anew()
    keep_freed_memory()
    if device.type == "cpu":
        machine.pin(options.threads)
    unknown = set(options.backend or []) - {provider.name for provider in providers}
    if unknown:
        raise SystemExit(f"unknown backend {sorted(unknown)}; known: {[p.name for p in providers]}")
    short = options.quick or options.essential
    rounds = QUICK_ROUNDS if options.quick else ESSENTIAL_ROUNDS if short else FULL_ROUNDS
    plan = []
    for case in (quick_cases or cases[:2]) if options.quick else cases:
        wanted = [p for p in providers if not options.backend or p.name in options.backend]
        if short and essential is not None:
            wanted = [p for p in wanted if essential(case, p)]
        if options.save and not options.overwrite:
            saved = results.saved_backends(_key(case, device, options.threads))
            wanted = [p for p in wanted if p.name not in saved]
        if wanted and _is_selected(case, options):
            plan.append((case, wanted))
    rows: list[results.Row] = []
    for index, (case, wanted) in enumerate(plan):
        left = sum(_seconds(*step, rounds) for step in plan[index:]) / 60
        place = f"[{index + 1} of {len(plan)}, about {left:.1f} min left]"
        print(f"{_label(case)}   {place}", flush=True)
        measured = run_case(case, wanted, device, options.threads, rounds, not options.save)
        if options.save:
            results.save(measured)
        rows += measured
    if not plan:
        print("nothing to measure: no such case, or all saved before (--overwrite measures again)")
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time one op's cases on this machine.")
    parser.add_argument("--quick", action="store_true", help="few cases, few rounds")
    parser.add_argument("--essential", action="store_true", help="what the targets need, no more")
    parser.add_argument("--save", action="store_true", help="write rows to benchmarks/results")
    parser.add_argument("--overwrite", action="store_true", help="replace rows saved before")
    parser.add_argument("--backend", nargs="+", metavar="NAME", help="only these providers")
    parser.add_argument("--mode", nargs="+", metavar="MODE", help="only these modes")
    parser.add_argument("--shape", nargs="+", metavar="SHAPE", help="only these shapes")
    parser.add_argument("--dtype", nargs="+", metavar="DTYPE", help="only these dtypes")
    parser.add_argument("--sparsity", nargs="+", type=float, help="only these sparsities")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    return parser


def _is_selected(case: Case, options: argparse.Namespace) -> bool:
    choices = (
        (options.mode, case.mode),
        (options.shape, case.shape),
        (options.dtype, _dtype_name(case.dtype)),
        (options.sparsity, case.sparsity),
    )
    return all(not allowed or value in allowed for allowed, value in choices)


def _label(case: Case) -> str:
    label = f"{case.op} {case.mode} {case.shape} {_dtype_name(case.dtype)}"
    return f"{label} sparsity {case.sparsity:g}" if case.sparsity else label


def _seconds(case: Case, providers: Sequence[Provider], rounds: Rounds) -> float:
    """Predict the seconds of a case from those of a provider without advantage."""
    work = case.work if case.dense_work is None else case.dense_work
    rate = ASSUMED_GFLOPS if case.unit == "GF/s" else ASSUMED_GBYTES
    one = max(SAMPLE_SECONDS, work / rate / 1e9) * len(providers)
    return (rounds.fitting(one) + 5) * one


def _gated_calls(
    case: Case, providers: Sequence[Provider], device: torch.device
) -> dict[str, list[Call]]:
    """The calls of every provider that can run here and agrees with the float64 reference."""
    expected: Outputs | None = None
    calls: dict[str, list[Call]] = {}
    tolerance = case.tolerance or TOLERANCES[case.dtype]
    for provider in providers:
        generator = torch.Generator().manual_seed(0)
        try:
            # Fresh for every provider, as for the reference: none sees what another made of them.
            arguments = case.inputs(generator, device)
            timed = _timed(provider, case, arguments)
            result = timed.outputs(timed.call())
            if provider.gated:
                expected = _expected(case, device) if expected is None else expected
                reason = disagreement(result, expected, tolerance)
                if reason is not None:
                    raise AssertionError(f"WRONG beyond {tolerance:g}, {reason}")
        except (UnavailableError, AssertionError) as reason:
            print(f"  {provider.name:<24} not timed: {reason}")
            continue
        copies, size = [timed.call], max(1, _bytes(arguments))
        while case.rotate and len(copies) * size < ROTATED_BYTES:
            copies.append(_timed(provider, case, case.inputs(generator, device)).call)
        calls[provider.name] = copies
    return calls


def _expected(case: Case, device: torch.device) -> Outputs:
    return case.expected(*case.inputs(torch.Generator().manual_seed(0), device))


def _timed(provider: Provider, case: Case, arguments: tuple[Any, ...]) -> Timed:
    prepared = provider.prepare(case, *arguments)
    return prepared if isinstance(prepared, Timed) else Timed(prepared, lambda result: result)


def _warm_seconds(copies: Sequence[Call], device: torch.device, now: Clock) -> float:
    _sample(copies, len(copies), device, now)
    return max(_sample(copies, 1, device, now), 1e-7)


def _sample(copies: Sequence[Call], repeats: int, device: torch.device, now: Clock) -> float:
    if isinstance(copies[0], Stepped):
        return _sample_steps(copies, repeats, device, now)
    machine.synchronize(device)
    start = now()
    for index in range(repeats):
        copies[index % len(copies)]()
    machine.synchronize(device)
    return (now() - start) / repeats


def _sample_steps(copies: Sequence[Call], repeats: int, device: torch.device, now: Clock) -> float:
    seconds = 0.0
    for index in range(repeats):
        copy = copies[index % len(copies)]
        if isinstance(copy, Stepped):
            copy.before()
        machine.synchronize(device)
        start = now()
        copy()
        machine.synchronize(device)
        seconds += now() - start
    return seconds / repeats


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
