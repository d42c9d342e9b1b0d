"""The loop on the robot: at a fixed rate sense, take the action that is planned for this very step, guard it, send it.

Step n is due at ``start + n / hz`` on a monotonic clock. Inference runs beside the loop
(rlrc.runtime.control.inference_process); its chunks are joined by the time of their observations
(rlrc.runtime.control.chunks). An action that cannot be sent before the next step is due is not sent at all: the robot
is held, the schedule goes on without the steps that were missed, and no burst makes up for them. Where there is no
action for a step, the guard holds the robot, and stops it if that lasts. Whatever else goes wrong stops it. A stop that
somebody wants does not wait for the next step: braking begins with a command of its own, at once. Whatever ends a step
ends in a hold: an exception that no part of the loop deals with is raised again only after the robot has been braked
and its own stop called.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import PolicySpec
from rlrc.errors import UserError
from rlrc.robots.driver import named, one_line, said
from rlrc.robots.robot import Robot, RobotError, Sensed
from rlrc.runtime.control.chunks import Chunks, Planned
from rlrc.runtime.control.inference_process import Answer
from rlrc.runtime.control.rearming import RearmController
from rlrc.runtime.control.sensor_watchdog import SensorWatchdog
from rlrc.runtime.control.telemetry import Telemetry
from rlrc.runtime.inference import preprocess
from rlrc.runtime.safety.guard import Guard
from rlrc.runtime.safety.verdict import Verdict
from rlrc.worker import WorkerDied

BRAKING_S = 10.0  # longest time of braking after the loop itself has failed

Show = Callable[[Sensed | None, Any, Verdict], None]  # what was sensed, the telemetry's row, what was sent


class InferenceClient(Protocol):
    """What the loop needs of rlrc.runtime.control.inference_process.InferenceProcess."""

    @property
    def busy(self) -> bool: ...
    @property
    def asked(self) -> float | None: ...
    def ask(self, observation: Any, start: int, continuation: Any = None) -> None: ...
    def poll(self) -> Answer | None: ...


@dataclass(frozen=True)
class LoopTiming:
    """``hz`` steps a second. ``speed``: seconds of the robot's own time to one of ours; not 1 in simulations.

    ``late``: periods that a state or a picture may be old; between two commands there may be half of one more.
    ``patience``: seconds that the robot is held for want of an action, until that stops it. ``hung``: seconds that
    inference may take, ``first`` those of an episode's first one.
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
        """Periods that two commands may be apart: rlrc.runtime.safety.guard's."""
        return self.late + 0.5


