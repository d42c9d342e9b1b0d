"""Stopping `rlrc run` as an operator does: signals, a key, a button. In a process of its own, on the rig's arm."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlrc.runtime.cli import main

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
PROFILE = Path(__file__).parents[1] / "examples/udp_arm.toml"
DRIVER = """
from rlrc.benchmarks.rig import Arm

class Told(Arm):
    def sense(self):
        sensed = super().sense()
        return sensed._replace(observation={**sensed.observation, "instruction": "wave"})

def open_robot(spec, instruction):
    return Told((32, 32), ("corner4",))
"""


class Running:
    """`rlrc run` at 20 Hz; lenient about time, since the machine is shared."""

    def __init__(self, artifact: Path, folder: Path, *options: str, keyboard: int = subprocess.DEVNULL) -> None:
        (folder / "rig_driver.py").write_text(DRIVER)
        self.log = folder / "log.jsonl"
        command = [sys.executable, "-m", "rlrc.runtime.cli", "run", str(artifact), "--driver", "rig_driver:open_robot"]
        command += ["--profile", str(PROFILE), "--hz", "20", "--late", "6", "--patience", "5"]
        self.process = subprocess.Popen(
            [*command, "--log", str(self.log), *options],
            cwd=folder,
            env=ENVIRONMENT,
            stdin=keyboard,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.sources = self.process.stdout.readline()
        assert self.sources.startswith("inference:"), self.process.communicate()
        time.sleep(1)  # it moves

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """What it has printed, and the log."""
        printed, complaints = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, complaints
        assert complaints == ""
        return printed, [json.loads(line) for line in self.log.read_text().splitlines()]


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
