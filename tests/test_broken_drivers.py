"""`rlrc run` with drivers that hang, raise anything, or give the wrong thing: held, one line, exit code 1."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driven import DRIVER, PROFILE, Running
from fake_loop import PERIOD, loop

from rlrc.errors import UserError
from rlrc.runtime.cli import main

BROKEN = (
    DRIVER
    + """
import os, time
from pathlib import Path
from rlrc.robots.robot import RobotError

class Broken(Told):
    asked = 0
    def moves(self, name):
        self.asked += 1
        return name == os.environ["BROKEN"] and self.asked > 40
    def sense(self):
        if self.moves("sense"):
            time.sleep(1e6)
        if self.moves("exit"):
            raise SystemExit(0)
        if self.moves("fault"):
            raise RobotError("the arm is off")
        return super().sense()
    def command(self, action):
        if self.moves("command"):
            while True:  # busy, not asleep
                pass
        super().command(action)
    def stop(self):
        with Path("stopped").open("a") as file:
            file.write("stop\\n")
        if os.environ["BROKEN"] == "command":
            time.sleep(1e6)
    def close(self):
        if os.environ["BROKEN"] == "close":
            raise SystemExit(7)
        if os.environ["BROKEN"] == "fault":
            Path("closing").touch()
            time.sleep(1)

def open_robot(spec, instruction):
    return Broken((32, 32), ("corner4",))
