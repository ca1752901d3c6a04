"""Certified radii of randomized smoothing: how sure is the class, and how far does it reach.

Source: Cohen, Rosenfeld and Kolter, "Certified Adversarial Robustness via Randomized Smoothing"
(arXiv 1902.02918); Clopper and Pearson, "The Use of Confidence or Fiducial Limits" (1934).
"""

import itertools
import math
import operator
import statistics

_TINY = 1e-300
_CONTINUED_FRACTION_PRECISION = 1e-15


def lower_confidence_bound(count: int, n: int, alpha: float) -> float:
    """Clopper–Pearson lower bound on a success probability.

    The exact one-sided bound: the p for which `count` or more successes in n trials have
    probability alpha, the solution of I_p(count, n - count + 1) = alpha.

    Args:
        count: successes seen, 0 <= count <= n.
        n: trials, at least 1.
        alpha: allowed probability that the true probability lies below the bound, in (0, 1).

    Returns:
        The bound, in [0, count / n], accurate to 1e-10; 0 for no successes.

    Raises:
        TypeError: count or n is not an integer.
        ValueError: count, n or alpha out of range.
    """
    count, n = operator.index(count), operator.index(n)
    if n < 1 or not 0 <= count <= n:
        raise ValueError(f"expected n >= 1 and 0 <= count <= n, got count {count} and n {n}")
    if not 0 < alpha < 1:
        raise ValueError(f"expected alpha in (0, 1), got {alpha}")
    if count == 0:
        return 0.0
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        too_low = _regularised_incomplete_beta(count, n - count + 1, middle) < alpha
        low, high = (middle, high) if too_low else (low, middle)
    return min(low, count / n)


def cohen_radius(p_lower: float, sigma: float) -> float:
    """Certified L2 radius of a smoothed classifier, sigma · Phi^-1(p_lower).

    Args:
        p_lower: lower bound on the probability of the predicted class under Gaussian noise, in
            [0, 1].
        sigma: standard deviation of the noise, positive and finite.

    Returns:
        The radius; 0, which certifies nothing, where p_lower <= 1/2; infinite for p_lower = 1.

    Raises:
        ValueError: p_lower or sigma out of range.
    """
    if not 0 <= p_lower <= 1:
        raise ValueError(f"expected p_lower in [0, 1], got {p_lower}")
    if not 0 < sigma < math.inf:
        raise ValueError(f"expected a positive finite sigma, got {sigma}")
    if p_lower <= 0.5:
        return 0.0
    return math.inf if p_lower == 1 else sigma * statistics.NormalDist().inv_cdf(p_lower)


def _regularised_incomplete_beta(a: int, b: int, x: float) -> float:
    """I_x(a, b) for 0 < x < 1, by its continued fraction where that converges fast."""
    if x > (a + 1) / (a + b + 2):
        return 1 - _regularised_incomplete_beta(b, a, 1 - x)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    log_front = a * math.log(x) + b * math.log1p(-x) - log_beta
    return math.exp(log_front) / a / _beta_continued_fraction(a, b, x)


def _beta_continued_fraction(a: int, b: int, x: float) -> float:
    """1 + d_1 / (1 + d_2 / (1 + ...)) of I_x(a, b), DLMF 8.17.22, by Lentz's method."""
    value = c = 1.0
    d = 0.0
    for step in itertools.count(1):
        m = step // 2
        if step % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / _away_from_zero(1 + term * d)
        c = _away_from_zero(1 + term / c)
        value *= c * d
        if abs(c * d - 1) < _CONTINUED_FRACTION_PRECISION:
            break
    return value


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
