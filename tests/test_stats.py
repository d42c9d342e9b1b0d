"""Intervals and tests against published tables, hand-computed numbers, and what they promise in repetition."""

from __future__ import annotations

import numpy as np
import pytest

from rlrc.benchmarks.results import stats


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_reproduces_published_intervals(successes: int, episodes: int, low: float, high: float) -> None:
    assert stats.wilson(successes, episodes) == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_the_ends() -> None:
    assert stats.wilson(0, 10)[0] == 0.0
    assert stats.wilson(10, 10)[1] == 1.0
    assert stats.wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="11 of 10"):
        stats.wilson(11, 10)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17:873, table II, method 6 (Miettinen and Nurminen), two-sided 95 %.
    [
        ((56, 70, 48, 80), 0.0528, 0.3382),
        ((9, 10, 3, 10), 0.1700, 0.8406),
        ((6, 7, 2, 7), 0.0342, 0.8534),
        ((5, 56, 0, 29), -0.0326, 0.1933),
        ((0, 10, 0, 20), -0.1658, 0.2844),
        ((10, 10, 0, 10), 0.7121, 1.0),
    ],
)
def test_independent_difference_reproduces_published_intervals(counts: tuple, low: float, high: float) -> None:
    x, n, x0, n0 = counts
    # A one-sided limit at 97.5 % is the end of the two-sided interval at 95 %; the other end by exchanging the samples.
    assert stats.difference_limit(x, n, x0, n0, 0.975) == pytest.approx(low, abs=5e-5)
    assert -stats.difference_limit(x0, n0, x, n, 0.975) == pytest.approx(high, abs=5e-5)


@pytest.mark.parametrize(
    ("only", "only0", "pairs", "low", "high"),
    # R, PropCIs::scoreci.mp(60, 20, 1000) and (41, 48, 549, conf.level = 0.9), to its four decimals.
    [(20, 60, 1000, -0.0584, -0.0231)],
)
def test_paired_difference_reproduces_tango(only: int, only0: int, pairs: int, low: float, high: float) -> None:
    assert stats.paired_difference_limit(only, only0, pairs, 0.975) == pytest.approx(low, abs=5e-5)
    assert -stats.paired_difference_limit(only0, only, pairs, 0.975) == pytest.approx(high, abs=5e-5)


def test_paired_difference_at_90_percent() -> None:
    # 48 and 41 discordant of 549: [-1.57 %, +4.14 %] by PropCIs at 90 %.
    assert stats.paired_difference_limit(48, 41, 549, 0.95) == pytest.approx(-0.0157, abs=5e-5)
    assert -stats.paired_difference_limit(41, 48, 549, 0.95) == pytest.approx(0.0414, abs=5e-5)


def test_pairing_pays_where_the_policies_agree() -> None:
    """450 of 500 each: as independent samples not even equal policies pass a margin of 0.03; scene by scene they do."""
    assert stats.difference_limit(450, 500, 450, 500) < -0.03
    assert stats.paired_difference_limit(15, 15, 500) > -0.03
    assert stats.paired_difference_limit(0, 0, 500) == pytest.approx(-0.0054, abs=1e-4)


def test_no_episodes_prove_nothing() -> None:
    assert stats.difference_limit(0, 0, 5, 10) == -1.0
    assert stats.paired_difference_limit(0, 0, 0) == -1.0


def test_limits_hold_as_often_as_they_promise() -> None:
    """One-sided 95 % limits of a true difference of -0.03 lie above it in 5 % of the studies, give or take."""
    random = np.random.default_rng(0)
    studies, n = 400, 300
    ours, theirs = random.binomial(n, 0.87, studies), random.binomial(n, 0.90, studies)
    misses = np.mean([stats.difference_limit(int(x), n, int(y), n) > -0.03 for x, y in zip(ours, theirs, strict=True)])
    assert misses == pytest.approx(0.05, abs=0.03)
    cells = random.multinomial(n, [0.06, 0.09, 0.85], studies)
    misses = np.mean([stats.paired_difference_limit(int(b), int(c), n) > -0.03 for b, c, _ in cells])
    assert misses == pytest.approx(0.05, abs=0.03)


def test_mcnemar_by_hand() -> None:
    assert stats.mcnemar(1, 9) == pytest.approx(2 * (1 + 10) / 2**10)
    assert stats.mcnemar(5, 5) == 1.0
    assert stats.mcnemar(0, 0) == 1.0


def test_percentiles_by_hand() -> None:
    expected = {"p50": 3.0, "p90": 4.6, "p99": 4.96, "p99.9": 4.996}
    assert stats.percentiles([4.0, 1.0, 3.0, 2.0, 5.0]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least one"):
        stats.percentiles([])


def test_ratio_interval_holds_the_ratio_and_tells_equals_from_slower() -> None:
    random = np.random.default_rng(1)
    # Every round has its own mood, which both policies share.
    mood = random.lognormal(0, 0.3, (60, 1))
    fast, slow, other = ((scale * mood * random.lognormal(0, 0.05, (60, 10))).tolist() for scale in (2.0, 5.0, 2.0))
    ratio = stats.ratio_interval(slow, fast)
    assert ratio.low < 2.5 < ratio.high
    assert ratio.high - ratio.low < 0.5
    same = stats.ratio_interval(other, fast)
    assert same.low < 1.0 < same.high


def test_ratio_interval_of_constant_trials_is_a_point() -> None:
    ratio = stats.ratio_interval([[6.0, 6.0]] * 3, [[2.0, 2.0]] * 3)
    assert (ratio.value, ratio.low, ratio.high) == (3.0, 3.0, 3.0)


def test_ratio_interval_needs_the_same_rounds() -> None:
    with pytest.raises(ValueError, match="same two or more rounds"):
        stats.ratio_interval([[1.0]], [[1.0]])
    with pytest.raises(ValueError, match="same two or more rounds"):
        stats.ratio_interval([[1.0], [1.0]], [[1.0], [1.0], [1.0]])