class ControlLoop:
    """One episode at a time: ``run`` until it is over. ``stop`` gives the reason why somebody wants a stop, or None.

    A user's ``robot`` comes as a Driver, which checks what its calls give.
    ``sleep`` takes seconds, and ends early with True when somebody stops (StopSwitch.wait).
    With a ``standstill`` a stop does not end the episode: the robot is held until somebody re-arms it, or ends it.
    ``show`` gets every step when it is over.
    ``beat`` is called as long as the loop turns.
    """

    def __init__(
        self,
        robot: Robot,
        thinking: InferenceClient,
        guard: Guard,
        chunks: Chunks,
        spec: PolicySpec,
        timing: LoopTiming,
        telemetry: Telemetry,
        stop: Callable[[], str | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], bool | None] = time.sleep,
        standstill: RearmController | None = None,
        show: Show | None = None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.robot, self.thinking, self.guard, self.chunks = robot, thinking, guard, chunks
        self.spec, self.timing, self.telemetry = spec, timing, telemetry
        self._stop, self._clock, self._sleep, self._beat = stop, clock, sleep, beat
        self._standstill, self._show = standstill, show
        self._fault: str | None = None  # of the robot or its sensors, at this step
        self.failures: list[str] = []
        """what failed in the robot or the loop, in words; after a stop too, whose reason the guard keeps"""
        self._ending = False  # the steps are over: to rest
        needed = frozenset(f"image.{camera.name}" for camera in spec.cameras if not camera.optional)
        self._watch = SensorWatchdog(needed, timing.late * timing.period, robot.live_pictures)
        self._start = self._planned_at = self._asked_about = 0.0
        self._chosen = 0.0  # when the last command was; sending it may take most of a period
        self._progress = 0  # actions that were planned and played
        self._played: deque[float] = deque(maxlen=4 * chunks.horizon)  # when the last of them were sent

    def run(self, over: Callable[[], bool] = lambda: False, steps: int | None = None, rest: bool = False) -> None:
        """Begins at rest where the robot is, with a chunk. Ends when ``over``, after ``steps``, or at rest by a stop.

        With ``rest`` the robot is brought to rest after the last step, instead of being left with its last command.

        Raises UserError if the robot cannot be started from where it is, and whatever else ends a step unforeseen, once
        the robot has been braked.
        """
        try:
            self._begin()
            self._play(over, steps, rest)
        except BaseException as error:
            if self.guard.started:
                try:
                    self._fail(why(error, "the loop"))
                finally:
                    self._abandon()
            raise

    def _play(self, over: Callable[[], bool], steps: int | None, rest: bool) -> None:
        step = 0
        while True:
            due = self._start + step * self.timing.period
            if self._stopped_before(due):
                verdict = self._tick(step, self._clock(), 0)  # the step itself is still to come
            else:
                skipped = max(0, int((self._clock() - due) / self.timing.period))  # too late to be begun at all
                step += skipped
                verdict = self._tick(step, self._start + step * self.timing.period, skipped)
                step += 1
            self._beat()
            if over() or (steps is not None and step >= steps):
                self._ending = True
            if self._ending and (not rest or self.guard.at_rest):
                return
            if verdict.stopped and self.guard.at_rest and not self._rests():
                return

    def _abandon(self) -> None:
        """Brakes with nothing but the guard and the robot, then the robot's own stop. Raises nothing."""
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
        """The robot's own stop, which is not to raise."""
        try:
            self.robot.stop()
        except BaseException as error:
            self._fail(f"robot.stop() failed: {said(error)}")

    def _begin(self) -> None:
        sensed = self.robot.sense()
        measured = self._measured(sensed)
        if sensed is None or measured is None:
            raise UserError("expected the robot's state to start from, found none; check its driver")
        self.guard.start(measured)
        self._forget()
        self._prime(sensed)
        self._start = self._clock()
        self._chosen = self._planned_at = self._start - self.timing.period

    def _prime(self, sensed: Sensed) -> None:
        """The first chunk, waited for: the robot is at rest and has time. It counts for no estimate of delays."""
        begun, answer = self._clock(), None
        try:
            preprocess.check(sensed.observation, self.spec)
            self.thinking.ask(sensed.observation, 0)
            while answer is None and self._clock() - begun < self.timing.first and not self._stop():
                self._sleep(self.timing.period / 20)
                self._beat()
                answer = self.thinking.poll()
        except Exception as error:
            self._latch(why(error, "inference"))
            return
        if answer is None or answer.actions is None:
            said = f": {answer.error}" if answer else f" within {self.timing.first:g} s"
            self._latch(self._stop() or f"no first action{said}")
        else:
            self.chunks.add(answer.actions, 0, 0)

    def _stopped_before(self, due: float) -> bool:
        """Waits until the step is due; returns whether somebody wants a stop meanwhile.

        Never longer than a period, whatever the clock says: the guard notices one that went back.
        """
        while (early := due - self._clock()) > 0 and self._sleep(min(early, self.timing.period)):
            if not self.guard.stopped and self._stop() is not None:
                return True
        return False

    def _tick(self, step: int, due: float, skipped: int) -> Verdict:
        row, begun = self.telemetry.next(), self._clock()
        row["step"], row["due"], row["skipped"] = step, due, skipped
        row["late_ms"] = (begun - due) * 1e3
        sensed = self._sense(begun)
        row["sense_ms"] = _since(begun, sensing := self._clock())
        if self._standing:
            self._reconsider(sensed)
        planned = None if self._standing or self._ending else self._plan(row)
        row["plan_ms"] = _since(sensing, planning := self._clock())
        verdict = self._guarded(planned, sensed, due, row)
        row["guard_ms"] = _since(planning, guarding := self._clock())
        self._command(verdict)
        sent = self._clock()
        if planned is not None:
            self._progress += 1
            self._played.append(sent)
        row["sent"], row["command_ms"] = sent, _since(guarding, sent)
        row["late"] = not verdict.held and sent - due >= self.timing.period
        row["held"], row["stopped"] = verdict.held, self.guard.stopped
        row["clamped"] = sum(event.act == "clamp" for event in verdict.events)
        self.telemetry.commanded(verdict.command)
        self._ask(sensed)
        row["ask_ms"] = _since(sent, asking := self._clock())
        if self._show is not None:
            self._shown(sensed, row, verdict)
            row["show_ms"] = _since(asking, self._clock())
        return verdict

    def _shown(self, sensed: Sensed | None, row: Any, verdict: Verdict) -> None:
        assert self._show is not None
        try:
            self._show(sensed, row, verdict)
        except BaseException as error:  # the operator no longer sees the robot: no reason to go on
            self._show = None
            self._fail(why(error, "the page"))

    def _sense(self, now: float) -> Sensed | None:
        if reason := self._stop():
            self._latch(reason)
        sensed = None
        try:
            sensed = self.robot.sense()
            self._fault = self._watch.fault(sensed, now)
        except BaseException as error:  # a driver's own mistakes stop the robot as well
            self._fault = said(error)
            self._fail(self._fault)
        if self._fault:
            self._latch(self._fault)
        return sensed

    @property
    def _standing(self) -> bool:
        return self._standstill is not None and self._standstill.since is not None

    def _rests(self) -> bool:
        """Stopped and at rest: whether the robot is to be held on, since somebody may re-arm it."""
        return self._standstill is not None and self._standstill.rest(self.guard.reason)

    def _reconsider(self, sensed: Sensed | None) -> None:
        """Goes on with a new chunk, if somebody wishes so and nothing speaks against it."""
        assert self._standstill is not None
        measured = self._measured(sensed)
        actions = self._standstill.step(sensed, measured, self._fault, self.guard, self.thinking, self.spec)
        if actions is not None:
            self._forget()
            self.chunks.add(actions, 0, 0)
            self._planned_at = self._clock()

    def _forget(self) -> None:
        self.chunks.clear()
        self._asked_about = 0.0
        self._progress = 0
        self._played.clear()

    def _plan(self, row: Any) -> Planned | None:
        """The action for this step, from the chunks that have come."""
        try:
            answer = self.thinking.poll()
        except Exception as error:
            self._latch(why(error, "inference"))
            return None
        if answer is not None:
            row["inference_ms"] = answer.seconds * 1e3
            if answer.actions is None:
                self._latch(f"no action: {answer.error}")
                return None
            self.chunks.add(answer.actions, answer.start, self._progress)
        elif self.thinking.asked is not None and self._clock() - self.thinking.asked > self.timing.hung:
            self._latch(f"inference has not answered for {self.timing.hung:g} s")
        planned = self.chunks.at(self._progress)
        if planned is not None:
            row["chunk"], row["place"] = planned.chunk, planned.place
        return planned

    def _guarded(self, planned: Planned | None, sensed: Sensed | None, due: float, row: Any) -> Verdict:
        now, speed = self._clock(), self.timing.speed
        dt, before = (now - self._chosen) * speed, self._chosen
        self._chosen = now
        age = np.nan if sensed is None else max(now - sensed.stamp, 0.0)
        row["age_ms"] = age * 1e3
        measured = self._measured(sensed)
        if planned is not None:
            self._planned_at = now
            if now - due < self.timing.period:  # else it could not be sent before the next step is due
                verdict = self.guard.step(planned.action, measured, dt, age * speed)
                guarded = self._clock()
                if verdict.held or guarded - due < self.timing.period:
                    return verdict
                self.guard.take_back()  # the computer has stood still meanwhile
                dt, self._chosen = (guarded - before) * speed, guarded
        elif now - self._planned_at > self.timing.patience and not self._ending:
            self._latch(f"no action for {self.timing.patience:g} s")
        return self.guard.hold(measured, dt, age * speed)

    def _measured(self, sensed: Sensed | None) -> NDArray[Any] | None:
        """What the guard gets: of a policy without a state no numbers, but it wants to be told them in time."""
        if sensed is None:
            return None
        return np.zeros(0) if self.spec.state is None else sensed.measured

    def _command(self, verdict: Verdict) -> None:
        if verdict.command is None:
            return self._halt()
        try:
            self.robot.command(verdict.command)
        except BaseException as error:
            self._fail(said(error))
            self._halt()

    def _ask(self, sensed: Sensed | None) -> None:
        """For another chunk. Its first action is for the first command after the state that it is asked about."""
        if sensed is None or sensed.stamp == self._asked_about or self.thinking.busy or self.guard.stopped:
            return
        start = self._progress - sum(sent >= sensed.stamp for sent in self._played)
        if not self.chunks.wants(start):
            return
        try:
            preprocess.check(sensed.observation, self.spec)
            self.thinking.ask(sensed.observation, start, self.chunks.continuation(start))
            self._asked_about = sensed.stamp
        except Exception as error:
            self._latch(why(error, "inference"))

    def _latch(self, reason: str) -> None:
        if not self.guard.stopped:
            self.guard.stop(reason)

    def _fail(self, reason: str) -> None:
        """A stop whose reason is not lost where the guard has been stopped before."""
        if reason not in self.failures:
            self.failures.append(reason)
        self._latch(reason)


def why(error: BaseException, part: str) -> str:
    """What went wrong in a part of the loop, as one line; expected errors say it themselves."""
    return (
        one_line(error) if isinstance(error, (UserError, RobotError, WorkerDied)) else f"{part} failed: {named(error)}"
    )


def _since(before: float, now: float) -> float:
    return (now - before) * 1e3
