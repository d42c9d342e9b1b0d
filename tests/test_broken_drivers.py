"""`rlrc run` with drivers that hang, raise anything, or give the wrong thing: held, one line, exit code 1."""

from __future__ import annotations

import json
import os
import pty
import signal
import termios
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driven import DRIVER, PROFILE, Running
from looping import HZ, loop

from rlrc.benchmarks import rig
from rlrc.errors import UserError
from rlrc.robots.driver import Driver, checked
from rlrc.robots.robot import RobotError, Sensed
from rlrc.runtime import watchdog
from rlrc.runtime.cli import main
from rlrc.runtime.watchdog import Watchdog

BROKEN = (
    DRIVER
    + """
import os, time
from pathlib import Path

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

def open_robot(spec, instruction):
    return Broken((32, 32), ("corner4",))
"""
)


def run(arm_toy: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, broken: str, *options: str, **keys: Any) -> Any:
    monkeypatch.setitem(os.environ, "BROKEN", broken)
    import driven

    monkeypatch.setitem(driven.ENVIRONMENT, "BROKEN", broken)
    return Running(arm_toy, folder, *options, driver=BROKEN, **keys)


@pytest.mark.parametrize("call", ["sense", "command"])
def test_a_call_that_never_returns_ends_the_program(
    arm_toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    running = run(arm_toy, tmp_path, monkeypatch, call, "--record", str(tmp_path / "recorded"))
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


def test_the_terminal_is_put_back_by_a_program_that_ends_itself(
    arm_toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    running = run(arm_toy, tmp_path, monkeypatch, "sense", keyboard=theirs)
    assert "any key" in running.sources
    running.process.communicate(timeout=30)  # nobody presses anything
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
def test_a_driver_does_not_end_the_program(
    arm_toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, said: str
) -> None:
    running = run(arm_toy, tmp_path, monkeypatch, broken, "--steps", "60")
    _, complaints = running.process.communicate(timeout=60)
    assert (running.process.returncode, complaints.strip()) == (1, said)
    rows = [json.loads(line) for line in running.log.read_text().splitlines()]
    commands = [[row["command.shoulder"], row["command.elbow"]] for row in rows]
    assert commands[-1] == pytest.approx(commands[-2], abs=1e-6)


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
    monkeypatch.delitem(__import__("sys").modules, "broken_opening", raising=False)
    command = ["run", str(arm_toy), "--driver", "broken_opening:open_robot", "--profile", str(PROFILE), "--hz", "20"]
    assert main(command) == 2
    assert message in capsys.readouterr().err


# In this process, on a clock of our own


class Nothing:
    """Where an exception is raised by whatever touches it."""

    def __getattr__(self, name: str) -> Any:
        raise SystemExit(name)


@pytest.mark.parametrize("part", ["telemetry", "chunks", "thinking", "show", "over", "sleep"])
def test_whatever_ends_a_step_the_last_command_is_a_hold(part: str) -> None:
    control, arm, _, _ = loop(0, "replace")

    def broken(*_: Any, **__: Any) -> Any:
        raise SystemExit("now")

    def over() -> bool:
        if len(arm.sent) == 5:
            if part in ("telemetry", "chunks", "thinking"):
                setattr(control, part, Nothing())
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
    control, arm, _, _ = loop(0)
    follow = arm.command

    def command(action: Any) -> None:
        if control.guard.stopped:
            raise OSError("unplugged")
        follow(action)

    arm.command = command  # type: ignore[method-assign]
    control._stop = lambda: "asked to stop: a key" if len(arm.sent) > 4 else None
    control.run(steps=20)
    assert control.guard.reason == "asked to stop: a key"
    assert control.failures == ["the driver failed: OSError: unplugged"]
    assert arm.stopped_at is not None


def test_the_last_step_of_a_run_may_come_to_rest() -> None:
    control, arm, _, _ = loop(0)
    control.run(steps=5, rest=True)
    sent = np.array([command[0] for _, command in arm.sent])
    np.testing.assert_allclose(sent, [0.01, 0.02, 0.03, 0.04, 0.05, 0.05], atol=1e-6)
    assert control.telemetry.rows["held"].tolist() == [False] * 5 + [True]
    assert not control.guard.stopped


def good() -> Sensed:
    found = rig.Arm().sense()
    assert found is not None
    return found


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s: tuple(s),
        lambda s: dict(s._asdict()),
        lambda s: s._replace(stamp=None),
        lambda s: s._replace(stamp="12.5"),
        lambda s: s._replace(stamp=float("nan")),
        lambda s: s._replace(stamp=True),
        lambda s: s._replace(observation=None),
        lambda s: s._replace(observation={1: 2}),
        lambda s: s._replace(measured=[0.0, 0.0]),
        lambda s: s._replace(pictures={"image.wrist": None}),
        lambda s: s._replace(pictures={"image.front": 1.0}),
        lambda s: s._replace(observation={**s.observation, "image.wrist": "a picture"}),
        lambda s: s._replace(observation={**s.observation, "image.more": s.observation["image.wrist"]}),
    ],
)
def test_what_sense_gives_is_checked(wrong: Any) -> None:
    with pytest.raises(RobotError, match="the driver's sense gave"):
        checked(wrong(good()))


