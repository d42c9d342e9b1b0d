"""The benchmark of what serving costs: two ways, asked in turn, less what the policy took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlrc.benchmarks.control import transport
from rlrc.runtime.cli import main


def test_every_way_is_asked_as_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "TURN", 3)
    monkeypatch.setattr(transport, "WARM", 2)
    out = tmp_path / "serving.json"
    assert main(["bench", "serving", "--size", "32", "--calls", "6", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [row["name"] for row in result["rows"]] == [
        "minimal server, 2 x 32 x 32",
        "rlrc serve, 2 x 32 x 32",
    ]
    for row in result["rows"]:
        spent = row["overhead_ms"]
        assert row["calls"] == 6
        assert 0 < spent["p50"] <= spent["p90"] <= spent["p99"] <= spent["max"] < 5000


def test_what_makes_no_sense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serving", "--cameras", "0"]) == 2
    assert "expected cameras" in capsys.readouterr().err
