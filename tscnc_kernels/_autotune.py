"""Measured choice between algorithms that compute the same thing.

A decision is made once per key and direction (the forward product, each gradient), at its first
use: a closed-form prediction leaves at most four candidates, these are timed on the call's own
tensors, and the times are kept in the process and in a file (`_decision_file`). "dense" is always
a candidate and wins unless another one is at least 5 % faster. The call that measures then computes
its result with the algorithm chosen, so that it gives the same bits as all later calls.

TSCNC_AUTOTUNE is one of

- on (the default): as above.
- off: the prediction alone decides; the same choice in every process, on every run.
- force: as on, but what the file holds is measured anew and replaced.

torch.use_deterministic_algorithms(True) means off. Under tracing, functorch, torch's dispatch modes
(fake tensors among them) and CUDA graph capture nothing is measured; there, and for calls too short
to repay the measurement, the prediction decides.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tscnc_kernels._apply import is_eager
from tscnc_kernels._decision_file import DecisionFile

DENSE = "dense"
MODES = ("on", "off", "force")
# A sparse algorithm has to be this much faster than dense.
HYSTERESIS = 1.05
# Candidates that are timed; one predicted to take over SLOWER times the best is not.
CANDIDATES = 4
SLOWER = 4.0
# At least so many rounds, and more while they fit in BUDGET seconds.
MIN_ROUNDS, MAX_ROUNDS, BUDGET = 5, 25, 5e-3
# Seconds that a dense call must be predicted to take before it is worth measuring.
WORTH = 1e-5

Compute = Callable[[str], object]
Predict = Callable[[str], Mapping[str, float]]


class Decision(NamedTuple):
    """Which algorithm runs, and what that rests on.

    Attributes:
        algorithm: the name.
        predicted: seconds by the closed-form model, by algorithm.
        measured: seconds as timed, by algorithm; empty where nothing was.
        reason: a short clause.
    """

    algorithm: str
    predicted: Mapping[str, float]
    measured: Mapping[str, float]
    reason: str


def _mode_of_environment() -> str:
    found = os.environ.get("TSCNC_AUTOTUNE") or "on"
    if found not in MODES:
        raise ValueError(f"TSCNC_AUTOTUNE: expected one of {', '.join(MODES)}, got {found!r}")
    return found


class _State:
    """What the process knows; one lock covers it and every measurement."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.mode = _mode_of_environment()
        self.times: dict[str, Mapping[str, float]] = {}
        self.file: DecisionFile | None = None

    def forget(self) -> None:
        """As in a new process."""
        with self.lock:
            self.times, self.file = {}, None

    def open(self) -> DecisionFile:
        if self.file is None:
            self.file = DecisionFile()
            if self.mode != "force":
                self.times = {**self.file.read(), **self.times}
        return self.file


state = _State()


def _new_lock() -> None:
    state.lock = threading.RLock()


# Another thread may hold the lock while this process forks; nobody would release it in the child.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def is_on() -> bool:
    """Whether decisions are measured in this process."""
    return state.mode != "off" and not torch.are_deterministic_algorithms_enabled()


def can_measure(tensors: Iterable[Tensor]) -> bool:
    """Whether running an algorithm several times on these tensors means anything here."""
    if not is_eager() or torch._C._len_torch_dispatch_stack():
        return False
    plain = (Tensor, torch.nn.Parameter)
    device = None
    for tensor in tensors:
        if type(tensor) not in plain or tensor.is_meta:
            return False
        device = tensor.device
    captured = device is not None and device.type == "cuda"
    return not (captured and torch.cuda.is_current_stream_capturing())


def fastest(times: Mapping[str, float]) -> str:
    """The name with the smallest time; dense unless another one is `HYSTERESIS` times faster."""
    best = min(times, key=lambda name: times[name])
    if DENSE in times and times[DENSE] < HYSTERESIS * times[best]:
        return DENSE
    return best


def shortlist(predicted: Mapping[str, float]) -> list[str]:
    """The candidates worth timing, dense always among them."""
    ranked = sorted(predicted, key=lambda name: predicted[name])
    limit = SLOWER * predicted[ranked[0]]
    sparse = [name for name in ranked if name != DENSE and predicted[name] <= limit]
    dense = [DENSE] if DENSE in predicted else []
    return dense + sparse[: CANDIDATES - len(dense)]


