"""Throughput by hand."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from rlrc.benchmarks.measure import throughput
from rlrc.runtime.cli import main


class Sleeper:
    """Takes 10 ms of time and none of the processor's."""

    def infer(self, observation: Any) -> Any:
        time.sleep(0.01)

    def reset(self) -> None: ...


def test_what_sleeps_runs_at_once() -> None:
    alone = throughput.measure([Sleeper()], [{}], 0.1, 2)
    together = throughput.measure([Sleeper(), Sleeper()], [{}], 0.1, 2)
    assert [len(taken) for taken in (alone, together)] == [2, 2]
    # However busy the machine is, ten milliseconds are not less.
    assert 0 < alone[0][0] <= 100
    assert max(rate for rate, _ in together) > 1.2 * min(rate for rate, _ in alone)
    assert alone[0][1] < 0.01  # CPU-seconds a chunk


def test_rates_by_hand() -> None:
    """10 and 12 chunks a second: 11, and Student's 12.706 standard errors of 1 to both sides."""
    row = throughput.row([(10.0, 0.1), (12.0, 0.3)], horizon=5)
    assert row["chunks_per_s"] == 11.0
    assert row["interval"] == pytest.approx([11 - 12.7062, 11 + 12.7062], abs=1e-3)
    assert row["actions_per_s"] == 55.0
    assert row["cpu_s_per_chunk"] == 0.2


def test_command_counts_policies_at_once(toy_artifact: Path, capsys: Any) -> None:
    command = ["bench", "throughput", str(toy_artifact), "--seconds", "0.05", "--rounds", "2", "--at-once", "1", "2"]
    assert main([*command, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert list(row["throughput"]) == ["1", "2"]
    one = row["throughput"]["1"]
    assert one["actions_per_s"] == pytest.approx(3 * one["chunks_per_s"], rel=1e-3)  # chunks of 3
    assert main(["bench", "throughput", str(toy_artifact), "--at-once", "0"]) == 2
    assert "at once" in capsys.readouterr().err
