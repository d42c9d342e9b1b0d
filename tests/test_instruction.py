"""The operator's words in the place of a robot's own, and the episodes of a recording that they begin."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlrc.benchmarks.control.simulated_arm import SimulatedArm
from rlrc.robots.instruction import InstructionOverride
from rlrc.robots.robot import Sensed


class Told(SimulatedArm):
    def sense(self) -> Sensed | None:
        sensed = super().sense()
        assert sensed is not None
        return sensed._replace(observation={**sensed.observation, "instruction": "wave"})


def test_other_words_and_its_own_again() -> None:
    begun: list[str] = []
    robot = InstructionOverride(Told(), begun.append)

    def words() -> Any:
        sensed = robot.sense()
        assert sensed is not None
        return sensed.observation["instruction"]

    assert [words(), words()] == ["wave", "wave"]
    robot.instruction = "open"
    assert [words(), words()] == ["open", "open"]
    robot.instruction = None
    assert words() == "wave"
    assert begun == ["open", "wave"]  # once each: another episode


def test_it_is_the_robot_but_for_the_words() -> None:
    arm = Told()
    robot = InstructionOverride(arm)
    robot.instruction = "open"
    robot.command(np.array([0.1, 0.2]))
    sensed = robot.sense()
    assert sensed is not None
    assert sensed.measured is not None
    np.testing.assert_allclose(sensed.measured, [0.1, 0.2])
    assert robot.live_pictures
    robot.stop()
    assert arm.stopped_at is not None
