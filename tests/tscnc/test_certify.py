"""Confidence bounds and certified radii against scipy, the standard library and their meaning."""

import math
import statistics

import pytest

from tscnc.certify import cohen_radius, lower_confidence_bound

CASES = [
    (count, n, alpha)
    for n in (1, 2, 10, 100, 1000, 100_000)
    for count in sorted({1, n // 3, n // 2, n - 1, n} - {0})
    for alpha in (0.5, 0.05, 0.001, 1e-9)
]


@pytest.mark.parametrize(("count", "n", "alpha"), [*CASES, (60_000_000, 100_000_000, 0.001)])
def test_the_bound_is_a_quantile_of_the_beta_distribution(count: int, n: int, alpha: float) -> None:
    scipy_stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    expected = scipy_stats.beta.ppf(alpha, count, n - count + 1)
    assert lower_confidence_bound(count, n, alpha) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(("count", "n"), [(1, 1), (3, 7), (19, 20), (20, 20)])
def test_at_the_bound_so_many_successes_have_probability_alpha(count: int, n: int) -> None:
    p = lower_confidence_bound(count, n, 0.01)
    tail = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(count, n + 1))
    assert tail == pytest.approx(0.01, rel=1e-10)


def test_the_bound_without_failures_or_successes_is_in_closed_form() -> None:
    assert lower_confidence_bound(1000, 1000, 0.001) == pytest.approx(0.001 ** (1 / 1000))
    assert lower_confidence_bound(0, 1000, 0.001) == 0


def test_the_bound_grows_with_successes_and_with_alpha() -> None:
    by_count = [lower_confidence_bound(count, 50, 0.01) for count in range(51)]
    assert by_count == sorted(by_count) and len(set(by_count)) == 51
    assert all(bound <= count / 50 for count, bound in enumerate(by_count))
    by_alpha = [lower_confidence_bound(40, 50, alpha) for alpha in (1e-6, 0.001, 0.05, 0.5)]
    assert by_alpha == sorted(by_alpha)


def test_bad_counts_are_refused() -> None:
    for count, n in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match=f"got count {count} and n {n}"):
            lower_confidence_bound(count, n, 0.01)
    for alpha in (0.0, 1.0, -1, math.nan):
        with pytest.raises(ValueError, match=rf"alpha in \(0, 1\), got {alpha}"):
            lower_confidence_bound(1, 5, alpha)
    with pytest.raises(TypeError, match="float"):
        lower_confidence_bound(1.5, 5, 0.01)  # type: ignore[arg-type]


@pytest.mark.parametrize("p", [0.5 + 1e-12, 0.6, 0.9, 0.999, 1 - 1e-12])
def test_the_radius_is_the_normal_quantile(p: float) -> None:
    radius = cohen_radius(p, 0.25)
    assert radius == pytest.approx(0.25 * statistics.NormalDist().inv_cdf(p))
    assert statistics.NormalDist(sigma=0.25).cdf(radius) == pytest.approx(p)


def test_the_radius_by_hand() -> None:
    assert cohen_radius(0.9, 0.5) == pytest.approx(0.6407757827723)
    assert cohen_radius(0.5, 0.5) == cohen_radius(0.1, 0.5) == cohen_radius(0, 0.5) == 0
    assert cohen_radius(1, 0.5) == math.inf


def test_a_bad_radius_is_refused() -> None:
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=rf"p_lower in \[0, 1\], got {p}"):
            cohen_radius(p, 0.5)
    for sigma in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"finite sigma, got {sigma}"):
            cohen_radius(0.9, sigma)
