import itertools
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tscnc_kernels import _autotune
from tscnc_kernels._decision_file import DecisionFile

pytestmark = pytest.mark.usefixtures("tuner")
ROOT = Path(__file__).resolve().parent.parent


class Machine:
    """Algorithms of known cost on a clock that nothing else moves."""

    def __init__(self, **costs):
        self.costs, self.now, self.calls, self.disturbed = costs, 0.0, [], {}

    def compute(self, name):
        self.calls.append(name)
        self.now += self.costs[name] + self.disturbed.get(len(self.calls), 0.0)

    def measure(self):
        return _autotune.measure(list(self.costs), self.compute, lambda: self.now)


EQUAL = {"dense": 1.0, "panel": 1.0}


def decide(machine=None, predicted=EQUAL, key="key"):
    compute = None if machine is None else machine.compute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_autotune, "clock_for", lambda device: lambda: machine.now)
        return _autotune.decide(key, predicted, compute, (torch.ones(1),))


@pytest.mark.parametrize(
    ("dense", "sparse", "winner"),
    [(1.0, 0.99, "dense"), (1.0, 0.95, "panel"), (1.0, 2.0, "dense")],
)
def test_dense_wins_unless_another_is_five_percent_faster(dense, sparse, winner):
    machine = Machine(dense=dense, panel=sparse)
    found = decide(machine)
    assert found.algorithm == winner and found.reason == "measured"
    assert found.measured == pytest.approx({"dense": dense, "panel": sparse})


def test_each_candidate_is_timed_five_times_in_turn():
    machine = Machine(a=1.0, b=1.1, c=1.2)
    machine.measure()
    assert machine.calls[3:9] == ["a", "b", "c", "c", "b", "a"]
    assert all(machine.calls.count(name) == 1 + _autotune.MIN_ROUNDS for name in "abc")


def test_short_calls_are_timed_more_often_and_lost_ones_less():
    short = Machine(a=1e-6, b=2e-6)
    short.measure()
    assert short.calls.count("a") == 1 + _autotune.MAX_ROUNDS
    lost = Machine(a=1.0, b=5.0)
    lost.measure()
    assert (lost.calls.count("a"), lost.calls.count("b")) == (1 + _autotune.MIN_ROUNDS, 4)


@pytest.mark.parametrize("disturbed", itertools.combinations(range(1, 6), 2))
def test_disturbed_rounds_do_not_change_the_choice(disturbed):
    """Any two of the five rounds of the better candidate take ten times as long."""
    machine = Machine(dense=1.0, panel=0.7)
    order = ["dense", "panel"] + ["dense", "panel", "panel", "dense"] * 3
    places = [i + 1 for i, name in enumerate(order) if name == "panel"]
    machine.disturbed = {places[turn]: 7.0 for turn in disturbed}
    times = machine.measure()
    assert machine.calls == order[: len(machine.calls)]
    assert _autotune.fastest(times) == "panel"


def test_at_most_four_candidates_are_timed_and_dense_always():
    predicted = {"a": 1.0, "b": 1.1, "c": 1.2, "d": 1.3, "e": 4.1, "dense": 100.0}
    assert _autotune.shortlist(predicted) == ["dense", "a", "b", "c"]
    assert _autotune.shortlist({"a": 1.0, "b": 4.1, "dense": 0.9}) == ["dense", "a"]


def test_a_decision_is_made_once_and_survives_the_process():
    machine = Machine(dense=1.0, panel=0.2)
    first = decide(machine)
    count = len(machine.calls)
    assert decide(machine) == first
    _autotune.state.forget()
    again = decide(machine)
    assert again.algorithm == first.algorithm and again.measured == first.measured
    assert len(machine.calls) == count
    assert decide(predicted={**EQUAL, "new": 1.0}).reason == "predicted"


def test_force_measures_what_the_file_holds(monkeypatch):
    machine = Machine(dense=1.0, panel=0.2)
    decide(machine)
    _autotune.state.forget()
    monkeypatch.setattr(_autotune.state, "mode", "force")
    count = len(machine.calls)
    decide(machine)
    assert len(machine.calls) > count


