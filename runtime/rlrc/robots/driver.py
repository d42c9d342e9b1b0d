"""A user's driver, with its interface checked (rlrc.robots.robot)."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.printable import printable
from rlrc.robots.robot import Robot, RobotError, Sensed

REQUIRED = ("sense", "command", "stop", "close")
LONGEST = 1000  # characters of an exception's message: some contain a whole array


class Driver:
    """A robot that wraps another. Any exception (except Ctrl-C) or wrong result of the other raises RobotError.

    ``halt`` is for another thread, while a call hangs. After it nothing is sent any more.
    """

    def __init__(self, robot: Robot) -> None:
        missing = [name for name in REQUIRED if not callable(call_driver(name, getattr, robot, name, None))]
        has_flag = call_driver("live_pictures", hasattr, robot, "live_pictures")
        missing += [] if has_flag else ["live_pictures"]
        if missing:
            raise RobotError(f"a driver without {', '.join(missing)} ({type(robot).__name__}; docs/robots.md)")
        self._robot = robot
        self.call: tuple[str, float] | None = None
        """the call that has not returned yet, and when it began (time.monotonic)"""
        self.halted: str | None = None
        """why ``halt`` was called"""

    @property
    def live_pictures(self) -> bool:
        return bool(call_driver("live_pictures", lambda: bool(self._robot.live_pictures)))

    def sense(self) -> Sensed | None:
        found: Sensed | None = call_driver("sense", check_sensed, self._call("sense", self._robot.sense))
        return found

    def command(self, action: NDArray[Any]) -> None:
        self._call("command", self._robot.command, action.copy())  # some drivers convert it in place

    def stop(self) -> None:
        call_driver("stop", self._robot.stop)

    def close(self) -> None:
        self._call("close", self._robot.close)

    def halt(self, reason: str) -> None:
        """The robot's own stop, from any thread. Raises RobotError if it fails."""
        self.halted = reason
        self.stop()

    def _call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        if self.halted is not None and name != "close":
            raise RobotError(self.halted)
        self.call = name, time.monotonic()
        try:
            return call_driver(name, function, *arguments)
        finally:
            self.call = None
            if self.halted is not None and name != "close":  # its result, or exception, is as old as the call
                raise RobotError(self.halted) from None


def call_driver(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a driver's function. Raises RobotError for any exception except KeyboardInterrupt, and for a
    coroutine or generator instead of a result."""
    try:
        found = function(*arguments)
    except (RobotError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit too: a driver must not end the program while the robot moves
        raise RobotError(describe_driver_error(error)) from error
    if isinstance(found, (Coroutine, Generator, AsyncGenerator)):
        if not isinstance(found, AsyncGenerator):
            found.close()
        kind = "an asynchronous generator" if isinstance(found, AsyncGenerator) else f"a {type(found).__name__}"
        raise RobotError(f"the driver's {name} is {kind}, expected a plain function: nothing of it ran")
    return found


def check_sensed(found: Any) -> Sensed | None:
    """The result of ``sense``. Raises RobotError unless its parts have the types that the loop computes with."""
    if found is None:
        return None
    if not isinstance(found, Sensed):
        raise _wrong("Sensed or None", found)
    observation, measured, stamp, pictures = found
    if not isinstance(observation, Mapping) or not all(isinstance(name, str) for name in observation):
        raise _wrong("an observation with names", observation)
    if not (measured is None or isinstance(measured, np.ndarray)):
        raise _wrong("measured as an array", measured)
    if not _is_time(stamp):
        raise _wrong("a stamp in seconds", stamp)
    if not isinstance(pictures, Mapping) or not all(_is_time(at) for at in pictures.values()):
        raise _wrong("stamps of pictures in seconds", pictures)
    pictured = {name for name in observation if name.startswith("image.")}
    if pictured != set(pictures):
        raise RobotError(f"the driver's sense gave stamps of {_names(pictures)} for the pictures {_names(pictured)}")
    for name in pictured:
        if not isinstance(observation[name], np.ndarray):
            raise _wrong(f"{name} as an array", observation[name])
    # A driver's own mapping type may compute its values, and fail, at every access: copy it here.
    return found if type(observation) is dict else found._replace(observation=dict(observation))


def describe_driver_error(error: BaseException) -> str:
    """A RobotError's own message, or which other error the driver raised; one line."""
    return one_line(error) if isinstance(error, RobotError) else f"the driver failed: {describe_exception(error)}"


def describe_exception(error: BaseException) -> str:
    """The exception's class, and its message if there is one; one line."""
    return f"{printable(type(error).__name__)}: {one_line(error)}".removesuffix(": ")


def one_line(error: BaseException) -> str:
    """The message as one line of up to LONGEST printable characters. Raises nothing, even if ``__str__`` does."""
    try:
        text = printable(" ".join(str(error).split()))
    except BaseException:  # a driver's own class of exceptions
        return "a message that cannot be read"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _wrong(expected: str, found: Any) -> RobotError:
    shown = f" {found!r}" if found is None or isinstance(found, (str, float)) else ""
    return RobotError(f"the driver's sense gave {type(found).__name__}{shown[:40]}, expected {expected}")


def _is_time(value: Any) -> bool:
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _names(names: Any) -> str:
    return ", ".join(sorted(map(str, names))) or "none"