def test_what_is_right_goes_through() -> None:
    sensed = good()
    assert checked(sensed) is sensed
    assert checked(None) is None


def test_an_asynchronous_command_is_refused() -> None:
    class Arm(rig.Arm):
        async def command(self, action: Any) -> None:  # type: ignore[override]
            self.joints = action

    with pytest.raises(RobotError, match="the driver's command is a coroutine"):
        Driver(Arm()).command(np.zeros(2))


def test_the_watchdog_waits_for_a_loop_that_is_slow_but_goes_on() -> None:
    arm = rig.Arm()
    ended: list[int] = []
    dog = Watchdog(Driver(arm), end=ended.append)
    with dog.watching(0.1):
        for _ in range(10):
            time.sleep(0.05)
            dog.beat()
    time.sleep(0.2)
    assert (arm.stopped_at, ended) == (None, [])


@pytest.mark.parametrize("seconds", [0.05, 0.2])
def test_the_watchdog_stops_within_its_bound(seconds: float) -> None:
    arm, said, ended = rig.Arm(), list[str](), list[int]()
    driver = Driver(arm)
    dog = Watchdog(driver, said.append, said.append, ended.append)
    arm.break_down("hang in sense")
    with dog.watching(seconds):
        begun = time.monotonic()
        with pytest.raises(RobotError, match=r"sense has not returned for .* ms; robot.stop\(\) was called"):
            driver.sense()
    assert arm.stopped_at is not None
    assert seconds <= arm.stopped_at - begun < 2 * seconds + 0.1
    with pytest.raises(RobotError, match="has not returned"):  # nothing is sent any more
        driver.command(np.zeros(2))
    assert ended == []


def test_a_robot_that_does_not_close_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "CLOSING_S", 0.05)
    arm, said, ended = rig.Arm(), list[str](), list[int]()
    driver, over = Driver(arm), threading.Event()
    arm.close = over.wait  # type: ignore[method-assign, assignment]

    def end(code: int) -> None:
        ended.append(code)
        over.set()

    with Watchdog(driver, said.append, said.append, end).closing():
        driver.close()
    assert ended == [1]
    assert "the driver's close has not returned for" in said[0]


def test_a_property_that_fails_is_the_robots_fault() -> None:
    class Arm(rig.Arm):
        @property
        def live_pictures(self) -> bool:  # type: ignore[override]
            raise SystemExit(0)

    with pytest.raises((RobotError, SystemExit)) as caught:
        _ = Driver(Arm()).live_pictures
    assert isinstance(caught.value, RobotError)


def test_a_loop_that_cannot_be_started_is_no_failure() -> None:
    control, arm, _, _ = loop(0)
    arm.joints = np.array([5.0, 0.0])
    with pytest.raises(UserError, match="start within its limits"):
        control.run(steps=3)
    assert (control.failures, arm.sent) == ([], [])
    assert HZ == 10