"""
)


def run(arm_toy: Path, folder: Path, broken: str, *options: str, keyboard: int = subprocess.DEVNULL) -> Running:
    return Running(arm_toy, folder, *options, keyboard=keyboard, driver=BROKEN, variables={"BROKEN": broken})


@pytest.mark.parametrize("call", ["sense", "command"])
def test_a_call_that_never_returns_ends_the_program(arm_toy: Path, tmp_path: Path, call: str) -> None:
    running = run(arm_toy, tmp_path, call, "--record", str(tmp_path / "recorded"))
    for _ in range(2):  # as an impatient operator does
        os.killpg(running.process.pid, signal.SIGINT)
        time.sleep(0.3)
    _, complaints = running.process.communicate(timeout=30)
    assert running.process.returncode == 1
    assert (tmp_path / "stopped").read_text() == "stop\n"
    lines = complaints.splitlines()
    assert all(f"the driver's {call} has not returned for" in line for line in lines), complaints
    assert "robot.stop() was called" in lines[0]
    assert lines[-1].startswith("rlrc: check failed: stopped:") or "the driver's" in lines[-1]
    assert "Traceback" not in complaints
    # What was logged and recorded until then is there.
    rows = [json.loads(line) for line in running.log.read_text().splitlines()]
    assert len(rows) > 5
    assert (tmp_path / "recorded" / "meta").is_dir()


def test_the_terminal_is_put_back_by_a_program_that_ends_itself(arm_toy: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    running = run(arm_toy, tmp_path, "sense", keyboard=theirs)
    assert "any key" in running.sources
    running.process.communicate(timeout=30)  # without a key or a signal
    assert running.process.returncode == 1
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("exit", "rlrc: check failed: stopped: the driver failed: SystemExit: 0"),
        ("close", "rlrc: check failed: closing the robot failed: the driver failed: SystemExit: 7"),
    ],
)
def test_a_driver_does_not_end_the_program(arm_toy: Path, tmp_path: Path, broken: str, said: str) -> None:
    running = run(arm_toy, tmp_path, broken, "--steps", "60")
    _, complaints = running.process.communicate(timeout=60)
    assert (running.process.returncode, complaints.strip()) == (1, said)
    rows = [json.loads(line) for line in running.log.read_text().splitlines()]
    commands = [[row["command.shoulder"], row["command.elbow"]] for row in rows]
    assert commands[-1] == pytest.approx(commands[-2], abs=1e-6)


def test_ctrl_c_after_a_fault_loses_no_log(arm_toy: Path, tmp_path: Path) -> None:
    running = run(arm_toy, tmp_path, "fault")
    deadline = time.monotonic() + 30
    while not (tmp_path / "closing").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(running.process.pid, signal.SIGINT)
    _, complaints = running.process.communicate(timeout=30)
    assert (running.process.returncode, complaints) == (1, "rlrc: check failed: stopped: the arm is off\n")
    assert len(running.log.read_text().splitlines()) > 5


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit(0)", "expected the driver broken_opening:open_robot to open, found: SystemExit: 0"),
        ("return object()", "a driver without sense, command, stop, close, live_pictures"),
        ("yield 1", "a driver without sense, command, stop"),
    ],
)
def test_a_driver_that_does_not_open_is_refused(
    arm_toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: str,
    message: str,
) -> None:
    (tmp_path / "broken_opening.py").write_text(f"def open_robot(spec, instruction):\n    {code}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken_opening", raising=False)
    command = ["run", str(arm_toy), "--driver", "broken_opening:open_robot", "--profile", str(PROFILE), "--hz", "20"]
    assert main(command) == 2
    assert message in capsys.readouterr().err


# In this process, on a simulated clock


class Nothing:
    """Every access to an attribute raises."""

    def __getattr__(self, name: str) -> Any:
        raise SystemExit(name)


@pytest.mark.parametrize("part", ["telemetry", "chunks", "inference", "show", "over", "sleep"])
def test_whatever_ends_a_step_the_last_command_is_a_hold(part: str) -> None:
    control, arm, _, _ = loop(0, "replace")

    def broken(*_: Any, **__: Any) -> Any:
        raise SystemExit("now")

    def over() -> bool:
        if len(arm.sent) == 5:
            if part == "telemetry":
                setattr(control, part, Nothing())
            elif part in ("chunks", "inference"):
                setattr(control.planner, part, Nothing())
            elif part == "over":
                broken()
            else:
                setattr(control, f"_{part}", broken)
        return False

    try:
        control.run(over, steps=20)
    except SystemExit:
        assert arm.stopped_at is not None
    assert control.guard.stopped
    assert control.failures
    sent = np.array([command for _, command in arm.sent])
    assert len(sent) >= 6
    np.testing.assert_allclose(sent[-1], sent[-2], atol=1e-9)


def test_a_failure_after_a_stop_is_not_lost() -> None:
    control, arm, _, _ = loop(0, stop_reason=lambda: "asked to stop: a key" if len(arm.sent) > 4 else None)
    follow = arm.command

    def command(action: Any) -> None:
        if control.guard.stopped:
            raise OSError("unplugged")
        follow(action)

    arm.command = command  # type: ignore[method-assign]
    control.run(steps=20)
    assert control.guard.reason == "asked to stop: a key"
    assert control.failures == ["the driver failed: OSError: unplugged"]
    assert arm.stopped_at is not None


@pytest.mark.parametrize("patience", [1.0, 0.0])  # no action is missing while the robot is brought to rest
def test_the_last_step_of_a_run_may_come_to_rest(patience: float) -> None:
    control, arm, _, _ = loop(0, patience=patience)
    control.run(steps=5, rest=True)
    sent = np.array([command[0] for _, command in arm.sent])
    np.testing.assert_allclose(sent, [0.01, 0.02, 0.03, 0.04, 0.05, 0.05], atol=1e-6)
    assert control.telemetry.rows["held"].tolist() == [False] * 5 + [True]
    assert not control.guard.stopped


class Unreadable(Exception):
    """Cannot be converted to text: that raises another of the same kind."""

    def __str__(self) -> str:
        raise Unreadable


class Number(BaseException):
    def __str__(self) -> str:
        return 5  # type: ignore[return-value]


@pytest.mark.parametrize("error", [Unreadable, Number])
@pytest.mark.parametrize("call", ["sense", "command", "stop"])
def test_a_message_that_cannot_be_read_ends_in_a_hold(error: type[BaseException], call: str) -> None:
    control, arm, _, _ = loop(0)
    given = getattr(arm, call)

    def broken(*arguments: Any) -> Any:
        if len(arm.sent) > 4:
            raise error
        return given(*arguments)

    setattr(arm, call, broken)
    if call == "stop":
        arm.command = lambda action: arm.sent.append((0.0, action)) if len(arm.sent) < 5 else broken()  # type: ignore[method-assign]
    control.run(steps=20)
    assert control.guard.stopped
    assert f"the driver failed: {error.__name__}: a message that cannot be read" in "; ".join(control.failures)
    np.testing.assert_allclose(arm.sent[-1][1], arm.sent[-2][1], atol=0.011 if call != "sense" else 1e-9)


def test_nothing_keeps_the_loop_from_braking(monkeypatch: pytest.MonkeyPatch) -> None:
    control, arm, _, _ = loop(0)

    def over() -> bool:
        if len(arm.sent) < 5:
            return False
        raise OSError("gone")

    monkeypatch.setattr(control, "_fail", lambda reason: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        control.run(over, steps=20)
    assert arm.stopped_at is not None
    np.testing.assert_allclose(arm.sent[-1][1], arm.sent[-2][1], atol=1e-9)


@pytest.mark.parametrize("share", [0.95, 0.98])
def test_a_command_that_takes_its_time_is_sent_as_far_as_one_that_does_not(share: float) -> None:
    control, arm, _, clock = loop(0)
    follow = arm.command

    def command(action: Any) -> None:
        clock.now += share * PERIOD
        follow(action)

    arm.command = command  # type: ignore[method-assign]
    control.run(steps=5, rest=True)
    np.testing.assert_allclose([sent[0] for _, sent in arm.sent], [0.01, 0.02, 0.03, 0.04, 0.05, 0.05], atol=1e-6)
    assert set(control.guard.counts) == {("start", "start")}  # nothing was clamped


def test_a_loop_that_cannot_be_started_is_no_failure() -> None:
    control, arm, _, _ = loop(0)
    arm.joints = np.array([5.0, 0.0])
    with pytest.raises(UserError, match="start within its limits"):
        control.run(steps=3)
    assert (control.failures, arm.sent) == ([], [])
