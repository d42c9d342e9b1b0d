"""What ends a program whose driver hangs: the watchdog's thread, and threads that a driver leaves behind."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from rlrc.benchmarks.control import simulated_arm
from rlrc.robots.driver import Driver
from rlrc.robots.robot import RobotError
from rlrc.runtime.control import watchdog
from rlrc.runtime.control.watchdog import Watchdog, finish_process


def test_threads_that_a_driver_leaves_do_not_keep_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watchdog, "RETURN_S", 0.1)
    known, over, ended = set(threading.enumerate()), threading.Event(), list[int]()
    brief = threading.Thread(target=time.sleep, args=(0.02,))
    brief.start()
    assert (finish_process(known, 1, ended.append), ended) == (1, [])
    threading.Thread(target=over.wait, name="reader").start()
    finish_process(known, 1, ended.append)
    over.set()
    assert ended == [1]
    assert "the driver's close has left threads that go on: reader" in capsys.readouterr().err


def test_the_watchdog_waits_for_a_loop_that_is_slow_but_goes_on() -> None:
    arm = simulated_arm.SimulatedArm()
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
    arm, said, ended = simulated_arm.SimulatedArm(), list[str](), list[int]()
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
    arm, said, ended = simulated_arm.SimulatedArm(), list[str](), list[int]()
    driver, over = Driver(arm), threading.Event()
    arm.close = over.wait  # type: ignore[method-assign, assignment]

    def end(code: int) -> None:
        ended.append(code)
        over.set()

    with Watchdog(driver, said.append, said.append, end).closing():
        driver.close()
    assert ended == [1]
    assert "the driver's close has not returned for" in said[0]
