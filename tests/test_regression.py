"""What counts as worse: beyond the tolerance and beyond the noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrc.benchmarks.claims import regression
from rlrc.benchmarks.cli.compare import fraction
from rlrc.benchmarks.results import results, stats
from rlrc.errors import UserError
from rlrc.runtime.cli import main

MACHINE = {"device": "x86_64", "cpu": "A", "cores": 2, "threads": 1, "versions": {"numpy": "2.0"}}


def latency(factor: float = 1.0, noise: float = 0.02, seed: int = 0, rounds: int = 50) -> dict[str, Any]:
    """Ten trials a round, which share the round's mood."""
    random = np.random.default_rng(seed)
    trials = factor * 10 * random.lognormal(0, noise, (rounds, 1)) * random.lognormal(0, noise / 2, (rounds, 10))
    return {
        "name": "a",
        "trials_ms": trials.ravel().tolist(),
        "block": 10,
        "latency_ms": stats.percentiles(trials.ravel().tolist()),
    }


def result(*rows: dict[str, Any], **machine: Any) -> dict[str, Any]:
    return {"kind": "results", "command": "x", "machine": MACHINE | machine, "rows": list(rows)}


def verdicts(old: dict[str, Any], new: dict[str, Any], tolerance: float = 0.1) -> dict[str, str]:
    changes = regression.compare_results(result(old), result(new), tolerance)
    return {change.figure: change.verdict for change in changes}


@pytest.mark.parametrize(
    ("factor", "expected"), [(1.0, "same"), (1.05, "same"), (1.2, "REGRESSION"), (0.97, "same"), (0.8, "better")]
)
def test_latency_against_the_tolerance(factor: float, expected: str) -> None:
    assert verdicts(latency(), latency(factor, seed=1))["p50"] == expected


def test_a_slow_down_of_a_tenth_is_seen_with_a_small_tolerance() -> None:
    assert verdicts(latency(), latency(1.1, seed=1), 0.05)["p50"] == "REGRESSION"
    assert verdicts(latency(), latency(1.0, seed=1), 0.05)["p50"] == "same"


def test_noise_does_not_fail_the_gate() -> None:
    """Three rounds whose moods differ by half: a median 15 % higher may be chance."""
    old, new = latency(1.0, 0.5, 3, rounds=3), latency(1.0, 0.5, 4, rounds=3)
    change = next(one for one in regression.compare_results(result(old), result(new), 0.1) if one.figure == "p50")
    assert change.change is not None
    assert change.change.low < 1 < change.change.high
    assert change.verdict in ("unclear", "same")


def test_interval_of_a_change_covers_the_truth() -> None:
    """95 % of intervals should; of 60, 50 at least (the chance of fewer is below 0.1 %)."""
    covered = 0
    for seed in range(60):
        old, new = (latency(factor, 0.05, 2 * seed + i, 20) for i, factor in enumerate((1.0, 1.3)))
        rounds = [np.reshape(row["trials_ms"], (20, 10)).tolist() for row in (new, old)]
        estimate = stats.percentile_change(*rounds, resamples=300)
        covered += estimate.low < 1.3 < estimate.high
    assert covered >= 50


def test_student_against_published_values() -> None:
    """Two-sided 95 % and 99 %: Fisher's table."""
    for degrees, expected in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert stats.student(0.95, degrees) == pytest.approx(expected, rel=2e-3)
    assert stats.student(0.99, 10) == pytest.approx(3.169, rel=2e-3)


def memory(pss: float, low: float, high: float) -> dict[str, Any]:
    spread = {"pss": [low, high], "peak": [low, high]}
    return {"name": "a", "memory": {"own": {"pss": pss, "peak": pss}, "own_range": spread}}


def test_memory_within_its_own_spread_is_unclear() -> None:
    assert verdicts(memory(100, 90, 130), memory(120, 110, 130))["own memory"] == "unclear"
    assert verdicts(memory(100, 99, 101), memory(120, 119, 121))["own memory"] == "REGRESSION"
    assert verdicts(memory(100, 99, 101), memory(108, 107, 109))["own memory"] == "same"


