"""The errors of spectra are measured against the truth, kept, and held against the promises."""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks import accuracy, bench_spectral_errors, plot, results, spectral_peers, summary
from benchmarks.bench_spectral_errors import Row, Spectrum, measure
from benchmarks.spectral_peers import Ends, Matrix
from tscnc_kernels import SparsityPattern

DIAGONAL = Matrix(torch.diag(torch.tensor([4.0, 2.0, 1.0])))
SINGULAR = Matrix(torch.diag(torch.tensor([4.0, 2.0, 0.0])))
MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 1, 0]]).bool()
PRUNED = Matrix(torch.arange(1.0, 13.0).reshape(3, 4) * MASK, SparsityPattern.from_mask(MASK))


def row_of(ends: Ends, *matrices: Matrix) -> Row:
    spectrum = Spectrum("known", "3x3", lambda: list(matrices))
    return measure("method", lambda matrix: lambda: ends, spectrum, matrices)


def test_errors_are_relative_and_the_worst_counts():
    row = row_of(Ends(4.4, 1.0), DIAGONAL, Matrix(2 * DIAGONAL.weight))
    assert (row.matrices, row.kappa) == (2, pytest.approx(4))
    assert row.sigma_max_error == pytest.approx(0.45) and row.sigma_min_error == pytest.approx(0.5)
    assert row.kappa_error == pytest.approx(0.1)
    assert math.isnan(row.sigma_max_width)


def test_what_a_method_does_not_say_is_no_error():
    row = row_of(Ends(4.0), DIAGONAL)
    assert row.sigma_max_error < 1e-12
    assert math.isnan(row.sigma_min_error) and math.isnan(row.kappa_error)
    assert row_of(Ends(kappa=8.0), DIAGONAL).kappa_error == pytest.approx(1)
    flagged = row_of(Ends(1.0, 1.0, capped=True), DIAGONAL)
    assert flagged.capped == 1 and math.isnan(flagged.sigma_max_error)


def test_an_infinite_condition_number_is_found_or_not():
    assert row_of(Ends(4.0, 0.0), SINGULAR).kappa_error == 0
    missed = row_of(Ends(4.0, 0.4), SINGULAR)
    assert missed.kappa_error == math.inf and missed.sigma_min_error == pytest.approx(0.1)


def test_widths_are_relative_and_infinite_where_nothing_is_proven():
    bounds = ((4.0, 4.4), (0.0, 1.0), (2.0, math.inf))
    row = row_of(Ends(4.0, 1.0, bounds=bounds), DIAGONAL)
    assert row.sigma_max_width == pytest.approx(0.1)
    assert row.sigma_min_width == row.kappa_width == math.inf


@pytest.mark.parametrize("name", spectral_peers.METHODS)
@pytest.mark.parametrize("matrix", [DIAGONAL, PRUNED], ids=["diagonal", "pruned"])
def test_methods_find_the_ends_or_leave_them_out(name, matrix):
    if "scipy" in name:
        pytest.importorskip("scipy")
    if "lobpcg" in name:
        matrix = Matrix(torch.diag(torch.arange(1.0, 13.0)))
    truth = bench_spectral_errors._true_ends(matrix)
    ends = spectral_peers.METHODS[name](matrix)()
    assert ends.kappa is not None or ends.largest == pytest.approx(truth[0], rel=0.05)
    if name in spectral_peers.FAST:
        assert ends.smallest == pytest.approx(truth[1], rel=1e-5)
    assert bool(ends.bounds) == (name == "ours, certified")


def test_spectra_make_what_they_are_named_after():
    for spectrum in bench_spectral_errors.QUICK:
        matrices = spectrum.matrices()
        assert len(matrices) == bench_spectral_errors.SEEDS
        assert all(matrix.weight.shape == (48, 96) for matrix in matrices)
        for matrix in matrices if "geometric" in spectrum.name else ():
            largest, smallest = bench_spectral_errors._true_ends(matrix)
            assert largest / smallest == pytest.approx(float(spectrum.name.split()[1]), rel=0.1)


def test_promises_are_held_against_what_was_measured(tmp_path):
    row = row_of(Ends(4.0, 1.0), DIAGONAL)
    good = replace(row, method="ours, cold", sigma_max_error=1e-6, kappa=1e5, matrices=3)
    rows = [
        good,
        replace(good, method="ours, warm", sigma_max_error=1e-4, kappa=1e7, sigma_min_error=1.0),
        replace(good, capped=1, kappa=1e6),
        replace(good, method="ours, certified", kappa=1e3, kappa_width=1e-2),
        replace(good, method="torch svdvals", sigma_max_error=1.0),
    ]
    text = list(accuracy.lines(rows))
    assert "error of sigma_max, ours, cold: 1e-06/0.001" in text
    assert "error of sigma_max, ours, warm: 0.0001/1e-05 !" in text
    assert "error of sigma_min up to kappa = 1e7: 1/0.01 !" in text
    assert "share flagged CAP_REACHED up to kappa = 1e6: 0.11/0.01 !" in text
    assert "width of kappa's interval up to kappa = 1e3: 0.01/0.001 !" in text
    results.write_table(tmp_path / "accuracy" / bench_spectral_errors.FILE, rows, Row)
    assert summary.errors_of_spectra(tmp_path)[1:-1] == [f"  {line}" for line in text]
    assert summary.errors_of_spectra(tmp_path / "empty") == []


def test_a_run_saves_every_row_once_and_its_figure_comes_from_them(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(bench_spectral_errors.machine, "pin", lambda threads: None)
    monkeypatch.setattr(bench_spectral_errors, "QUICK", bench_spectral_errors.QUICK[:2])
    arguments = ["--quick", "--essential", "--save"]
    bench_spectral_errors.run(arguments)
    (path,) = tmp_path.glob("*/accuracy/*.csv")
    rows = bench_spectral_errors.load(path.parent.parent)
    assert {row.method for row in rows} == spectral_peers.ESSENTIAL
    assert len(rows) == len(capsys.readouterr().out.splitlines())
    bench_spectral_errors.run(arguments)
    assert capsys.readouterr().out == ""
    (figure,) = plot.plot_file(path)
    assert figure.stat().st_size > 1000
