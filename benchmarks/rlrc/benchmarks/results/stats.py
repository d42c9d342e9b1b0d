"""The statistics behind every interval and verdict. Standard library and numpy only.

Success is a proportion: Wilson intervals for one policy; for two, the lower confidence limit of the difference, from
Tango's score test for the same scenes, from Miettinen and Nurminen's for independent ones. Latency is a distribution:
percentiles, and a bootstrap over the rounds of an interleaved run for the ratio of two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb, pi, sqrt, tan
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence limits."""

    value: float
    low: float
    high: float


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Wilson score interval of a proportion (Wilson 1927). (0, 1) without episodes."""
    if not 0 <= successes <= episodes:
        raise ValueError(f"expected 0 <= successes <= episodes, found {successes} of {episodes}")
    if episodes == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / episodes
    centre = (p + z * z / (2 * episodes)) / (1 + z * z / episodes)
    half = z / (1 + z * z / episodes) * sqrt(p * (1 - p) / episodes + z * z / (4 * episodes**2))
    # At 0 and n successes the limit is exactly 0 or 1; rounding could exceed it by 1e-17.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == episodes else centre + half)


def difference_limit(successes: int, episodes: int, successes0: int, episodes0: int, confidence: float = 0.95) -> float:
    """One-sided lower confidence limit of p - p0 for two independent samples.

    Inverts the score test with the variance under the hypothesised difference (Miettinen and Nurminen 1985, Statistics
    in Medicine 4:213). "Not worse than the baseline by more than m" holds at this confidence when the limit is above
    -m.
    """
    if episodes == 0 or episodes0 == 0:
        return -1.0
    p, p0, total = successes / episodes, successes0 / episodes0, episodes + episodes0

    def score(delta: float) -> float:
        restricted = _restrict(successes, episodes, successes0, episodes0, delta)
        variance = (restricted + delta) * (1 - restricted - delta) / episodes
        variance += restricted * (1 - restricted) / episodes0
        return _standardise(p - p0 - delta, variance * total / (total - 1))

    return _lower_limit(score, p - p0, confidence)


def _restrict(successes: int, episodes: int, successes0: int, episodes0: int, delta: float) -> float:
    """Maximum likelihood of p0 under p = p0 + delta: the admissible root of a cubic (ibid., appendix 1)."""
    total = episodes + episodes0
    cubic = [
        total,
        (episodes + 2 * episodes0) * delta - total - successes - successes0,
        (episodes0 * delta - total - 2 * successes0) * delta + successes + successes0,
        successes0 * delta * (1 - delta),
    ]
    low, high = max(0.0, -delta), min(1.0, 1.0 - delta)
    roots = np.roots(cubic)
    # One real root lies in the range. A double root at its end has a small imaginary part, so complex roots are kept.
    candidates = np.clip(roots.real, low, high)
    return float(candidates[np.argmin(np.abs(roots - candidates))])


def paired_difference_limit(only: int, only0: int, pairs: int, confidence: float = 0.95) -> float:
    """One-sided lower confidence limit of p - p0 when both policies ran the same ``pairs`` scenes.

    ``only`` scenes were solved by the policy alone, ``only0`` by the baseline alone. Inverts the score test of Tango
    (1998), Statistics in Medicine 17:891, equations 24 to 26. Narrower than the independent limit where the two agree
    on most scenes.
    """
    if pairs == 0:
        return -1.0

    def score(delta: float) -> float:
        a = 2 * pairs
        b = -only - only0 + (2 * pairs - only + only0) * delta
        c = -only0 * delta * (1 - delta)
        restricted = (sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)  # of the cell "baseline alone"
        return _standardise(only - only0 - pairs * delta, pairs * (2 * restricted + delta * (1 - delta)))

    return _lower_limit(score, (only - only0) / pairs, confidence)


def _standardise(difference: float, variance: float) -> float:
    if variance > 1e-15:
        return difference / sqrt(variance)
    return 0.0 if abs(difference) < 1e-12 else float("inf") if difference > 0 else float("-inf")


def _lower_limit(score: Callable[[float], float], estimate: float, confidence: float) -> float:
    """The smallest difference that the score test does not reject, by bisection; the score is decreasing."""
    critical = NormalDist().inv_cdf(confidence)
    low, high = -1.0, estimate
    for _ in range(60):
        middle = (low + high) / 2
        if score(middle) > critical:
            low = middle
        else:
            high = middle
    return high


def mcnemar(only: int, only0: int) -> float:
    """Two-sided exact p-value for both solving equally many scenes, from the scenes that only one of them solved."""
    discordant = only + only0
    tail = sum(comb(discordant, k) for k in range(min(only, only0) + 1))
    return float(min(1.0, 2 * tail / 2**discordant))


def percentiles(values: Sequence[float], which: Sequence[float] = (50, 90, 99, 99.9)) -> dict[str, float]:
    """{"p50": ..., ...}, linear between neighbouring trials."""
    if not len(values):
        raise ValueError("expected at least one trial, found none")
    return {f"p{q:g}": float(np.percentile(values, q)) for q in which}


def ratio_interval(
    slow: Sequence[Sequence[float]],
    fast: Sequence[Sequence[float]],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Ratio of medians ``slow / fast`` with a percentile bootstrap interval over rounds.

    Both are (rounds, trials) of one interleaved run. Whole rounds are drawn with replacement, the same ones for both,
    because neighbouring trials are correlated, within a policy and between the two.
    """
    a, b = np.asarray(slow, dtype=float), np.asarray(fast, dtype=float)  # (R, T), (R, T')
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < 2:
        raise ValueError(
            f"expected the same two or more rounds of trials for both, found shapes {a.shape} and {b.shape}"
        )
    draws = np.random.default_rng(seed).integers(0, len(a), (resamples, len(a)))
    ratios = [np.median(a[rounds]) / np.median(b[rounds]) for rounds in draws]
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(np.median(a) / np.median(b)), float(low), float(high))


