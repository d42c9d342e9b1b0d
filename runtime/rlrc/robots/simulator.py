"""A simulator as a robot, in a process of its own.

Every command is one step of the simulation; its picture arrives some milliseconds later. Between commands the simulated
time stands still, so a delayed command costs the task nothing but steps.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import PolicySpec
from rlrc.errors import UserError
from rlrc.robots.robot import RobotError, Sensed
from rlrc.worker import Channel, WorkerDied, WorkerProcess

PATIENCE = 120.0  # seconds for the simulator to start, or to begin an episode
LARGEST = 64 * 2**20  # bytes of an observation


class SimulatorRobot:
    """Opens an environment by its name. Raises UserError as rlrc.envs.environment.open_environment does.

    ``hz`` and ``horizon`` are the environment's; ``over`` and ``success`` describe the episode.
    """

    live_pictures = False  # a renderer draws the same scene identically

    def __init__(self, name: str, spec: PolicySpec, mapping: Path | None = None) -> None:
        self._worker = WorkerProcess(_simulate, (name, spec, mapping), f"the simulator {name}", 2**16, LARGEST)
        values, _ = self._worker.wait(PATIENCE)
        self.name, self.hz, self.horizon = values["name"], float(values["hz"]), int(values["horizon"])
        self.over = self.success = False
        self._sensed: Sensed | None = None
        self._waiting: NDArray[Any] | None = None
        self.steps = 0
        """simulated steps of the episode"""

    @property
    def pid(self) -> int:
        return self._worker.pid

    def reset(self, seed: int) -> None:
        """Begin an episode, outside of the loop."""
        if self._worker.busy:
            self._worker.wait(PATIENCE)
        self._worker.ask({"do": "reset", "seed": seed})
        self._waiting, self.steps = None, 0
        self._take(*self._worker.wait(PATIENCE))

    def sense(self) -> Sensed | None:
        try:
            if self._worker.busy and (answer := self._worker.poll()) is not None:
                self._take(*answer)
                if self._waiting is not None and not self.over:
                    waiting, self._waiting = self._waiting, None
                    self._send(waiting)
        except WorkerDied as error:
            raise RobotError(str(error)) from None
        if self._sensed is not None and self.steps == 0:  # until the first command nothing can have changed
            now = time.monotonic()
            self._sensed = self._sensed._replace(stamp=now, pictures=dict.fromkeys(self._sensed.pictures, now))
        return self._sensed

    def command(self, action: NDArray[Any]) -> None:
        """Waits while the last command is simulated; only the newest command waits."""
        self.sense()
        if self.over:
            return
        if self._worker.busy:
            self._waiting = action
        else:
            self._send(action)

    def stop(self) -> None:
        """Simulated time already stands still between commands."""

    def close(self) -> None:
        self._worker.kill()

    def _send(self, action: NDArray[Any]) -> None:
        try:
            self._worker.ask({"do": "advance"}, {"action": np.asarray(action, np.float32)})
        except WorkerDied as error:
            raise RobotError(str(error)) from None
        self.steps += 1

    def _take(self, values: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        if "error" in values:
            raise RobotError(values["error"])
        observation: dict[str, Any] = dict(arrays)
        if values["instruction"] is not None:
            observation["instruction"] = values["instruction"]
        stamps = {name: values["stamp"] for name in observation if name.startswith("image.")}
        self._sensed = Sensed(observation, observation.get("state"), values["stamp"], stamps)
        self.over, self.success = values["over"], values["success"]


def _simulate(channel: Channel, name: str, spec: PolicySpec, mapping: Path | None) -> None:
    from rlrc.envs.environment import open_environment

    env = open_environment(name, spec, mapping)
    channel.reply({"name": env.name, "hz": env.hz, "horizon": env.horizon})
    success = False
    while True:
        values, arrays = channel.receive()
        try:
            if values["do"] == "reset":
                observation, success = env.reset(seed=values["seed"])[0], False
            else:
                success = env.advance(arrays["action"].copy()) or success
                observation = env.observe()
        except UserError as error:
            channel.reply({"error": str(error)})
            continue
        pictures = {key: np.asarray(value) for key, value in observation.items() if key != "instruction"}
        status = {"stamp": time.monotonic(), "over": bool(success or env.over), "success": bool(success)}
        channel.reply(status | {"instruction": observation.get("instruction")}, pictures)
