"""The load test (tests/robustness/load.py) for a few seconds. Its latency ratio needs a quiet machine."""

from __future__ import annotations

import json
from pathlib import Path

import load
import pytest

PROFILE = str(Path(__file__).parents[1] / "examples/udp_arm.toml")


def test_nothing_breaks_with_a_malicious_client(arm_toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "BUSY", 0.05)  # the toy policy is fast
    out = tmp_path / "load.json"
    attacks = ("gzip bodies", "many header fields")
    load.main(arm_toy, minutes=0.1, stop_seconds=0.4, attacks=attacks, profile=PROFILE, out=out)
    result = json.loads(out.read_text())
    assert [(row["name"], row["clients"]) for row in result["rows"]] == [
        ("alone", 1), ("honest", 15), ("honest and malicious", 15)
    ]  # fmt: skip
    for row in result["rows"]:
        assert row["refused"] == {}
        assert all(0 < client["p50_ms"] <= client["p99_ms"] <= row["max_ms"] for client in row["each"])
        assert sum(client["calls"] for client in row["each"]) == row["calls"]
    ratio = result["rows"][2]["p99_ms"] / result["rows"][1]["p99_ms"]
    assert result["ratios"]["p99_beside_malicious_to_honest"] == pytest.approx(ratio)
    assert result["malicious"]["rounds"] >= 0
    assert len(result["malicious"]["steps"]) >= 10
    for program in ("serve", "run"):
        assert [row["attack"] for row in result["stops"][program]] == ["none", *attacks]
        for row in result["stops"][program]:
            assert {"kept", "new", "page"} <= row.keys()
            assert (row["connections"] > 0) == (row["attack"] != "none")
            for way in ("kept", "new"):
                assert row[way]["stops"] > 0
                assert row[way]["p50_ms"] < 1000  # tests/robustness/load.py limits the 99th percentile to 0.1 s
                assert row[way]["failed"] == {}
    assert result["newcomers"].keys() == {"answered"}
    assert set(result["afterwards"]["answers"].values()) == {"answered"}
    assert (result["afterwards"]["exit_code"], result["afterwards"]["tracebacks"]) == (0, 0)


def test_unmet_requirements_are_reported() -> None:
    ratios, memory = {"p99_beside_malicious_to_honest": 1.51}, {"server_growth_mb": 65.0}
    rows = [{"refused": {"busy": 2}}]
    after = {"answers": {"openpi": "answered", "gr00t": "gone"}, "exit_code": 1, "tracebacks": 3}
    assert len(load.faults(ratios, memory, rows, {"answered": 3, "503": 1}, after)) == 7
    ratios, memory, rows = {"p99_beside_malicious_to_honest": 1.5}, {"server_growth_mb": 64.0}, [{"refused": {}}]
    after = {"answers": {"openpi": "answered"}, "exit_code": 0, "tracebacks": 0}
    assert load.faults(ratios, memory, rows, {"answered": 3}, after) == []


def test_late_and_failed_stops_are_reported() -> None:
    good, late = {"p99_ms": 99.0, "failed": {}}, {"p99_ms": 101.0, "failed": {}}
    failed = {"p99_ms": 1.0, "failed": {"TimeoutError": 1}}
    rows = [{"attack": "none", "kept": good, "new": good, "page": late}]
    assert load.late_stops({"run": rows}) == []
    rows = [{"attack": "x", "kept": late, "new": failed, "page": good}]
    assert [line.split(":")[0] for line in load.late_stops({"run": rows})] == [
        "stop of rlrc run during x (kept connection)", "stop of rlrc run during x (new connection)"
    ]  # fmt: skip


def test_memory_is_compared_with_that_after_the_first_minute() -> None:
    samples = [
        {"seconds": float(second), "server_mb": megabytes, "inference_mb": 50.0, "files": 20.0}
        for second, megabytes in ((0, 90.0), (30, 150.0), (60, 120.0), (90, 125.0), (120, 121.0))
    ]
    found = load.memory_growth(samples, 120)
    assert (found["server_growth_mb"], found["server_most_mb"]) == (5.0, 150.0)
