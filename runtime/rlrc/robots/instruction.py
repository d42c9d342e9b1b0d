"""A robot with the operator's words in the place of its own instruction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from rlrc.robots.robot import Robot, Sensed


class InstructionOverride:
    """Is a robot and holds one. ``words`` may be set from any thread; None: the robot's own.

    ``begin`` is told of other words before the first step with them: to a recorder they are another episode.
    """

    def __init__(self, robot: Robot, begin: Callable[[str], None] = lambda _: None) -> None:
        self._robot, self._begin = robot, begin
        self.instruction: str | None = None
        self._last: str | None = None

    @property
    def live_pictures(self) -> bool:
        return self._robot.live_pictures

    def sense(self) -> Sensed | None:
        sensed, words = self._robot.sense(), self.instruction
        if sensed is None:
            return None
        if words != self._last:
            self._last = words
            self._begin(words or sensed.observation.get("instruction") or "run")
        if words is None:
            return sensed
        return sensed._replace(observation={**sensed.observation, "instruction": words})

    def command(self, action: NDArray[Any]) -> None:
        self._robot.command(action)

    def stop(self) -> None:
        self._robot.stop()

    def close(self) -> None:
        self._robot.close()