def test_bytes_have_no_noise() -> None:
    assert verdicts({"name": "a", "bytes": 100}, {"name": "a", "bytes": 111}) == {"bytes": "REGRESSION"}
    assert verdicts({"name": "a", "bytes": 100}, {"name": "a", "bytes": 110}) == {"bytes": "same"}


def test_of_rates_more_is_better() -> None:
    def rate(value: float) -> dict[str, Any]:
        return {"name": "a", "throughput": {"2": {"chunks_per_s": value, "interval": [value - 1, value + 1]}}}

    assert verdicts(rate(100), rate(80)) == {"throughput, 2 at once": "REGRESSION"}
    assert verdicts(rate(80), rate(100)) == {"throughput, 2 at once": "better"}


def success(solved: int, episodes: int = 100, outcomes: str = "") -> dict[str, Any]:
    row: dict[str, Any] = {"name": "a", "success": solved / episodes, "episodes": episodes}
    return row | ({"outcomes": {"task": outcomes}, "scenes": "the same"} if outcomes else {})


def test_success_by_its_interval() -> None:
    assert verdicts(success(99), success(97)) == {"success": "same"}
    assert verdicts(success(90), success(85)) == {"success": "unclear"}  # upper limit of the difference +0.03
    assert verdicts(success(90), success(60)) == {"success": "REGRESSION"}
    assert verdicts(success(60), success(90)) == {"success": "better"}


def test_success_scene_by_scene_sees_more() -> None:
    """Six of a hundred scenes lost and none won: beyond chance when paired, within it when not."""
    old, new = success(90, outcomes="1" * 90 + "0" * 10), success(84, outcomes="1" * 84 + "0" * 16)
    assert verdicts(success(90), success(84)) == {"success": "unclear"}
    assert verdicts(old, new) == {"success": "REGRESSION"}


def test_what_is_gone_fails() -> None:
    assert verdicts(latency(), {"name": "b"}) == {"everything": "MISSING"}
    assert verdicts(latency(), {"name": "a"}) == {"p50": "MISSING", "p99": "MISSING"}
    assert verdicts(success(9, 10), {"name": "a"}) == {"success": "MISSING"}


@pytest.mark.parametrize("other", [{"cpu": "B"}, {"cores": 4}, {"threads": 2}, {"power_mode": "15W"}])
def test_machines_of_another_class_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="one class of machine"):
        regression.compare_results(result(latency()), result(latency(), **other), 0.1)


def test_a_share_as_it_is_written() -> None:
    assert fraction("10%") == pytest.approx(0.1)
    assert fraction("0.05") == 0.05
    for text in ("ten", "-1%", "nan", "1000%"):
        with pytest.raises(UserError, match="expected a share"):
            fraction(text)


def test_command_is_a_gate(tmp_path: Path, capsys: Any) -> None:
    files = {}
    for name, rows in (("old", [latency()]), ("same", [latency(seed=1)]), ("worse", [latency(1.3, seed=1)])):
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(results.dump(result(*rows)))
    assert main(["bench", "compare", str(files["old"]), str(files["same"])]) == 0
    assert "PASS" in capsys.readouterr().out
    assert main(["bench", "compare", str(files["old"]), str(files["worse"])]) == 1
    assert "FAIL: p50 of a" in capsys.readouterr().out
    assert main(["bench", "compare", str(files["old"]), str(files["worse"]), "--tolerance", "50%", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "PASS"
    assert main(["bench", "compare", str(files["old"]), str(files["same"]), "--tolerance", "some"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_is_no_result_file(tmp_path: Path, force: bool) -> None:
    with pytest.raises(UserError, match=r"expected a file, found the folder .*; name a file in it"):
        results.check_out(tmp_path, force)