def test_times_of_an_algorithm_that_is_no_more_are_measured_again():
    DecisionFile().add("key/dense+panel", {"gone": 1e-9, "dense": 1.0})
    found = decide(Machine(dense=1.0, panel=0.2))
    assert set(found.measured) == {"dense", "panel"}


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"seconds": []}', '{"seconds": {"a": 3, "b": {}}}', "\x00\xff"),
        *('{"seconds": {"key/dense+panel": {"dense": -1}}}', "[" * 100_000),
        '{"seconds": {"key/dense+panel": {"dense": NaN, "panel": "x"}}}',
    ],
)
def test_a_damaged_file_is_measured_again_and_replaced(text):
    file = DecisionFile()
    file.path.parent.mkdir(parents=True)
    file.path.write_text(text, encoding="latin-1")
    assert decide(Machine(dense=1.0, panel=0.2)).measured
    assert list(file.read()) == ["key/dense+panel"]
    json.loads(file.path.read_text())
    assert {path.suffix for path in file.path.parent.iterdir()} == {".json", ".lock"}


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TSCNC_CACHE_DIR", str(blocked / "cache"))
    with caplog.at_level(logging.WARNING, logger="tscnc_kernels"):
        for key in "abc":
            machine = Machine(dense=1.0, panel=0.2)
            found = decide(machine, key=key)
            assert found.algorithm == "panel" and found.measured
    assert len(caplog.records) == 1 and "measured again" in caplog.text


WRITER = """
import sys
from tscnc_kernels._decision_file import DecisionFile
file = DecisionFile()
for index in range(40):
    file.add(f"{sys.argv[1]}{index}", {"dense": 1.0})
"""


def test_processes_that_write_at_once_lose_nothing():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER]
    running = [subprocess.Popen([*command, name], env=environment) for name in "ab"]
    assert [process.wait() for process in running] == [0, 0]
    expected = {f"{name}{index}" for name in "ab" for index in range(40)}
    assert set(DecisionFile().read()) == expected


def test_threads_that_meet_at_one_decision_measure_it_once(monkeypatch):
    machine, found = Machine(dense=1.0, panel=0.2), []
    monkeypatch.setattr(_autotune, "clock_for", lambda device: lambda: machine.now)

    def work():
        found.append(_autotune.decide("key", EQUAL, machine.compute, (torch.ones(1),)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [decision.algorithm for decision in found] == ["panel"] * 8
    assert machine.calls.count("panel") == 1 + _autotune.MIN_ROUNDS


def test_off_predicts_and_touches_no_file(monkeypatch):
    monkeypatch.setattr(_autotune.state, "mode", "off")
    machine = Machine(dense=1.0, panel=5.0)
    found = decide(machine, {"dense": 1.0, "panel": 0.5})
    assert (found.algorithm, machine.calls, found.measured) == ("panel", [], {})
    assert not DecisionFile().path.exists()


def test_deterministic_mode_means_off():
    torch.use_deterministic_algorithms(True)
    try:
        assert not _autotune.is_on()
    finally:
        torch.use_deterministic_algorithms(False)
    assert _autotune.is_on()


def test_unknown_modes_are_named(monkeypatch):
    monkeypatch.setenv("TSCNC_AUTOTUNE", "maybe")
    with pytest.raises(ValueError, match="one of on, off, force, got 'maybe'"):
        _autotune._mode_of_environment()


def test_one_thread_is_timed_by_its_own_clock():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert _autotune.clock_for(torch.device("cpu")) is time.thread_time
        torch.set_num_threads(2)
        assert _autotune.clock_for(torch.device("cpu")) is time.perf_counter
    finally:
        torch.set_num_threads(threads)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert DecisionFile().path.parent == tmp_path / "cache"
    monkeypatch.delenv("TSCNC_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert DecisionFile().path.parent == tmp_path / "tscnc_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert DecisionFile().path.parent == Path.home() / ".cache" / "tscnc_kernels"
