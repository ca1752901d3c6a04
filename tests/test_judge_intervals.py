"""Certified intervals are right on random and adversarial matrices, and the judge would tell."""

import math

import pytest
import torch

from benchmarks import interval_judge, judge_intervals, results
from benchmarks.spectra import FAMILIES, gaussian, with_spectrum

# Singular values 3 and 1, exactly.
SMALL = torch.tensor([[2.0, 1.0], [1.0, 2.0], [0.0, 0.0]], dtype=torch.float64).numpy()
BELOW_1, ABOVE_1 = math.nextafter(1, 0), math.nextafter(1, 2)
BELOW_3, ABOVE_3 = math.nextafter(3, 0), math.nextafter(3, 4)
RIGHT = ((3, ABOVE_3), (BELOW_1, 1), (3, math.nextafter(3.1, 4)))


def wrong(largest, smallest, kappa=(1, math.inf), matrix=SMALL):
    return interval_judge.judge(matrix, largest, smallest, kappa).wrong


def test_judge_tells_neighbouring_numbers_apart():
    assert wrong(*RIGHT) == wrong(*RIGHT, SMALL.T) == ()
    assert wrong((ABOVE_3, 4), (1, 1)) == ("sigma_max lower", "sigma_min lower")
    assert wrong((2, BELOW_3), (BELOW_1, BELOW_1)) == ("sigma_max upper", "sigma_min upper")
    assert wrong((3, ABOVE_3), (ABOVE_1, 2)) == ("sigma_min lower",)


def test_judge_divides_exactly():
    assert wrong((3, ABOVE_3), (BELOW_1, 1), (ABOVE_3, 4)) == ("kappa",)
    assert wrong((3, ABOVE_3), (BELOW_1, 1), (3, 3)) == ("kappa",)
    assert wrong((3, ABOVE_3), (0, 1), (3, math.inf)) == ()
    assert wrong((3, ABOVE_3), (0, 1), (math.inf, math.inf)) == ("kappa",)
    assert wrong((3, math.nan), (0, 1)) != ()


def test_judge_knows_singular_matrices():
    infinite = (math.inf, math.inf)
    assert wrong((0, 0), (0, 0), infinite, 0 * SMALL) == ()
    assert wrong((2.5, 3), (0, 0), infinite, 0 * SMALL + 1) == ("sigma_max lower",)
    assert wrong((2, 2.5), (0, 1e-300), (1e300, math.inf), 0 * SMALL + 1) == ()
    assert wrong((2, 2.5), (1e-300, 1), (2, math.inf), 0 * SMALL + 1) == ("sigma_min lower",)


@pytest.mark.skipif(not interval_judge.HAS_EXTENDED, reason="no 64-bit significand")
def test_extended_precision_proves_what_is_right_and_only_that():
    sigma = torch.linspace(1, 0.25, 20, dtype=torch.float64)
    matrix = with_spectrum(40, 20, sigma, dtype=torch.float64).numpy()
    right = interval_judge.judge(
        matrix, (1 - 1e-14, 1 + 1e-14), (0.25 - 1e-14, 0.25 + 1e-14), (1, 5)
    )
    assert right == interval_judge.Verdict((), is_exact=False)
    late = interval_judge.judge(matrix, (1 + 1e-12, 2), (0.2, 0.25 - 1e-12), (1, 10))
    assert late.wrong == ("sigma_max lower", "sigma_min upper")


@pytest.mark.parametrize("family", FAMILIES)
def test_intervals_are_right(family):
    *_, count = judge_intervals.judge_family(judge_intervals.Count(family, seed=1), 12)
    assert (count.matrices, count.wrong, count.missed) == (12, 0, 0)
    assert count.capped <= 0.01 * count.moderate


def test_a_wrong_interval_is_counted(monkeypatch, capsys):
    real = judge_intervals.extreme_singular_values

    def shrunken(*arguments, **options):
        found = real(*arguments, **options)
        bounds = found.bounds._replace(sigma_max=found.bounds.sigma_max * 0.999)
        return found._replace(bounds=bounds, sigma_max=found.sigma_max * 0.99)

    monkeypatch.setattr(judge_intervals, "extreme_singular_values", shrunken)
    (count,) = judge_intervals.judge_family(judge_intervals.Count("gaussian", seed=1), 1)
    assert count.wrong == count.missed == 1
    assert "WRONG kappa, sigma_max upper: gaussian, matrix 0" in capsys.readouterr().out
    text = list(judge_intervals.lines([count]))
    assert text[0].endswith("matrices: 1/0 !") and text[1].endswith("promised: 1/0 !")


def test_judging_goes_on_where_it_was(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    families = {name: FAMILIES[name] for name in ("gaussian", "constant")}
    monkeypatch.setattr(judge_intervals, "FAMILIES", families)

    def judged(matrices, *options):
        return judge_intervals.main(["--matrices", str(matrices), *options])

    whole = judged(11)
    judged(6, "--save")
    assert judged(11, "--save") == whole
    (folder,) = tmp_path.iterdir()
    assert judge_intervals.load(folder) == whole
    assert [count.matrices for count in judged(4, "--save", "--overwrite")] == [2, 2]


def test_spectra_are_what_they_are_called():
    for make in FAMILIES.values():
        generator = torch.Generator().manual_seed(3)
        for shape in ((1, 1), (1, 5), (7, 2), (9, 9)):
            matrix = make(*shape, generator)
            assert matrix.shape == shape and matrix.dtype == torch.float64
            assert matrix.isfinite().all()
    assert gaussian(3, 2).dtype == torch.float32