def percentile_change(
    new: Sequence[Sequence[float]],
    old: Sequence[Sequence[float]],
    percentile: float = 50,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Ratio ``new / old`` of a percentile of two separate runs, with a bootstrap interval over the rounds of each.

    Unlike in ``ratio_interval``, rounds are not paired.
    """
    random = np.random.default_rng(seed)
    a, b = (_draw(rounds, percentile, resamples, random) for rounds in (new, old))
    low, high = np.quantile(a / b, [(1 - confidence) / 2, (1 + confidence) / 2])
    whole = [float(np.percentile(np.concatenate([*map(np.asarray, rounds)]), percentile)) for rounds in (new, old)]
    return Estimate(whole[0] / whole[1], float(low), float(high))


def percentile_interval(
    rounds: Sequence[Sequence[float]],
    percentile: float = 50,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """A percentile of one run, with a bootstrap interval over its rounds."""
    samples = _draw(rounds, percentile, resamples, np.random.default_rng(seed))
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    whole = float(np.percentile(np.concatenate([*map(np.asarray, rounds)]), percentile))
    return Estimate(whole, float(low), float(high))


def _draw(
    rounds: Sequence[Sequence[float]], percentile: float, resamples: int, random: np.random.Generator
) -> np.ndarray:
    """Bootstrap samples of a percentile: (resamples,), rounds drawn with replacement."""
    if len(rounds) < 2:
        raise ValueError(f"expected two or more rounds, found {len(rounds)}")
    trials = [np.asarray(one, float) for one in rounds]
    picks = random.integers(0, len(trials), (resamples, len(trials)))
    return np.array([np.percentile(np.concatenate([trials[i] for i in pick]), percentile) for pick in picks])


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """A mean with Student's confidence interval."""
    if len(values) < 2:
        raise ValueError(f"expected two or more values, found {len(values)}")
    mean = float(np.mean(values))
    half = student(confidence, len(values) - 1) * float(np.std(values, ddof=1)) / sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def student(confidence: float, degrees: int) -> float:
    """Two-sided critical value of Student's t: the normal quantile corrected for few degrees of freedom.

    Abramowitz and Stegun (1964), 26.7.5: within 0.1 % from three degrees on; one and two are exact.
    """
    tail = (1 + confidence) / 2
    if degrees == 1:
        return tan(pi * (tail - 0.5))
    if degrees == 2:
        return (2 * tail - 1) / sqrt(2 * tail * (1 - tail))
    z, n = NormalDist().inv_cdf(tail), degrees
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / n**power for power, term in enumerate(terms, 1)))
