"""What the benchmark of the loop makes of its steps; the steps themselves are those of tests/test_control_loop.py."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrc import realtime
from rlrc.benchmarks.cli.loop import draw
from rlrc.benchmarks.cli.output import plain_progress
from rlrc.benchmarks.control import scenarios
from rlrc.benchmarks.control.background_load import background_load, timer
from rlrc.errors import UserError
from rlrc.runtime.cli import main
from rlrc.runtime.control import telemetry
from rlrc.runtime.control.telemetry import Telemetry


def told(chunks: list[int], commands: list[list[float]], first: int = 0) -> Telemetry:
    kept = Telemetry(16, len(commands[0]))
    for step, (chunk, command) in enumerate(zip(chunks, commands, strict=True)):
        kept.begin(first + step, 0.1 * step, 0)
        kept.write(np.array(command), chunk=chunk, sent=0.1 * step + 0.001)
    return kept


def test_jumps_are_where_chunks_meet() -> None:
    commands = [[0.0, 0.1, 1], [0.1, 0.1, 1], [0.4, 0.0, -1], [0.5, 0.0, -1], [0.5, -0.7, -1]]
    jumps = scenarios.splice_jumps(told([1, 1, 2, 2, 3], commands))
    np.testing.assert_allclose(jumps, [0.3, 0.7], rtol=1e-5)  # the gripper does not count


def test_episodes_are_joined_but_do_not_meet() -> None:
    one, other = told([1, 1], [[0.0, 0], [0.1, 0]]), told([1, 2], [[5.0, 0], [5.5, 0]])
    whole = scenarios.join_telemetry([one, other])
    assert whole.rows["step"].tolist() == [0, 1, 0, 1]
    np.testing.assert_allclose(whole.commands[:, 0], [0, 0.1, 5, 5.5], rtol=1e-6)
    np.testing.assert_allclose(scenarios.splice_jumps(whole), [0.5], rtol=1e-6)


def test_jitter_is_the_distance_from_whole_periods() -> None:
    sent = np.array([0.0, 0.101, 0.2, 0.4, 0.497])  # gaps 0.101, 0.099, 0.2, 0.097
    gaps = [1.0, 1.0, 0.0, 3.0]
    assert telemetry.jitter(np.diff(sent), 0.1) == pytest.approx(np.percentile(gaps, 99))


def test_a_stall_is_told_with_what_the_timer_did_then() -> None:
    kept = told([1, 1, 1], [[0.0, 0]] * 3)
    kept.rows["held"][1], kept.rows["guard_ms"][1], kept.rows["sent"][1] = True, 25.0, 0.125
    woken = np.array([0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.14, 0.16, 0.19])
    (found,) = scenarios.stalls(kept.rows, woken)
    assert (found["guard_ms"], found["held"], found["timer_ms"]) == (25.0, True, 20.0)


def test_jitter_is_that_within_episodes() -> None:
    one, other = told([1, 1], [[0.0, 0], [0.1, 0]]), told([1, 2], [[5.0, 0], [5.5, 0]])
    other.rows["sent"] += 7.05  # an episode begins when it begins
    whole = scenarios.join_telemetry([one, other])
    assert telemetry.summary(whole, 0.1)["jitter_ms_p99"] == pytest.approx(0, abs=1e-9)
    whole.rows["sent"][3] += 0.02
    assert telemetry.summary(whole, 0.1)["jitter_ms_p99"] == pytest.approx(20, rel=0.02)


def test_a_log_of_the_steps(tmp_path: Path) -> None:
    kept = told([1, 2], [[0.5, 0.0], [0.25, 1.0]])
    telemetry.write(kept, ("dx", "grip"), tmp_path / "log.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(row["step"], row["chunk"], row["command.dx"]) for row in rows] == [(0, 1, 0.5), (1, 2, 0.25)]
    assert "inference_ms" not in rows[0]  # none came
    parquet = pytest.importorskip("pyarrow.parquet")
    telemetry.write(kept, ("dx", "grip"), tmp_path / "log.parquet")
    assert parquet.read_table(tmp_path / "log.parquet")["command.grip"].to_pylist() == [0.0, 1.0]


def test_the_oldest_steps_make_room() -> None:
    kept = Telemetry(4, 1)
    for step in range(10):
        kept.begin(step, 0.0, 0)
        assert (kept.rows["chunk"][-1], kept.rows["place"][-1]) == (0, 0)
        kept.write(np.array([float(step)]), chunk=step, place=step)
    assert kept.steps == 10
    assert kept.rows["step"].tolist() == [6, 7, 8, 9]
    assert kept.commands.ravel().tolist() == [6, 7, 8, 9]


def test_what_is_counted_is_counted_of_all_steps() -> None:
    kept = Telemetry(4, 1)
    for step in range(10):
        kept.begin(step, 0.1 * step, 2 * (step == 3))
        kept.write(None, sent=0.1 * step + 0.001, late=step == 1, held=step % 2, clamped=3 * (step > 5))
    found = telemetry.summary(kept, 0.1)
    assert (found["steps"], found["late_actions"], found["held_steps"]) == (10, 1, 5)
    assert (found["skipped_steps"], found["clamped_steps"]) == (2, 4)
    assert (found["seconds"], found["hz"]) == (pytest.approx(1.0), pytest.approx(10.0))


def test_a_timer_beside_the_loop_tells_what_the_machine_can_do() -> None:
    with timer(100.0) as timed, background_load():
        time.sleep(0.3)
    woken = timed()
    assert 5 <= len(woken) < 200
    assert (np.diff(woken) > 0).all()


def test_real_time_is_put_back() -> None:
    before = os.sched_getscheduler(0)
    allowed = os.sched_getaffinity(0)
    with realtime.real_time(pin=(min(allowed),), background=(2**22 + 1,)) as granted:  # no process has this number
        assert os.sched_getaffinity(0) == {min(allowed)}
        assert not realtime.gc.isenabled()
        assert set(granted) == {"garbage collection", "memory", "priority", "processors"}
    assert realtime.gc.isenabled()
    assert os.sched_getscheduler(0) == before
    assert os.sched_getaffinity(0) == allowed
    with realtime.real_time(pin=(-1,)) as granted:
        assert granted["processors"].startswith("any: ")


def test_the_picture_of_the_jumps(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"name": "replace, 3 periods", "success": 0.9, "splice_jump": {"all": [0.1, 0.4, 0.2]}},
        {"name": "steady"},
    ]
    draw(rows, tmp_path / "jumps.svg")
    assert "replace, 3 periods: success 0.90" in (tmp_path / "jumps.svg").read_text()


def test_what_cannot_be_measured_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "loop", str(tmp_path / "none"), "--episodes", "0"]) == 2
    assert "expected positive minutes, periods and episodes" in capsys.readouterr().err
    with pytest.raises(UserError, match="expected at least one step to sum up"):
        telemetry.summary(Telemetry(4, 1), 0.1)


FREED = """
from rlrc.benchmarks.measure.memory import read_process
from rlrc import realtime

realtime.return_large_blocks()
before, kept = read_process()["anonymous"], []
for _ in range(8):
    block = bytearray(24 << 20)
    kept.append([bytearray(600) for _ in range(100)])  # they may come to lie behind it
    del block
print(read_process()["anonymous"] - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_large_blocks_go_back_to_the_system() -> None:
    found = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 4 << 20  # 24 MB otherwise


def test_progress_without_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with plain_progress("steady", 20) as advance:
        for _ in range(20):
            advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"steady {done}/20" for done in range(2, 21, 2)]
