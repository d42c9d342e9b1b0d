"""A simulated arm and a policy that moves it, both with faults to inject, for tests of the control loop.

Two joints in rad follow their commands immediately; a live camera shows noise. ``SimulatedArm.break_down`` starts a
fault of the arm. Faults of the policy start in its process when an image has the arm's mark.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import ActionSpec, CameraSpec, NormStats, PolicySpec, StateSpec
from rlrc.robots.robot import RobotError, Sensed
from rlrc.runtime.safety.profile import Dimension, Limit, Position, RobotProfile, Tracking

JOINTS = ("shoulder", "elbow")
HORIZON, SIZE = 8, 16
RATE, SPAN = 2.0, 0.2  # the policy moves joints on a circle of this angular speed and radius, rad/s and rad
MARK = 255  # value of the first byte of an image that starts the policy's fault
ArmFault = Literal[
    "frozen camera",
    "repeated frame",
    "missing camera",
    "stale state",
    "silent robot",
    "lost robot",
    "sense gives a tuple",
    "sense gives no stamp",
    "sense gives a list",
    "sense is a generator",
    "state of objects",
    "picture without a stamp",
    "SystemExit in sense",
    "KeyboardInterrupt in sense",
    "SystemExit in command",
    "KeyboardInterrupt in command",
    "SystemExit in stop",
    "hang in sense",
    "hang in command",
    "hang in hold",
    "frozen state",
    "jumping state",
    "scaled state",
    "reversed state",
    "wrapped angle",
]
HANGS: tuple[ArmFault, ...] = ("hang in sense", "hang in command", "hang in hold")
PolicyFault = Literal["nan", "infinity", "wrong shape", "out of range", "velocity jump", "hang", "crash", "no action"]


def spec(size: tuple[int, int] = (SIZE, SIZE), cameras: tuple[str, ...] = ("wrist",), target: int = SIZE) -> PolicySpec:
    """The spec of the arm's policy; images of ``size`` are scaled to squares of ``target`` pixels."""
    norm, units = NormStats((0.0, 0.0), (1.0, 1.0)), ("rad", "rad")
    resize: Any = "none" if size == (target, target) else "bilinear"
    specs = tuple(CameraSpec(name, target, target, resize, (0.0,) * 3, (1.0,) * 3, "HWC") for name in cameras)
    action = ActionSpec(HORIZON, JOINTS, ("absolute", "absolute"), units, norm, 0)
    return PolicySpec("rig", "parallel", specs, StateSpec(JOINTS, units, norm), None, action, {})


def profile(lead: float | None = None) -> RobotProfile:
    """Limits that the circle keeps; a violation stops. ``lead``: rad by which commands may lead the state."""
    return RobotProfile(
        "rig",
        {"rig": "chosen"},
        tuple(
            Dimension(
                name,
                "absolute",
                "rad",
                Position(-1.0, 1.0, "rig", "stop"),
                Limit(2.0, "rig", "stop"),
                Limit(200.0, "rig", "clamp"),
                state=name,
                lead=None if lead is None else Tracking(lead, "rig"),
            )
            for name in JOINTS
        ),
    )