def clock_for(device: torch.device) -> Callable[[], float]:
    """Seconds: of this thread where it computes alone, which leaves out other processes."""
    if device.type == "cuda":

        def synchronized() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return synchronized
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def measure(names: Sequence[str], compute: Compute, clock: Callable[[], float]) -> dict[str, float]:
    """Lower quartile of the seconds that each algorithm takes, all of them in turn.

    Every second round runs backwards, so that a load that grows or fades hits all alike. One that
    stays `SLOWER` times behind the best for three rounds runs no further.
    """
    for name in names:
        compute(name)
    samples: dict[str, list[float]] = {name: [] for name in names}
    running, spent = list(names), 0.0
    for count in range(MAX_ROUNDS):
        if count >= MIN_ROUNDS and spent > BUDGET:
            break
        if count == 3:
            best = {name: min(found) for name, found in samples.items()}
            running = [name for name in names if best[name] < SLOWER * min(best.values())]
        for name in running if count % 2 == 0 else reversed(running):
            start = clock()
            compute(name)
            samples[name].append(clock() - start)
            spent += samples[name][-1]
    return {name: sorted(found)[len(found) // 4] for name, found in samples.items()}


def decide(
    key: str, predicted: Mapping[str, float], compute: Compute | None, tensors: Sequence[Tensor]
) -> Decision:
    """The algorithm of one direction of one kind of call.

    Args:
        key: everything that the times depend on, apart from the machine and the candidates.
        predicted: seconds by algorithm, one entry per algorithm that can run.
        compute: runs the algorithm of a name on `tensors`, without side effects; None asks for what
            is known or predicted.
        tensors: what it runs on.
    """
    if len(predicted) == 1:
        return Decision(next(iter(predicted)), predicted, {}, "nothing else runs here")
    if not is_on():
        return Decision(fastest(predicted), predicted, {}, "predicted, autotuning is off")
    if predicted.get(DENSE, max(predicted.values())) < WORTH:
        return Decision(fastest(predicted), predicted, {}, "predicted, too short to measure")
    key = f"{key}/{'+'.join(sorted(predicted))}"
    with state.lock:
        file = state.open()
        times = state.times.get(key, {})
        if not times or not set(times) <= set(predicted):
            if compute is None or not can_measure(tensors):
                return Decision(fastest(predicted), predicted, {}, "predicted")
            times = measure(shortlist(predicted), compute, clock_for(tensors[0].device))
            state.times[key] = times
            file.add(key, times)
    return Decision(fastest(times), predicted, times, "measured")


class Plan:
    """What one kind of call runs, per direction; each is decided at its first use.

    Args:
        call: what kind that is; kept for `explain`.
        key: see `decide`; the direction is added to it.
        predict: seconds by algorithm for a direction.
        forced: an algorithm for all directions, without any decision.
    """

    __slots__ = ("_forced", "_key", "_predict", "call", "decisions")

    def __init__(self, call: Any, key: str, predict: Predict, forced: str | None = None) -> None:
        self.call, self._key, self._predict, self._forced = call, key, predict, forced
        self.decisions: dict[str, Decision] = {}

    def pick(self, direction: str, compute: Compute, tensors: Sequence[Tensor]) -> str:
        """The algorithm of a direction, measured now with `compute` if it has to be."""
        found = self.decisions.get(direction)
        return (found or self._decide(direction, compute, tensors)).algorithm

    def preview(self, direction: str) -> Decision:
        """What `pick` has decided, or would say without measuring."""
        return self.decisions.get(direction) or self._judge(direction, None, ())

    def _decide(self, direction: str, compute: Compute, tensors: Sequence[Tensor]) -> Decision:
        decision = self._judge(direction, compute, tensors)
        # A prediction made where nothing could be measured must not stay.
        if decision.reason != "predicted":
            self.decisions[direction] = decision
        return decision

    def _judge(
        self, direction: str, compute: Compute | None, tensors: Sequence[Tensor]
    ) -> Decision:
        predicted = self._predict(direction)
        if self._forced is not None:
            return Decision(self._forced, predicted, {}, "asked for")
        return decide(f"{self._key}/{direction}", predicted, compute, tensors)
