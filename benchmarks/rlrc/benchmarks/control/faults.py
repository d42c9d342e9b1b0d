"""The fault matrix: within two periods after any fault, the moving arm receives only holds."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from rlrc.benchmarks.control import simulated_arm
from rlrc.errors import UserError
from rlrc.realtime import real_time
from rlrc.robots.driver import Driver
from rlrc.robots.recorder import Recorder
from rlrc.runtime.control.chunks import Chunks
from rlrc.runtime.control.control_loop import ControlLoop, LoopHooks, LoopTiming
from rlrc.runtime.control.inference_process import InferenceProcess
from rlrc.runtime.control.planner import Planner
from rlrc.runtime.control.stop_switch import StopSwitch
from rlrc.runtime.control.telemetry import Telemetry
from rlrc.runtime.control.watchdog import Watchdog
from rlrc.runtime.safety.guard import Guard

BEFORE_S = 0.6  # how long the arm moves before the fault
PATIENCE_S = 0.4
LEAD = 0.1  # rad by which commands may lead the arm's state
ARM: tuple[str, ...] = get_args(simulated_arm.ArmFault)
POLICY: tuple[str, ...] = get_args(simulated_arm.PolicyFault)
LOOP = ("guard exception", "clock jump", "clock back", "inference killed", "full disk", "Ctrl-C twice")
FAULTS = (*ARM, *POLICY, *LOOP)


@dataclass(frozen=True)
class FaultOutcome:
    """``hold_ms``: from the start of the fault to the first hold, or to ``robot.stop()`` if that comes first.

    ``rest_ms``: until nothing moves. ``after``: later commands that are not holds. ``reason``: the guard's, None if it
    did not stop. ``stopped``: whether ``robot.stop()`` was called.
    """

    fault: str
    hz: float
    hold_ms: float
    rest_ms: float
    after: int
    moving_at_end: float
    reason: str | None
    stopped: bool = False


class FaultyGuard(Guard):
    """A guard that fails while ``broken`` is set."""

    broken = False

    def _step(self, command: Any, dt: float) -> Any:
        if self.broken:
            raise ZeroDivisionError("injected")
        return super()._step(command, dt)


class Clock:
    """The monotonic clock plus ``jump`` seconds."""

    def __init__(self) -> None:
        self.jump = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.jump


def inject(fault: str, hz: float = 50.0) -> FaultOutcome:
    """Move the arm, inject the fault, and evaluate the commands from then until the arm is at rest."""
    arm, clock, spec = simulated_arm.SimulatedArm(), Clock(), simulated_arm.spec()
    first = arm.sense()
    assert first is not None
    inference = InferenceProcess(simulated_arm.Circle, (hz, fault if fault in POLICY else None), first.observation)
    timing = LoopTiming(hz, patience=PATIENCE_S, hung=0.5)
    joints, units = simulated_arm.JOINTS, spec.action.units
    guard = FaultyGuard(simulated_arm.profile(LEAD), hz, spec.action, joints, units, timing.gap)
    telemetry = Telemetry(4096, spec.action.dim)
    folder, switch = Path(tempfile.mkdtemp()), StopSwitch()
    driver = Driver(arm)
    watchdog = Watchdog(driver, report=lambda line: None)
    recorder = Recorder(driver, spec, hz, folder / "recorded")
    recorder.begin("move")
    planner = Planner(inference, Chunks("replace", simulated_arm.HORIZON), spec)
    hooks = LoopHooks(switch.stop_reason, clock, switch.wait, watchdog.beat)
    control_loop = ControlLoop(recorder, planner, guard, telemetry, spec, timing, hooks)
    fault_times: list[float] = []

    def over() -> bool:
        if not fault_times and telemetry.steps >= BEFORE_S * hz:
            fault_times.append(time.monotonic())
            _begin(fault, arm, inference, guard, clock, recorder)
        return False

    try:
        with switch.listen(keyboard=None), real_time(), watchdog.watching(timing.gap / hz):
            control_loop.run(over, steps=int((BEFORE_S + 3) * hz))
    finally:
        inference.close()
        recorder.close()
        shutil.rmtree(folder)
    if not fault_times:
        raise UserError(
            f"expected the arm to move for {BEFORE_S} s at {hz:g} Hz, found it stopped: {guard.reason}; the machine "
            "may be busy: run again, or at a lower rate"
        )
    return _outcome(fault, hz, telemetry, arm, fault_times[0], guard)


def _begin(
    fault: str,
    arm: simulated_arm.SimulatedArm,
    inference: InferenceProcess,
    guard: FaultyGuard,
    clock: Clock,
    recorder: Recorder,
) -> None:
    if fault in ARM:
        arm.break_down(fault)  # type: ignore[arg-type]
    elif fault in POLICY:
        arm.mark = simulated_arm.MARK
    elif fault == "guard exception":
        guard.broken = True
    elif fault in ("clock jump", "clock back"):
        clock.jump = 10.0 if fault == "clock jump" else -10.0
    elif fault == "inference killed":
        os.kill(inference.pid, signal.SIGKILL)
    elif fault == "full disk":
        os.dup2(os.open("/dev/full", os.O_WRONLY), recorder._stream.fileno())
    else:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)


def _outcome(
    fault: str, hz: float, telemetry: Telemetry, arm: simulated_arm.SimulatedArm, began: float, guard: Guard
) -> FaultOutcome:
    """Evaluate the commands that the arm recorded, with its own time stamps."""
    times, commands = np.array([at for at, _ in arm.sent]), np.array([command for _, command in arm.sent])
    held = telemetry.rows["held"][arm.calls]
    later = np.flatnonzero((times >= began) & held)
    if fault in ("hang", "frozen state"):  # commands that were already planned or lead little are still sent
        last = np.flatnonzero(~held)[-1]
        began = times[last] + (1 / hz if fault == "hang" else 0.0)
    if fault in simulated_arm.HANGS:
        began = arm.hung_at
    stop = arm.stopped_at
    if not len(later) or (stop is not None and stop < times[later[0]]):
        if stop is None:
            return FaultOutcome(fault, hz, np.inf, np.inf, 0, np.inf, guard.reason)
        beyond = commands[times > stop]
        after = int((~held[times > stop]).sum())
        moving = float(np.abs(np.diff(beyond, axis=0)).max()) if len(beyond) > 1 else 0.0
        halted = float(stop - began) * 1e3
        return FaultOutcome(fault, hz, halted, halted, after, moving, guard.reason, True)
    first = later[0]
    moves = np.abs(np.diff(commands[first:], axis=0)).max(1) > 1e-9 if len(commands) > first + 1 else np.array([False])
    rest = first + (np.flatnonzero(moves)[-1] + 1 if moves.any() else 0)
    return FaultOutcome(
        fault,
        hz,
        float(times[first] - began) * 1e3,
        float(times[rest] - began) * 1e3,
        int((~held[first:]).sum()),
        float(np.abs(commands[-1] - commands[-2]).max()),
        guard.reason,
        stop is not None,
    )
