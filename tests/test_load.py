"""The load test (scripts/load.py) for seconds: nothing breaks. The ratio that it is about needs a quiet machine."""

from __future__ import annotations

import json
from pathlib import Path

import load
import pytest


def test_nothing_breaks_beside_the_malicious_client(
    toy_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "BUSY", 0.05)  # of a policy that hardly computes
    out = tmp_path / "load.json"
    load.main(toy_artifact, minutes=0.1, out=out)
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
    assert result["newcomers"].keys() == {"answered"}
    assert set(result["afterwards"]["answers"].values()) == {"answered"}
    assert (result["afterwards"]["exit_code"], result["afterwards"]["tracebacks"]) == (0, 0)


def test_what_is_not_kept_is_said() -> None:
    ratios, memory = {"p99_beside_malicious_to_honest": 1.51}, {"server_growth_mb": 65.0}
    rows = [{"refused": {"busy": 2}}]
    after = {"answers": {"openpi": "answered", "gr00t": "gone"}, "exit_code": 1, "tracebacks": 3}
    assert len(load.faults(ratios, memory, rows, {"answered": 3, "503": 1}, after)) == 7
    ratios, memory, rows = {"p99_beside_malicious_to_honest": 1.5}, {"server_growth_mb": 64.0}, [{"refused": {}}]
    after = {"answers": {"openpi": "answered"}, "exit_code": 0, "tracebacks": 0}
    assert load.faults(ratios, memory, rows, {"answered": 3}, after) == []


def test_memory_is_compared_with_that_after_the_first_minute() -> None:
    samples = [
        {"seconds": float(second), "server_mb": megabytes, "inference_mb": 50.0, "files": 20.0}
        for second, megabytes in ((0, 90.0), (30, 150.0), (60, 120.0), (90, 125.0), (120, 121.0))
    ]
    found = load.grown(samples, 120)
    assert (found["server_growth_mb"], found["server_most_mb"]) == (5.0, 150.0)
