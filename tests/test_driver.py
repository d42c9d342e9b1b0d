"""What somebody else's driver gives and raises is checked: anything wrong is a RobotError with one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import numpy as np
import pytest

from rlrc.benchmarks.control import simulated_arm
from rlrc.robots.driver import Driver, check_sensed, describe_driver_error, one_line
from rlrc.robots.robot import RobotError, Sensed
from rlrc.runtime.cli.policy import fail_check
from rlrc.runtime.control.sensor_watchdog import SensorWatchdog


def good() -> Sensed:
    found = simulated_arm.SimulatedArm().sense()
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
        check_sensed(wrong(good()))


def test_what_is_right_goes_through() -> None:
    sensed = good()
    assert check_sensed(sensed) is sensed
    assert check_sensed(None) is None


def test_an_asynchronous_command_is_refused() -> None:
    class Arm(simulated_arm.SimulatedArm):
        async def command(self, action: Any) -> None:  # type: ignore[override]
            self.joints = action

    with pytest.raises(RobotError, match="the driver's command is a coroutine"):
        Driver(cast(Any, Arm())).command(np.zeros(2))


def test_an_asynchronous_generator_for_a_command_is_refused() -> None:
    class Arm(simulated_arm.SimulatedArm):
        async def command(self, action: Any) -> Any:
            self.joints = action
            yield

    with pytest.raises(RobotError, match="the driver's command is an asynchronous generator"):
        Driver(cast(Any, Arm())).command(np.zeros(2))


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("a\x1b[2J\x07 title\x00", "a?[2J? title?"),
        ("two\nlines\u202e \udcff", "two lines? ?"),
        ("x" * 10**6, "x" * 1000 + "..."),
    ],
)
def test_what_a_driver_says_is_one_line_that_can_be_printed(message: str, line: str) -> None:
    assert one_line(OSError(message)) == line
    assert describe_driver_error(type("A\x1b[31m", (Exception,), {})(message)) == f"the driver failed: A?[31m: {line}"


def test_a_reason_is_printed_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    fail_check("no picture image.\x1b[31mfront")
    assert capsys.readouterr().err == "rlrc: check failed: no picture image.?[31mfront\n"


class Lazy(Mapping[str, Any]):
    """Decodes its pictures when they are read, and fails."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found = found

    def __getitem__(self, name: str) -> Any:
        raise SystemExit(0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


@pytest.mark.parametrize(
    "wrong", [lambda s: s._replace(observation=Lazy(s.observation)), lambda s: s._replace(stamp=10**400)]
)
def test_what_fails_while_it_is_checked_is_the_drivers_fault(wrong: Any) -> None:
    arm = simulated_arm.SimulatedArm()
    given = arm.sense
    arm.sense = lambda: wrong(given())  # type: ignore[method-assign]
    with pytest.raises(RobotError, match=r"the driver failed: (SystemExit: 0|OverflowError)"):
        Driver(arm).sense()


def test_a_robot_that_fails_when_it_is_looked_at_is_refused() -> None:
    class Proxy:
        def __getattr__(self, name: str) -> Any:
            raise SystemExit(0)

    class Arm(simulated_arm.SimulatedArm):
        live_pictures = np.array([True, False])  # type: ignore[assignment]

    with pytest.raises(RobotError, match="the driver failed: SystemExit: 0"):
        Driver(Proxy())
    with pytest.raises(RobotError, match="the driver failed: ValueError"):
        _ = Driver(cast(Any, Arm())).live_pictures


def test_a_driver_may_convert_a_command_in_place() -> None:
    class Arm(simulated_arm.SimulatedArm):
        def command(self, action: Any) -> None:
            action *= 180 / np.pi
            super().command(action)

    command = np.array([0.1, 0.2])
    Driver(Arm()).command(command)
    assert command.tolist() == [0.1, 0.2]


def test_a_driver_may_fill_one_picture_again_and_again() -> None:
    watch, picture, noise = (
        SensorWatchdog(frozenset({"image.wrist"}), 1.0, live=True),
        np.zeros((4, 4, 3), np.uint8),
        good(),
    )
    for step in range(3):
        picture[...] = step
        sensed = noise._replace(observation={"image.wrist": picture}, stamp=step, pictures={"image.wrist": step})
        assert watch.fault(sensed, step) is None
    sensed = sensed._replace(pictures={"image.wrist": 3})
    assert "image.wrist has not changed" in str(watch.fault(sensed, 3))


def test_a_property_that_fails_is_the_robots_fault() -> None:
    class Arm(simulated_arm.SimulatedArm):
        @property
        def live_pictures(self) -> bool:  # type: ignore[override]
            raise SystemExit(0)

    with pytest.raises(RobotError, match="the driver failed: SystemExit: 0"):
        _ = Driver(cast(Any, Arm())).live_pictures
