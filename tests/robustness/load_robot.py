"""A stationary robot for `rlrc run --driver load_robot:open_robot` with the sensors that the policy requires."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import PolicySpec
from rlrc.robots.robot import Sensed


class Robot:
    live_pictures = True

    def __init__(self, spec: PolicySpec, instruction: str) -> None:
        self._noise = np.random.default_rng(0)
        self._shapes = {f"image.{camera.name}": (camera.height, camera.width, 3) for camera in spec.cameras}
        self._state = None if spec.state is None else np.array(spec.state.norm.center, np.float32)
        self._instruction = instruction

    def sense(self) -> Sensed:
        now = time.monotonic()
        pictures = {name: self._noise.integers(0, 256, shape, np.uint8) for name, shape in self._shapes.items()}
        state = {} if self._state is None else {"state": self._state}
        observation = {**pictures, **state, "instruction": self._instruction}
        return Sensed(observation, self._state, now, dict.fromkeys(pictures, now))

    def command(self, action: NDArray[np.float32]) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


open_robot = Robot
