"""The harness refuses wrong results, keeps one row per measurement, and draws from CSV alone."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import harness, machine, plot, results
from benchmarks.gate import disagreement
from benchmarks.harness import Case, Provider, Timed, UnavailableError
from benchmarks.results import Row

CPU = torch.device("cpu")

ROW = Row(
    op="scale",
    backend="ours",
    mode="forward",
    shape="8x8",
    dtype="float32",
    sparsity=0.9,
    p50=2.0,
    p20=1.5,
    p80=2.5,
    rate=4.0,
    unit="GB/s",
    peak_mib=0.0,
    device="cpu-test",
    threads=1,
    torch="2",
    triton="",
    cuda="",
    commit="abc",
    date="2026-01-01",
)


def case() -> Case:
    return Case(
        op="scale",
        mode="forward",
        shape="8x8",
        dtype=torch.float32,
        inputs=lambda generator, device: (torch.randn(8, 8, generator=generator),),
        expected=lambda x: 2 * x.double(),
        work=512,
        unit="GB/s",
    )


def test_gate_finds_one_wrong_element_in_many():
    right = torch.randn(1000, 100)
    wrong = right.clone()
    wrong[500, 50] += 1e-2
    assert disagreement(right, right.double(), 1e-5) is None
    assert "error up to 0.01" in disagreement(wrong, right.double(), 1e-5)
    assert "expected shape [2]" in disagreement(torch.zeros(3), torch.zeros(2), 1e-5)


def test_gate_allows_what_a_long_sum_of_large_terms_loses():
    terms = torch.randn(64, 4096) * 10
    total, exact = terms.sum(1), terms.double().sum(1)
    assert disagreement(total, exact, 1e-5) is None
    assert disagreement(total * 1.001, exact, 1e-5) is not None


def test_wrong_and_missing_providers_are_not_timed(capsys, monkeypatch):
    monkeypatch.setattr(harness.machine, "control", lambda *_: lambda: 1.0)

    def unavailable(case, x):
        raise UnavailableError("its package is missing")

    providers = [
        Provider("right", lambda case, x: lambda: 2 * x),
        Provider("wrong", lambda case, x: lambda: 2.01 * x),
        Provider("absent", unavailable),
    ]
    rows = harness.run_case(case(), providers, CPU, 1, harness.QUICK_ROUNDS)
    assert [row.backend for row in rows] == ["right"]
    assert rows[0].p20 <= rows[0].p50 <= rows[0].p80
    printed = capsys.readouterr().out
    assert "not timed: WRONG" in printed and "not timed: its package is missing" in printed


def test_rows_of_a_disturbed_machine_are_dropped(capsys, monkeypatch):
    readings = iter(range(1, 100))
    monkeypatch.setattr(harness.machine, "control", lambda *_: lambda: float(next(readings) ** 2))
    providers = [Provider("right", lambda case, x: lambda: 2 * x)]
    assert harness.run_case(case(), providers, CPU, 1, harness.QUICK_ROUNDS) == []
    assert "dropped: the machine was disturbed" in capsys.readouterr().out
    shown = harness.run_case(case(), providers, CPU, 1, harness.QUICK_ROUNDS, keep_disturbed=True)
    assert [row.backend for row in shown] == ["right"]
    assert "these figures are not reliable" in capsys.readouterr().out


def test_a_price_shown_beside_is_not_gated_and_a_result_may_be_converted(monkeypatch):
    monkeypatch.setattr(harness.machine, "control", lambda *_: lambda: 1.0)
    providers = [
        Provider("packed", lambda case, x: Timed(lambda: (2 * x).t(), lambda found: found.t())),
        Provider("a fill", lambda case, x: lambda: torch.zeros(3), gated=False),
    ]
    rows = harness.run_case(case(), providers, CPU, 1, harness.QUICK_ROUNDS)
    assert [row.backend for row in rows] == ["packed", "a fill"]


def test_an_interrupted_run_goes_on_where_it_was(capsys, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(harness.machine, "control", lambda *_: lambda: 1.0)
    monkeypatch.setattr(harness.machine, "pin", lambda threads: None)
    monkeypatch.setattr(harness.machine, "decide_anew", lambda: None)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    first, second = case(), replace(case(), shape="again")
    providers = [Provider("right", lambda case, x: lambda: 2 * x)]

    def measured(cases: list[Case]) -> list[str]:
        rows = harness.main(cases, providers, argv=["--essential", "--save"])
        return [row.shape for row in rows]

    assert measured([first]) == ["8x8"]
    assert measured([first, second]) == ["again"]
    assert "[1 of 1, about 0.0 min left]" in capsys.readouterr().out
    assert measured([first, second]) == []
    assert "all saved before" in capsys.readouterr().out


def test_only_the_selected_cases_are_measured(monkeypatch):
    monkeypatch.setattr(harness.machine, "control", lambda *_: lambda: 1.0)
    monkeypatch.setattr(harness.machine, "pin", lambda threads: None)
    monkeypatch.setattr(harness.machine, "decide_anew", lambda: None)
    cases = [replace(case(), sparsity=s) for s in (0.5, 0.9)]
    providers = [Provider(name, lambda case, x: lambda: 2 * x) for name in ("needed", "extra")]

    def needed(case: Case, provider: Provider) -> bool:
        return provider.name == "needed"

    rows = harness.main(cases, providers, cases, ["--quick", "--sparsity", "0.9"], needed)
    assert [(row.backend, row.sparsity) for row in rows] == [("needed", 0.9)]


def test_rounds_fit_the_time_given():
    rounds = harness.Rounds(least=5, most=20, seconds=2.0)
    assert [rounds.fitting(one) for one in (1e-3, 0.2, 1.0)] == [20, 10, 5]
    assert rounds.fitting(10.0) == harness.SLOW_ROUNDS


def test_unknown_backend_is_named():
    with pytest.raises(SystemExit, match="nobody"):
        harness.main([case()], [], argv=["--backend", "nobody"])


def test_results_keep_one_row_per_measurement(tmp_path: Path):
    results.save([ROW, replace(ROW, backend="theirs")], tmp_path)
    results.save([replace(ROW, p50=3.0)], tmp_path)
    rows = results.load(tmp_path / "cpu-test" / "scale.csv")
    assert {row.backend: row.p50 for row in rows} == {"ours": 3.0, "theirs": 2.0}


def test_foreign_results_file_is_refused(tmp_path: Path):
    path = tmp_path / "scale.csv"
    path.write_text("op,speed\nscale,1\n")
    with pytest.raises(ValueError, match=r"expected columns .* got \['op', 'speed'\]"):
        results.load(path)


def test_figures_come_from_the_csv_alone(tmp_path: Path):
    pytest.importorskip("matplotlib")
    swept = [replace(ROW, sparsity=s, p50=1 / s) for s in (0.5, 0.9, 0.99)]
    results.save([*swept, replace(ROW, shape="other", sparsity=0.0)], tmp_path)
    figures = plot.plot_file(tmp_path / "cpu-test" / "scale.csv")
    assert {figure.name for figure in figures} == {"scale.svg", "scale-8x8.svg"}
    first = [figure.read_bytes() for figure in figures]
    assert [f.read_bytes() for f in plot.plot_file(tmp_path / "cpu-test" / "scale.csv")] == first


def test_saved_rows_do_not_make_the_commit_dirty(tmp_path, monkeypatch):
    """Every row of a run is of the same code, though the run changes the results."""
    saved, code = tmp_path / "benchmarks" / "results" / "a.csv", tmp_path / "benchmarks" / "a.py"
    saved.parent.mkdir(parents=True)
    saved.write_text("1")
    code.write_text("1")
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    monkeypatch.setattr(machine, "__file__", str(code))
    clean = machine.commit()
    saved.write_text("2")
    assert machine.commit() == clean != "unknown"
    code.write_text("2")
    assert machine.commit() == f"{clean}-dirty"
