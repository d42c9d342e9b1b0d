"""Stopping `rlrc run` as an operator does: signals, a key, a button. In a process of its own, on the rig's arm."""

from __future__ import annotations

import os
import pty
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from driven import PROFILE, Running

from rlrc.runtime.cli import main


def check_held(printed: str, rows: list[dict[str, Any]], reason: str) -> None:
    assert f"asked to stop: {reason}" in printed
    stopped = [row["stopped"] for row in rows]
    first = stopped.index(True)
    assert first > 5
    assert all(stopped[first:])
    assert all(row["held"] for row in rows[first:])
    commands = [[row["command.shoulder"], row["command.elbow"]] for row in rows]
    assert commands[0] != commands[first - 1]  # it had moved
    # The last command stands still: nothing but rest came of the one before.
    assert commands[-1] == pytest.approx(commands[-2], abs=1e-6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_and_another_one_hold_the_arm(arm_toy: Path, tmp_path: Path, number: signal.Signals) -> None:
    running = Running(arm_toy, tmp_path)
    assert "signals SIGINT, SIGTERM" in running.sources
    for _ in range(2):
        os.killpg(running.process.pid, number)  # as a terminal does: to inference as well
        time.sleep(0.02)
    check_held(*running.end(), f"signal {number.name}")


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Whoever types, and what is typed into."""
    ends = pty.openpty()
    yield ends
    for end in ends:
        os.close(end)


def test_any_key_holds_the_arm(arm_toy: Path, tmp_path: Path, terminal: tuple[int, int]) -> None:
    running = Running(arm_toy, tmp_path, keyboard=terminal[1])
    assert "any key" in running.sources
    os.write(terminal[0], b" ")
    check_held(*running.end(), "a key")


def test_a_key_re_arms_and_another_ends(arm_toy: Path, tmp_path: Path, terminal: tuple[int, int]) -> None:
    running = Running(arm_toy, tmp_path, "--rearm", keyboard=terminal[1])
    assert running.process.stdout is not None
    lines = []
    for key, told in ((b" ", "stopped: asked to stop: a key; held"), (b"R", "re-armed by a key"), (b" ", "stopped:")):
        os.write(terminal[0], key)
        lines.append(running.process.stdout.readline())
        assert told in lines[-1]
        time.sleep(1.5)
    os.write(terminal[0], b"q")
    printed, rows = running.end()
    stopped = [row["stopped"] for row in rows]
    first = stopped.index(True)
    again = stopped.index(False, first)
    assert stopped[again + 10 :].count(True) > 10
    shoulder = [row["command.shoulder"] for row in rows]
    assert shoulder[again - 1] == pytest.approx(shoulder[again - 2], abs=1e-6)  # held
    assert len({round(value, 4) for value in shoulder[again : again + 15]}) > 3  # moves again
    assert "asked to stop: a key" in printed


def test_a_button_holds_the_arm(arm_toy: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "button")
    pressing = os.open(tmp_path / "button", os.O_RDWR)
    running = Running(arm_toy, tmp_path, "--button", str(tmp_path / "button"))
    os.write(pressing, b"1")
    printed, rows = running.end()
    os.close(pressing)
    check_held(printed, rows, "the button")


def test_a_robot_that_is_not_there_is_refused(
    arm_toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "absent.py").write_text(
        "from rlrc.robots.robot import RobotError\n"
        "def open_robot(spec, instruction):\n"
        "    raise RobotError('the arm is off')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["run", str(arm_toy), "--driver", "absent:open_robot", "--profile", str(PROFILE), "--hz", "20"]
    assert main(command) == 2
    assert "expected a robot that answers, found: the arm is off; check it" in capsys.readouterr().err
