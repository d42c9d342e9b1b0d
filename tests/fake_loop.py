"""The control loop on a clock of our own, an arm and a policy that go by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rlrc.benchmarks.control import simulated_arm
from rlrc.robots.robot import Sensed
from rlrc.runtime.control.chunks import Chunks, Strategy
from rlrc.runtime.control.control_loop import ControlLoop, LoopHooks, LoopTiming
from rlrc.runtime.control.inference_process import Answer
from rlrc.runtime.control.planner import Planner
from rlrc.runtime.control.rearming import RearmController
from rlrc.runtime.control.stop_switch import StopSwitch
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


class FakeInference:
    """Answers after ``periods`` with a chunk that counts up from where the joints are: 0.01 rad a step."""

    def __init__(self, clock: Clock, periods: float) -> None:
        self.clock, self.seconds, self.busy = clock, periods * PERIOD, False
        self.requested_at: float | None = None
        self.starts: list[int] = []
        self.continuations: list[Any] = []

    def ask(self, observation: Any, start: int, continuation: Any = None) -> None:
        self.busy, self.requested_at, self.start = True, self.clock.now, start
        self.state = np.array(observation["state"], float)
        self.starts.append(start)
        self.continuations.append(continuation)

    def poll(self) -> Answer | None:
        if not self.busy or self.clock.now < self.requested_at + self.seconds - 1e-9:
            return None
        steps = 0.01 * np.arange(1, simulated_arm.HORIZON + 1)
        self.busy, asked, self.requested_at = False, self.requested_at, None
        return Answer(self.start, asked, self.seconds, (self.state + steps[:, None]).astype(np.float32))


def loop(
    periods: float,
    strategy: Strategy = "replace",
    execute: int | None = None,
    gap: float = 2.0,
    stop_reason: Callable[[], str | None] = lambda: None,
    sleep: Callable[[float], bool | None] | None = None,
    switch: StopSwitch | None = None,
    report: Callable[[str], None] = print,
    **timing: Any,
) -> tuple[ControlLoop, Arm, FakeInference, Clock]:
    """With a ``switch`` the robot can be re-armed, which ``report`` tells."""
    clock = Clock()
    arm, inference, spec = Arm(clock), FakeInference(clock, periods), simulated_arm.spec()
    guard = Guard(simulated_arm.profile(), HZ, spec.action, simulated_arm.JOINTS, ("rad", "rad"), gap)
    planner = Planner(inference, Chunks(strategy, simulated_arm.HORIZON, execute), spec)
    rearming = None if switch is None else RearmController(switch, guard, planner, report, clock)
    stop_reason = stop_reason if switch is None else switch.stop_reason
    hooks = LoopHooks(stop_reason, clock, sleep or clock.sleep, rearming=rearming)
    control = ControlLoop(arm, planner, guard, Telemetry(64, 2), spec, LoopTiming(HZ, **timing), hooks)
    return control, arm, inference, clock


def joints(arm: Arm) -> list[float]:
    return [round(float(command[0]), 4) for _, command in arm.sent]
