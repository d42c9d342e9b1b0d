"""The control loop on a clock of our own, an arm and a policy that go by it."""

from __future__ import annotations

from typing import Any

import numpy as np

from rlrc.benchmarks.control import simulated_arm
from rlrc.robots.robot import Sensed
from rlrc.runtime.control.chunks import Chunks, Strategy
from rlrc.runtime.control.control_loop import ControlLoop, LoopTiming
from rlrc.runtime.control.inference_process import Answer
from rlrc.runtime.control.telemetry import Telemetry
from rlrc.runtime.safety.guard import Guard

HZ, PERIOD = 10.0, 0.1


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.delays: dict[int, float] = {}  # by the sleep's number: the machine is busy
        self.sleeps = 0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.delays.get(self.sleeps, 0.0)
        self.sleeps += 1


class Arm(simulated_arm.SimulatedArm):
    """Measured at the clock's time; the picture is always new."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        super().__init__()

    def _measure(self) -> Sensed:
        found = super()._measure()
        return found._replace(stamp=self.clock.now, pictures=dict.fromkeys(found.pictures, self.clock.now))


class Thinking:
    """Answers after ``periods`` with a chunk that counts up from where the joints are: 0.01 rad a step."""

    def __init__(self, clock: Clock, periods: float) -> None:
        self.clock, self.seconds, self.busy = clock, periods * PERIOD, False
        self.asked: float | None = None
        self.starts: list[int] = []
        self.continuations: list[Any] = []

    def ask(self, observation: Any, start: int, continuation: Any = None) -> None:
        self.busy, self.asked, self.start = True, self.clock.now, start
        self.state = np.array(observation["state"], float)
        self.starts.append(start)
        self.continuations.append(continuation)

    def poll(self) -> Answer | None:
        if not self.busy or self.clock.now < self.asked + self.seconds - 1e-9:
            return None
        steps = 0.01 * np.arange(1, simulated_arm.HORIZON + 1)
        self.busy, asked, self.asked = False, self.asked, None
        return Answer(self.start, asked, self.seconds, (self.state + steps[:, None]).astype(np.float32))


def loop(
    periods: float, strategy: Strategy = "replace", execute: int | None = None, gap: float = 2.0, **timing: Any
) -> tuple[ControlLoop, Arm, Thinking, Clock]:
    clock = Clock()
    arm, thinking, spec = Arm(clock), Thinking(clock, periods), simulated_arm.spec()
    guard = Guard(simulated_arm.profile(), HZ, spec.action, simulated_arm.JOINTS, ("rad", "rad"), gap)
    chunks = Chunks(strategy, simulated_arm.HORIZON, execute)
    told = Telemetry(64, 2)
    control = ControlLoop(
        arm,
        thinking,
        guard,
        chunks,
        spec,
        LoopTiming(HZ, **timing),
        told,
        clock=clock,
        sleep=clock.sleep,
    )
    return control, arm, thinking, clock


def joints(arm: Arm) -> list[float]:
    return [round(float(command[0]), 4) for _, command in arm.sent]
