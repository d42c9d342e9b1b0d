"""The latency harness finds no difference where there is none, finds one that is there, and costs little."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import stopwatch

from rlrc.benchmarks.measure import latency
from rlrc.benchmarks.results.stats import Estimate


class Busy:
    """Takes a millisecond."""

    def infer(self, observation: Any) -> Any:
        end = time.perf_counter() + 1e-3
        while time.perf_counter() < end:
            pass
        return {"timing": {"preprocess_ms": 0.0, "vision_ms": 0.0, "decoder_ms": 1.0, "postprocess_ms": 0.0}}

    def reset(self) -> None: ...


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warm-up of one call."""
    monkeypatch.setattr(latency, "warm_up", lambda call, patience: (1, bool(call() or True), 1.0))


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.99, 1.01, "no difference"),
        (1.01, 1.02, "no difference"),  # certain, and too small to count
        (1.0, 1.2, "no difference"),
        (1.04, 1.1, "slower"),
        (0.9, 0.95, "faster"),
    ],
)
def test_words(low: float, high: float, said: str) -> None:
    assert stopwatch.classify(Estimate((low + high) / 2, low, high)) == said


@pytest.mark.usefixtures("steady")
def test_itself_is_the_same_and_a_tenth_more_is_slower() -> None:
    ticks: list[int] = []
    found = stopwatch.check_detection(Busy, [{}], 60, ticks.append)
    assert sum(ticks) == 3 * 60
    assert [(check.found, check.passed) for check in found] == [("no difference", True), ("slower", True)]
    assert found[0].ratio == pytest.approx(1.0, abs=stopwatch.MARGIN)
    assert found[1].ratio == pytest.approx(1.1, abs=0.03)


@pytest.mark.usefixtures("steady")
def test_a_slow_down_that_is_not_there_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "SLOWDOWN", 0.0)
    missed = stopwatch.check_detection(Busy, [{}], 60)[1]
    assert (missed.found, missed.passed) == ("no difference", False)


def test_script(toy_artifact: Path, capsys: Any) -> None:
    code = stopwatch.main([str(toy_artifact), "--trials", "40", "--calls", "200"])
    printed = capsys.readouterr().out
    assert "the same artifact twice: " in printed
    assert "the artifact slowed by 10%: " in printed
    assert "added to every latency: " in printed
    # An inference of 0.1 ms on a busy machine proves nothing; the exit code has to follow the checks.
    assert code == (1 if "FAIL" in printed else 0)


def test_the_stop_watch_is_cheap() -> None:
    cost = stopwatch.measure_cost(2000)
    assert 0 < cost["added_us"]["p50"] < cost["whole_us"]["p50"] < stopwatch.LIMIT_US
    assert cost["whole_us"]["p90"] < stopwatch.LIMIT_US


def test_a_slow_stop_watch_fails(toy_artifact: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    infer = stopwatch.IdlePolicy.infer

    def slow(self: Any, observation: Any) -> Any:
        time.sleep(100e-6)
        return infer(self, observation)

    monkeypatch.setattr(stopwatch.IdlePolicy, "infer", slow)
    assert stopwatch.main([str(toy_artifact), "--trials", "20", "--calls", "50"]) == 1
    assert "FAIL: the harness costs" in capsys.readouterr().out