class SimulatedArm:
    """A robot (rlrc.robots.robot). ``sent``: every command with its time; ``calls``: the index of its call.

    A call that hangs returns after ``stop``, without effect.
    """

    live_pictures = True

    def __init__(self, size: tuple[int, int] = (SIZE, SIZE), cameras: tuple[str, ...] = ("wrist",)) -> None:
        self.joints, self.mark, self.fault = np.zeros(2), 0, ""
        self.sent: list[tuple[float, NDArray[Any]]] = []
        self.calls: list[int] = []
        self._called = 0
        self.stopped_at: float | None = None
        self.hung_at = float("nan")
        self._released = threading.Event()
        noise = np.random.default_rng(0)
        self._frames = [noise.integers(0, 200, (*size, 3), np.uint8) for _ in range(3)]
        self._count, self._cameras = 0, cameras
        self._sensed = self._measure()

    def break_down(self, fault: ArmFault) -> None:
        self.fault = fault

    def sense(self) -> Any:
        self._misbehave("sense")
        if self.fault in ("lost robot", "hang in hold"):
            raise RobotError("the arm does not answer")
        self._sensed = self._sensed if self.fault == "silent robot" else self._measure()
        return self._corrupt(self._sensed)

    def command(self, action: NDArray[Any]) -> None:
        self._called += 1
        self._misbehave("command")
        self.calls.append(self._called - 1)
        self.joints = np.array(action, float)
        self.sent.append((time.monotonic(), self.joints))

    def stop(self) -> None:
        self.stopped_at = self.stopped_at or time.monotonic()
        self._released.set()
        if self.fault == "SystemExit in stop":
            raise SystemExit(3)

    def _misbehave(self, call: str) -> None:
        if self.fault == f"hang in {call}" or (self.fault == "hang in hold" and call == "command"):
            self.hung_at = time.monotonic()
            self._released.wait()
            raise RobotError("the call was given up")
        if self.fault == "SystemExit in stop" and call == "command":
            raise RobotError("the arm does not take commands")
        if self.fault == f"SystemExit in {call}":
            raise SystemExit(3)
        if self.fault == f"KeyboardInterrupt in {call}":
            raise KeyboardInterrupt

    def _corrupt(self, sensed: Any) -> Any:
        """The ``Sensed`` of a broken driver: Any, as some fields get values of wrong types."""
        if self.fault == "sense gives a tuple":
            return tuple(sensed)
        if self.fault == "sense gives no stamp":
            return sensed._replace(stamp=None)
        if self.fault == "sense gives a list":
            return sensed._replace(observation=list(sensed.observation))
        if self.fault == "sense is a generator":
            return (one for one in (sensed,))
        if self.fault == "state of objects":
            return sensed._replace(measured=np.array([None, None]))
        if self.fault == "picture without a stamp":
            return sensed._replace(pictures={})
        return sensed

    def close(self) -> None:
        pass

    def _measure(self) -> Sensed:
        now = time.monotonic()
        names = [f"image.{camera}" for camera in self._cameras]
        self._count += 1
        pictures = {name: self._frames[(self._count + i) % len(self._frames)] for i, name in enumerate(names)}
        for picture in pictures.values():
            picture[0, 0, 0] = self.mark
        stamps, stamp = dict.fromkeys(names, now), now
        if self.fault in ("frozen camera", "repeated frame"):
            pictures = {name: self._sensed.observation[name] for name in names}
            stamps = dict(self._sensed.pictures) if self.fault == "frozen camera" else stamps
        if self.fault == "missing camera":
            pictures, stamps = {}, {}
        if self.fault == "stale state":
            stamp = self._sensed.stamp
        state = self._corrupt_state().astype(np.float32)
        return Sensed({**pictures, "state": state}, state, stamp, stamps)

    def _corrupt_state(self) -> NDArray[np.float64]:
        if self.fault == "frozen state":
            return np.array(self._sensed.measured, float)
        if self.fault == "jumping state":
            return self.joints + 0.5
        if self.fault == "scaled state":
            return self.joints * 100
        if self.fault == "reversed state":
            return self.joints[::-1]
        return self.joints - 2 * np.pi if self.fault == "wrapped angle" else self.joints


class Circle:
    """Moves the joints on a circle, taking ``seconds`` a chunk; ``fault`` starts with the mark in an image."""

    def __init__(self, hz: float, fault: PolicyFault | None = None, seconds: float = 0.0) -> None:
        self._ahead = RATE / hz * np.arange(HORIZON)
        self._fault, self._seconds = fault, seconds

    def reset(self) -> None:
        """Start the circle at the origin with the next observation."""
        self._began: float | None = None

    def infer(self, observation: Mapping[str, Any], continuation: Any = None) -> dict[str, Any]:
        now = time.monotonic()
        self._began = self._began or now
        angles = RATE * (now - self._began) + self._ahead
        time.sleep(self._seconds)
        actions = np.stack([SPAN * np.cos(angles) - SPAN, SPAN * np.sin(angles)], 1).astype(np.float32)
        if observation["image.wrist"][0, 0, 0] == MARK:
            actions = self._corrupt(actions)
        return {"actions": actions, "tokens": None}

    def _corrupt(self, actions: NDArray[np.float32]) -> NDArray[np.float32]:
        if self._fault == "hang":
            time.sleep(1e6)
        if self._fault == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fault == "no action":
            from rlrc.runtime.inference.decode import NoAction

            raise NoAction("expected finite logits, found 3 nan or inf")
        if self._fault == "wrong shape":
            return actions[:, :1]
        values = {"nan": np.nan, "infinity": np.inf, "out of range": 1.5, "velocity jump": 0.9}
        actions[:, 1] = values[str(self._fault)]
        return actions
