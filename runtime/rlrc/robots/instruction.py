"""A robot whose own instruction can be replaced by the operator's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from rlrc.robots.robot import Robot, Sensed


class InstructionOverride:
    """A robot that wraps another. ``instruction`` may be set from any thread; None: the robot's own.

    ``begin`` is called with a new instruction before the first step with it: a recorder begins another episode.
    """

    def __init__(self, robot: Robot, begin: Callable[[str], None] = lambda _: None) -> None:
        self._robot, self._begin = robot, begin
        self.instruction: str | None = None
        self._last: str | None = None

    @property
    def live_pictures(self) -> bool:
        return self._robot.live_pictures

    def sense(self) -> Sensed | None:
        sensed, instruction = self._robot.sense(), self.instruction
        if sensed is None:
            return None
        if instruction != self._last:
            self._last = instruction
            self._begin(instruction or sensed.observation.get("instruction") or "run")
        if instruction is None:
            return sensed
        return sensed._replace(observation={**sensed.observation, "instruction": instruction})

    def command(self, action: NDArray[Any]) -> None:
        self._robot.command(action)

    def stop(self) -> None:
        self._robot.stop()

    def close(self) -> None:
        self._robot.close()
