"""The control loop: at a fixed rate sense, watch, plan, guard, command, request.

Step n is due at ``start + n / hz`` on a monotonic clock. Inference runs in parallel
(rlrc.runtime.control.inference_process); its chunks are joined by the time of their observations
(rlrc.runtime.control.chunks). An action that cannot be sent before the next step is due is never sent: the robot is
held, missed steps are left out, and no burst makes up for them. Where no action is planned for a step, the guard holds
the robot, and stops it if that lasts. Every other failure stops the robot. A stop does not wait for the next step:
braking begins at once, with a command of its own. Every failed step ends in a hold: the loop brakes the robot, calls
its own stop, and only then raises the exception again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import PolicySpec
from rlrc.errors import UserError
from rlrc.robots.driver import describe_driver_error, describe_exception, one_line
from rlrc.robots.robot import Robot, RobotError, Sensed
from rlrc.runtime.control.planner import Planner
from rlrc.runtime.control.rearming import RearmController
from rlrc.runtime.control.sensor_watchdog import SensorWatchdog
from rlrc.runtime.control.step import Show, Step
from rlrc.runtime.control.telemetry import Telemetry
from rlrc.runtime.safety.guard import Guard
from rlrc.runtime.safety.verdict import Verdict
from rlrc.worker import WorkerDied

BRAKING_S = 10.0  # longest time of braking after the loop itself has failed


@dataclass(frozen=True)
class LoopTiming:
    """``hz`` steps a second. ``speed``: seconds of the robot's time per second of the clock; not 1 in simulations.

    ``late``: periods that a state or a picture may be old; two commands may be half a period more apart.
    ``patience``: seconds that the robot is held without an action before it is stopped. ``hung``: seconds that
    inference may take, ``first`` those of an episode's first chunk.
    """

    hz: float
    speed: float = 1.0
    late: float = 1.5
    patience: float = 1.0
    hung: float = 5.0
    first: float = 60.0

    def __post_init__(self) -> None:
        if not 1 <= self.hz <= 200:
            raise UserError(f"expected a rate from 1 to 200 Hz, found {self.hz:g}; give another --hz")
        if not self.late > 0:
            raise UserError(f"expected a state to be allowed some periods, found {self.late:g}; give another --late")
        if not self.patience >= 0:
            raise UserError(f"expected a patience of 0 s or more, found {self.patience:g}; give another --patience")

    @property
    def period(self) -> float:
        return 1 / self.hz

    @property
    def gap(self) -> float:
        """Periods that two commands may be apart (``periods`` of rlrc.runtime.safety.guard.Guard)."""
        return self.late + 0.5


@dataclass(frozen=True)
class LoopHooks:
    """What connects a loop to the clock, the operator and the watchdogs.

    ``stop_reason``: why the robot is to stop, None while it is not. ``sleep`` takes seconds, and returns True early if
    somebody stops (StopSwitch.wait). ``beat`` is called at every step. ``show`` gets every step at its end. With
    ``rearming`` a stop does not end the episode: the robot is held until the operator re-arms it or ends the run.
    """

    stop_reason: Callable[[], str | None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], bool | None] = time.sleep
    beat: Callable[[], None] = lambda: None
    show: Show | None = None
    rearming: RearmController | None = None


class ControlLoop:
    """One episode at a time: ``run`` until it is over. A user's ``robot`` comes as a Driver, which checks its calls."""

    def __init__(
        self,
        robot: Robot,
        planner: Planner,
        guard: Guard,
        telemetry: Telemetry,
        spec: PolicySpec,
        timing: LoopTiming,
        hooks: LoopHooks | None = None,
    ) -> None:
        self.robot, self.planner, self.guard, self.telemetry = robot, planner, guard, telemetry
        self.timing, self._has_state = timing, spec.state is not None
        hooks = hooks or LoopHooks()
        self._stop_reason, self._clock, self._sleep, self._beat = (
            hooks.stop_reason,
            hooks.clock,
            hooks.sleep,
            hooks.beat,
        )
        self._show, self._rearming = hooks.show, hooks.rearming
        self.failures: list[str] = []
        """what failed in the robot or the loop, in words; also after a stop, whose reason the guard keeps"""
        self._ending = False  # the last step is over: come to rest
        required = frozenset(f"image.{camera.name}" for camera in spec.cameras if not camera.optional)
        self._sensors = SensorWatchdog(required, timing.late * timing.period, robot.live_pictures)
        self._start = self._planned_at = 0.0
        self._decided_at = 0.0  # when the last command was decided; sending it may take most of a period

    def run(self, over: Callable[[], bool] = lambda: False, steps: int | None = None, rest: bool = False) -> None:
        """Begins at rest where the robot is, with a chunk. Ends when ``over``, after ``steps``, or at rest by a stop.

        With ``rest`` the robot is brought to rest after the last step, instead of being left with its last command.

        Raises UserError if the robot cannot be started from where it is, and any exception that ends a step, once the
        robot has been braked.
        """
        try:
            self._begin()
            self._run_steps(over, steps, rest)
        except BaseException as error:
            if self.guard.started:
                try:
                    self._fail(describe_failure(error, "the loop"))
                finally:
                    self._brake_and_halt()
            raise

    def _begin(self) -> None:
        sensed = self.robot.sense()
        measured = self._measured(sensed)
        if sensed is None or measured is None:
            raise UserError("expected the robot's state to start from, found none; check its driver")
        self.guard.start(measured)
        self.planner.restart()
        self._wait_for_first_chunk(sensed)
        self._start = self._clock()
        self._decided_at = self._planned_at = self._start - self.timing.period

    def _wait_for_first_chunk(self, sensed: Sensed) -> None:
        """The robot is at rest and has time. This wait counts for no estimate of delays."""
        begun, answer = self._clock(), None
        try:
            self.planner.ask(sensed)
            while answer is None and self._clock() - begun < self.timing.first and not self._stop_reason():
                self._sleep(self.timing.period / 20)
                self._beat()
                answer = self.planner.inference.poll()
        except Exception as error:
            self._latch(describe_failure(error, "inference"))
            return
        if answer is None or answer.actions is None:
            detail = f": {answer.error}" if answer else f" within {self.timing.first:g} s"
            self._latch(self._stop_reason() or f"no first action{detail}")
        else:
            self.planner.add(answer)

    def _run_steps(self, over: Callable[[], bool], steps: int | None, rest: bool) -> None:
        number = 0
        while True:
            due = self._start + number * self.timing.period
            if self._stopped_before(due):
                verdict = self._step(number, self._clock(), 0)  # the step itself is still to come
            else:
                skipped = max(0, int((self._clock() - due) / self.timing.period))  # too late to begin at all
                number += skipped
                verdict = self._step(number, self._start + number * self.timing.period, skipped)
                number += 1
            self._beat()
            if over() or (steps is not None and number >= steps):
                self._ending = True
            if self._ending and (not rest or self.guard.at_rest):
                return
            if verdict.stopped and self.guard.at_rest and not self._await_rearming():
                return

    def _stopped_before(self, due: float) -> bool:
        """Waits until the step is due; returns whether somebody stops meanwhile.

        Waits at most a period, whatever the clock says: the guard detects a clock that went back.
        """
        while (early := due - self._clock()) > 0 and self._sleep(min(early, self.timing.period)):
            if not self.guard.stopped and self._stop_reason() is not None:
                return True
        return False

    def _step(self, number: int, due: float, skipped: int) -> Verdict:
        self.telemetry.begin(number, due, skipped)
        step = Step(number, due, skipped, self._clock())
        self._sense(step)
        self._watch(step)
        at = self._lap(step, "sense", step.begun)
        self._plan(step)
        at = self._lap(step, "plan", at)
        step.verdict = self._guard(step)
        at = self._lap(step, "guard", at)
        self._command(step)
        at = self._lap(step, "command", at)
        self._request(step)
        at = self._lap(step, "ask", at)
        self._display(step, at)
        self._record(step)
        return step.verdict

    def _sense(self, step: Step) -> None:
        """The robot's newest state. A stop that somebody asked for counts before anything that the driver does."""
        if reason := self._stop_reason():
            self._latch(reason)
        try:
            step.sensed = self.robot.sense()
        except BaseException as error:  # a driver's own mistakes stop the robot as well
            step.fault = describe_driver_error(error)
            self._fail(step.fault)

    def _watch(self, step: Step) -> None:
        """Stops the robot if its state or a picture is missing, old or repeated."""
        if step.fault is not None:
            return
        try:
            step.fault = self._sensors.fault(step.sensed, step.begun)
            if step.fault is not None:
                self._latch(step.fault)
        except BaseException as error:  # the pictures are the driver's objects
            step.fault = describe_driver_error(error)
            self._fail(step.fault)

    def _plan(self, step: Step) -> None:
        """The action for this step, from the chunks that have arrived; none while the robot is held or is to rest."""
        if self._is_held:
            self._try_rearming(step)
        if self._is_held or self._ending:
            return
        try:
            answer = self.planner.inference.poll()
        except Exception as error:
            return self._latch(describe_failure(error, "inference"))
        if answer is not None:
            step.inference_ms = answer.seconds * 1e3
            if answer.actions is None:
                return self._latch(f"no action: {answer.error}")
            self.planner.add(answer)
        elif self.planner.waiting(self._clock()) > self.timing.hung:
            self._latch(f"inference has not answered for {self.timing.hung:g} s")
        step.planned = self.planner.next_action()

    def _guard(self, step: Step) -> Verdict:
        """The guard's verdict on the planned action, or on a hold if there is none or it would be sent too late."""
        now, speed, measured = self._clock(), self.timing.speed, self._measured(step.sensed)
        age = np.nan if step.sensed is None else max(now - step.sensed.stamp, 0.0)
        step.age_ms = age * 1e3
        if step.planned is not None:
            self._planned_at = now
            if now - step.due < self.timing.period:
                verdict = self.guard.step(step.planned.action, measured, (now - self._decided_at) * speed, age * speed)
                guarded = self._clock()
                if verdict.held or guarded - step.due < self.timing.period:
                    self._decided_at = now
                    return verdict
                self.guard.take_back()  # the computer stood still meanwhile
                now = guarded
        elif now - self._planned_at > self.timing.patience and not self._ending:
            self._latch(f"no action for {self.timing.patience:g} s")
        dt, self._decided_at = (now - self._decided_at) * speed, now
        return self.guard.hold(measured, dt, age * speed)

    def _command(self, step: Step) -> None:
        """Sends what the guard gave, or calls the robot's own stop if that is nothing or fails."""
        command = step.verdict.command
        try:
            if command is not None:
                self.robot.command(command)
        except BaseException as error:
            self._fail(describe_driver_error(error))
            command = None
        if command is None:
            self._halt()
        step.sent, step.stopped = self._clock(), self.guard.stopped
        if step.planned is not None:
            self.planner.record_sent(step.sent)

    def _request(self, step: Step) -> None:
        """Asks for another chunk, unless the robot is stopped."""
        if step.sensed is None or self.guard.stopped:
            return
        try:
            self.planner.request(step.sensed)
        except Exception as error:
            self._latch(describe_failure(error, "inference"))

    def _display(self, step: Step, at: float) -> None:
        if self._show is None:
            return
        try:
            self._show(step)
        except BaseException as error:  # the operator no longer sees the robot
            self._show = None
            self._fail(describe_failure(error, "the page"))
        self._lap(step, "show", at)

    def _record(self, step: Step) -> None:
        verdict = step.verdict
        self.telemetry.write(
            verdict.command,
            sent=step.sent,
            late_ms=(step.begun - step.due) * 1e3,
            inference_ms=step.inference_ms,
            chunk=0 if step.planned is None else step.planned.chunk,
            place=0 if step.planned is None else step.planned.place,
            age_ms=step.age_ms,
            clamped=sum(event.act == "clamp" for event in verdict.events),
            late=not verdict.held and step.sent - step.due >= self.timing.period,
            held=verdict.held,
            stopped=step.stopped,
            **{f"{part}_ms": spent for part, spent in step.spent_ms.items()},
        )

    def _lap(self, step: Step, part: str, since: float) -> float:
        """Notes what a part of the step took; -> now."""
        now = self._clock()
        step.spent_ms[part] = (now - since) * 1e3
        return now

    @property
    def _is_held(self) -> bool:
        """Stopped, at rest, and held until the operator re-arms the robot."""
        return self._rearming is not None and self._rearming.since is not None

    def _await_rearming(self) -> bool:
        """Stopped and at rest: whether to hold the robot, since the operator may re-arm it."""
        return self._rearming is not None and self._rearming.rest(self.guard.reason)

    def _try_rearming(self, step: Step) -> None:
        """Goes on with a new chunk if the operator has requested that and every check passes."""
        assert self._rearming is not None
        actions = self._rearming.step(step.sensed, self._measured(step.sensed), step.fault)
        if actions is not None:
            self.planner.restart(actions)
            self._planned_at = self._clock()

    def _measured(self, sensed: Sensed | None) -> NDArray[Any] | None:
        """What the guard gets: without a state no numbers, but the guard still checks that a state arrives in time."""
        if sensed is None:
            return None
        return sensed.measured if self._has_state else np.zeros(0)

    def _brake_and_halt(self) -> None:
        """Brakes with nothing but the guard and the robot, then calls the robot's own stop. Raises nothing."""
        with suppress(BaseException):
            for _ in range(max(1, int(BRAKING_S * self.timing.hz))):
                verdict = self.guard.hold(None, self.timing.period * self.timing.speed, np.nan)
                if verdict.command is None:
                    break
                self.robot.command(verdict.command)
                if self.guard.at_rest:
                    break
                with suppress(BaseException):
                    self._beat()
                self._sleep(self.timing.period)
        self._halt()

    def _halt(self) -> None:
        """The robot's own stop, which must not raise."""
        try:
            self.robot.stop()
        except BaseException as error:
            self._fail(f"robot.stop() failed: {describe_driver_error(error)}")

    def _latch(self, reason: str) -> None:
        if not self.guard.stopped:
            self.guard.stop(reason)

    def _fail(self, reason: str) -> None:
        """Stops the robot. Keeps the reason even if the guard was stopped before."""
        if reason not in self.failures:
            self.failures.append(reason)
        self._latch(reason)


def describe_failure(error: BaseException, part: str) -> str:
    """What failed in a part of the loop, as one line. Expected errors have their own message."""
    if isinstance(error, (UserError, RobotError, WorkerDied)):
        return one_line(error)
    return f"{part} failed: {describe_exception(error)}"
