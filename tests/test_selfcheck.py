"""The harness' own checks: it finds no difference where there is none, and one that is there."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from rlrc.benchmarks.measure import latency, selfcheck
from rlrc.benchmarks.results.stats import Estimate
from rlrc.runtime.cli import main


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
    assert selfcheck.word(Estimate((low + high) / 2, low, high)) == said


@pytest.mark.usefixtures("steady")
def test_itself_is_the_same_and_a_tenth_more_is_slower() -> None:
    ticks: list[int] = []
    found = selfcheck.findings(Busy, [{}], 60, ticks.append)
    assert sum(ticks) == 3 * 60
    assert [(finding.said, finding.verdict) for finding in found] == [("no difference", "PASS"), ("slower", "PASS")]
    assert found[0].ratio == pytest.approx(1.0, abs=selfcheck.MARGIN)
    assert found[1].ratio == pytest.approx(1.1, abs=0.03)


@pytest.mark.usefixtures("steady")
def test_a_slow_down_that_is_not_there_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "SLOWER", 0.0)
    missed = selfcheck.findings(Busy, [{}], 60, lambda _: None)[1]
    assert (missed.said, missed.verdict) == ("no difference", "FAIL")


def test_command(toy_artifact: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "selfcheck.json"
    code = main(["bench", "selfcheck", str(toy_artifact), "--trials", "40", "--out", str(out)])
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert "in alternating blocks of one run" in printed
    assert [check["what"] for check in result["checks"]] == ["the same artifact twice", "the same, slowed by 10%"]
    # An inference of 0.1 ms on a busy machine proves nothing; that the exit code follows is what is tested.
    assert code == (0 if all(check["verdict"] == "PASS" for check in result["checks"]) else 1)
