"""The guard between policy and robot: passes commands that keep every limit of the profile, and otherwise fails closed.

    guard = Guard(profile, hz, policy.action, state.names, state.units)
    guard.start(measured)                      # where the robot is; nothing is sent before
    verdict = guard.step(command, measured, dt)    # each period; guard.hold(measured, dt) if there is no action
    robot.command(verdict.command)             # None: there is nothing safe to send, use the robot's own stop

``measured`` is the robot's state vector, ``dt`` the seconds since the last command. A command that breaks a limit is
clamped, held or stopped, as the profile says. NaN, infinity, a wrong shape or type, a state that is missing, old or not
finite, a clock that jumps or stands still, and any exception in the guard stop the robot. A stop latches: until
``rearm`` only the hold is sent. A hold brings every dimension to rest within its acceleration limit, never in a jump,
and keeps it there: an absolute stays where it came to rest, a delta and a velocity become 0, a gripper keeps its last
value. Which commands are safe, and why there always is one: rlrc.runtime.safety.braking. Not thread-safe.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import ActionSpec
from rlrc.errors import UserError
from rlrc.runtime.safety import braking
from rlrc.runtime.safety import profile as profiles
from rlrc.runtime.safety.angles import Angles, shortest
from rlrc.runtime.safety.plausibility import Plausibility
from rlrc.runtime.safety.position_limits import braking_limits, find_position_limits, strict_range
from rlrc.runtime.safety.profile import Dimension, RobotProfile, Tracking
from rlrc.runtime.safety.verdict import Act, Event, Kind, Verdict

KEPT = 1024  # events in ``Guard.events``
ROUNDING = 1e-6  # of a position (of 1 where that is larger): what float32 may add to a command without breaking a limit

_ORDER: dict[str, int] = {"clamp": 0, "hold": 1, "stop": 2}


class Guard:
    """Raises UserError if the profile does not cover the policy's actions, or the state does not measure them.

    ``names`` and ``units`` describe the robot's state vector. ``periods``: the longest time between commands, and the
    highest age of a state, in periods of ``hz``. ``follows``: whether the state follows the commands; that of a
    recording does not.
    """

    def __init__(
        self,
        profile: RobotProfile,
        hz: float,
        action: ActionSpec,
        names: Sequence[str],
        units: Sequence[str],
        periods: float = 2.0,
        follows: bool = True,
    ) -> None:
        if not (math.isfinite(hz) and hz > 0):
            raise UserError(f"expected a control rate above 0 Hz for the guard, found {hz}; give another --hz")
        profiles.check(profile)
        self.profile, self.period, self.longest = profile, 1 / hz, periods / hz
        state = profiles.match_state(profile, action, names, units)
        self._measures, self._entries = list(state.dimensions), list(state.entries)
        self._factors, self._states = np.array(state.factors), len(names)
        dimensions = profile.dimensions
        self._position_limits = [find_position_limits(profile, index) for index in range(len(dimensions))]
        meanings = np.array([dimension.meaning for dimension in dimensions])
        self._is_velocity, self._is_delta = meanings == "velocity", meanings == "delta"
        self._is_absolute = ~(self._is_velocity | self._is_delta)
        self._is_measured = np.array([dimension.measured for dimension in dimensions])
        # Deltas and velocities without a measurement or position limits: their position is unknown and unlimited.
        self._is_untracked = np.array([d.unbounded is not None and d.state is None for d in dimensions])
        self._strict_range = strict_range([self._position_limits[index] for index in self._measures])
        self.limits = braking_limits(profile, self._is_velocity, self.longest)
        self._tracking = np.array([math.inf if d.tracking is None else d.tracking.limit for d in dimensions])
        measured = [dimensions[index] for index in self._measures]
        self._angles, self._measured_angles = Angles(dimensions), Angles(measured)
        self._plausible: Plausibility | None = None
        if follows:
            self._plausible = Plausibility(measured, self.limits.of(self._measures), self._measured_angles.periods)
        self._position = np.array([dimension.rest or 0.0 for dimension in dimensions])
        self._velocity = np.zeros(len(dimensions))
        self._aim = self._position  # the last target, which matters for absolutes
        self._sent, self._moved = 0.0, np.zeros(len(dimensions))  # the last command: its time, and how far it moved
        self._before = self._position, self._velocity, self._aim, self._sent  # what ``take_back`` restores
        self.started, self.steps = False, 0
        self.reason: str | None = None  # why the guard is stopped
        self.events: deque[Event] = deque(maxlen=KEPT)  # the last ones
        self.counts: Counter[tuple[Kind, Act]] = Counter()  # of all
        self._fresh: list[Event] = []  # not in a verdict yet

    @property
    def stopped(self) -> bool:
        return self.reason is not None

    @property
    def at_rest(self) -> bool:
        """Whether the last command moves nothing."""
        return not self._velocity.any()

    def start(self, measured: NDArray[np.floating]) -> None:
        """Begins at rest where the robot is. Raises UserError while stopped, and for a state that is not usable."""
        if self.reason is not None:
            raise UserError(f"expected a guard that is not stopped, found it stopped ({self.reason}); re-arm it first")
        try:
            sensed = self._sense(measured, 0.0)
        except ValueError as error:
            raise UserError(f"expected the robot's state to start from, found {error}; check its sensors") from None
        position = self._position.copy()  # a gripper without a measurement keeps its last command
        position[self._measures] = sensed
        position = self._angles.wrap(position)
        for index, dimension in enumerate(self.profile.dimensions):
            for limit in self._position_limits[index]:
                if (beyond := limit.exceeded(float(position[index]), limit.slack)) is not None:
                    raise UserError(
                        f"expected the robot to start within its limits, found {dimension.name} at "
                        f"{position[index]:.6g} {dimension.length}, beyond {beyond:.6g}; move it there first, or give "
                        "the limit a slack in the profile"
                    )
        inside = np.clip(position, self.limits.low, self.limits.high)
        self._position = np.where(self._is_measured, position, inside)
        self._velocity, self.started = np.zeros(len(position)), True
        self._aim = self._position
        if self._plausible is not None:
            self._plausible.forget()
            self._plausible.check(position[self._measures], self._sent, self._moved[self._measures], 0.0)
        self._moved = np.zeros(len(position))
        self._log("start", "start", "at rest where the robot was measured")

    def step(self, command: Any, measured: Any, dt: float, age: float = 0.0) -> Verdict:
        """What to send for the policy's ``command`` (dim,). ``age``: seconds since ``measured`` was measured."""
        return self._decide(command, True, measured, dt, age)

    def hold(self, measured: Any, dt: float, age: float = 0.0) -> Verdict:
        """What to send without a command: on towards rest, or staying there."""
        return self._decide(None, False, measured, dt, age)

    def predict_state(self, measured: NDArray[np.floating]) -> NDArray[np.float64]:
        """The state (S,) once the robot has executed its commands: for a chunk's later steps, before they happen."""
        state = np.array(measured, np.float64)
        state[self._entries] = self._angles.wrap(self._position)[self._measures] / self._factors
        return state

    def take_back(self) -> None:
        """The last verdict was not sent: the next one goes on from the verdict before it."""
        self._position, self._velocity, self._aim, self._sent = self._before
        self._moved = np.zeros(len(self._position))

    def stop(self, reason: str) -> None:
        """Latches. The next ``step`` or ``hold`` begins to brake."""
        self._stop("stop", reason)

    def rearm(self, reason: str, measured: NDArray[np.floating] | None = None) -> None:
        """Passes commands again: on from the last hold, or with ``measured`` from rest where the robot is.

        Raises UserError, and stays stopped, for a state that is not usable. Without a state, a tracking limit stops
        the guard again if the robot was moved meanwhile.
        """
        stopped, self.reason = self.reason, None
        if stopped is None:
            return
        if self._plausible is not None:
            self._plausible.forget()
        self._log("rearm", "rearm", f"{reason} (was stopped: {stopped})")
        try:
            if measured is not None:
                self.start(measured)
        except UserError as error:
            self._stop("stop", f"{stopped}; not re-armed: {error}")
            raise

    def _decide(self, command: Any, commanded: bool, measured: Any, dt: Any, age: Any) -> Verdict:
        self.steps += 1
        seconds = self.period
        try:
            seconds = self._clock(dt)
            if self.reason is None:
                self._observe(measured, age, seconds)
            if self.reason is None and commanded:
                return self._step(command, seconds)
            return self._brake(seconds)
        except Exception as error:  # a mistake in the guard must not harm the robot
            self._stop("fault", f"{type(error).__name__}: {error}")
        try:
            return self._brake(seconds)
        except Exception as error:
            self._log("fault", "stop", f"no hold either: {type(error).__name__}: {error}")
            return Verdict(None, True, True, self._take_events())

    def _clock(self, dt: Any) -> float:
        """The seconds to brake for. A clock that stands still, goes back or jumps stops the robot."""
        seconds = float(dt) if isinstance(dt, (int, float, np.floating)) else math.nan
        if not 0 < seconds <= self.longest:
            self._stop("clock", f"{dt!r} s since the last command, expected more than 0 and up to {self.longest:.6g}")
        return seconds if 0 < seconds < math.inf else self.period

    def _observe(self, measured: Any, age: Any, seconds: float) -> None:
        if not self.started:
            return self._stop("measured", "no start: where the robot is was never measured")
        try:
            sensed = self._sense(measured, age)
        except ValueError as error:
            return self._stop("measured", str(error))
        expected, angles = self._position[self._measures], self._measured_angles
        sensed = angles.unwrap(sensed, expected)
        off = np.abs(shortest(sensed - expected, angles.periods))
        for index in np.flatnonzero(off > self._tracking[self._measures]).tolist():
            dimension = self.profile.dimensions[self._measures[index]]
            assert dimension.tracking is not None
            self._break("tracking", dimension.tracking.on, dimension, float(off[index]), dimension.tracking.limit)
        if self._plausible is not None:
            self._check_plausibility(sensed, self._sent + seconds - float(age), seconds)
        if ((sensed < self._strict_range[0]) | (sensed > self._strict_range[1])).any():
            self._find_outside(sensed)
        position = self._position.copy()
        position[self._measures] = sensed
        self._position = np.where(self._is_measured, position, self._position)

    def _check_plausibility(self, sensed: NDArray[np.float64], stamp: float, seconds: float) -> None:
        """An implausible state stops the robot, or holds it if the profile says so."""
        assert self._plausible is not None
        moved, self._moved = self._moved, np.zeros(len(self._moved))
        for found in self._plausible.check(sensed, stamp, moved[self._measures], seconds):
            dimension = self.profile.dimensions[self._measures[found.place]]
            limit: Tracking | None = getattr(dimension, found.what)
            self._break(found.what, "stop" if limit is None else limit.on, dimension, found.found, found.limit)

    def _find_outside(self, sensed: NDArray[np.float64]) -> None:
        """A robot measured beyond limits that hold or stop, however it got there."""
        for index, found in zip(self._measures, sensed.tolist(), strict=True):
            for limit in self._position_limits[index]:
                if limit.on != "clamp" and (end := limit.exceeded(found, limit.slack)) is not None:
                    self._break(limit.kind, limit.on, self.profile.dimensions[index], found, end)

    def _sense(self, measured: Any, age: Any) -> NDArray[np.float64]:
        """The measured positions, in the dimensions' units. Raises ValueError for an unusable state."""
        seconds = float(age) if isinstance(age, (int, float, np.floating)) else math.nan
        if not 0 <= seconds <= self.longest:
            raise ValueError(f"a state {age!r} s old, expected up to {self.longest:.6g}")
        if measured is None:
            raise ValueError("no state")
        if not isinstance(measured, np.ndarray) or measured.dtype.kind != "f" or measured.shape != (self._states,):
            raise ValueError(f"{_form(measured)} as state, expected floats ({self._states},)")
        with np.errstate(over="ignore", invalid="ignore"):
            sensed: NDArray[np.float64] = measured[self._entries].astype(np.float64) * self._factors
        if (broken := ~(np.abs(sensed) <= braking.FAR)).any():  # NaN too
            raise ValueError(f"{measured[self._entries][broken][0]} in the state")
        return sensed

    def _step(self, command: Any, dt: float) -> Verdict:
        shape = self._position.shape
        if not isinstance(command, np.ndarray) or command.dtype.kind != "f" or command.shape != shape:
            self._stop("command", f"{_form(command)}, expected floats {shape}")
            return self._brake(dt)
        with np.errstate(over="ignore", invalid="ignore"):
            values = command.astype(np.float64)
        if (broken := ~(np.abs(values) <= braking.FAR)).any():  # NaN too
            first = int(np.argmax(broken))
            self._stop("command", f"{command[first]} in {self.profile.dimensions[first].name}")
            return self._brake(dt)
        if self._angles.periods is not None:
            values = np.where(self._is_absolute, self._angles.unwrap(values, self._position), values)
        if any(event.act == "hold" for event in self._fresh):
            return self._brake(dt)
        away = values - self._position
        wanted = np.where(self._is_velocity, values, np.where(self._is_delta, values, away) / dt)
        lowest, highest = braking.velocity_range(self._position, self._velocity, self.limits, dt)
        safe = np.minimum(np.maximum(wanted, lowest), highest)  # three times as fast as clip
        kept = safe == wanted
        if kept.all():
            return self._send(safe, dt, values, kept, command)
        acts = [self._explain(index, wanted, safe, dt) for index in np.flatnonzero(~kept).tolist()]
        if "stop" in acts or "hold" in acts:
            return self._brake(dt)
        # A target out of reach is approached so that the robot can come to rest there, not beyond it. A target that
        # moves on meanwhile is followed.
        on = np.maximum(np.copysign(1.0, away) * (values - self._aim) / dt, 0.0)
        most = braking.highest_velocity(np.abs(away), self.limits, dt) + on
        calm = np.copysign(np.minimum(np.abs(wanted), most), wanted)
        safe = np.where(self._is_absolute & ~kept, np.clip(calm, lowest, highest), safe)
        return self._send(safe, dt, values, kept, command)

    def _explain(self, index: int, wanted: Any, safe: Any, dt: float) -> Act:
        """Logs which limits a dimension's command breaks; returns the most severe action that they demand."""
        dimension = self.profile.dimensions[index]
        position, velocity = float(self._position[index]), float(self._velocity[index])
        speed = float(wanted[index])
        target, rounding = position + speed * dt, ROUNDING * max(1.0, abs(position))
        broken: list[tuple[Kind, profiles.On, float, float]] = []
        for bound in self._position_limits[index]:
            if (end := bound.exceeded(target, rounding)) is not None:
                broken.append((bound.kind, bound.on, target, end))
        if (limit := dimension.velocity) is not None and (abs(speed) - limit.limit) * dt > rounding:
            broken.append(("velocity", limit.on, speed, limit.limit))
        change = (speed - velocity) / dt
        if (limit := dimension.acceleration) is not None and (abs(change) - limit.limit) * dt * dt > rounding:
            broken.append(("acceleration", limit.on, change, limit.limit))
        if not broken and abs(speed - float(safe[index])) * dt > rounding:
            broken.append(("braking", "clamp", speed, float(safe[index])))
        for kind, on, found, most in broken:
            self._break(kind, on, dimension, found, most)
        return max((on for _, on, _, _ in broken), key=_ORDER.__getitem__, default="clamp")

    def _brake(self, dt: float) -> Verdict:
        """The hold: brings every dimension towards rest within its acceleration limit."""
        if not self.started:
            return Verdict(None, True, self.stopped, self._take_events())
        return self._send(braking.brake(self._velocity, self.limits, dt), dt)

    def _send(
        self,
        velocity: NDArray[np.float64],
        dt: float,
        values: NDArray[np.float64] | None = None,
        kept: NDArray[np.bool_] | None = None,
        command: NDArray[np.floating] | None = None,
    ) -> Verdict:
        """The command for these velocities, the policy's own where it is ``kept``; records where it leads.

        ``values`` are the policy's ``command`` with angles shifted by whole turns to the position.
        """
        moved = self._position + velocity * dt
        if values is not None and kept is not None:
            moved = np.where(self._is_absolute & kept, values, moved)
        inside = np.minimum(np.maximum(moved, self.limits.low), self.limits.high)
        target = np.where(self._is_measured, moved, inside)
        target[self._is_untracked] = 0.0
        absolute = self._angles.wrap(target)
        sent = np.where(self._is_velocity, velocity, np.where(self._is_delta, velocity * dt, absolute))
        if values is not None and kept is not None:
            sent = np.where(~self._is_absolute & kept, values, sent)
        if command is not None and kept is not None and self._angles.periods is not None:
            exact = self._angles.wrap(command.astype(np.float64))  # without the rounding error of a turn
            sent = np.where(self._angles.turns & self._is_absolute & kept, exact, sent)
        self._before = self._position, self._velocity, self._aim, self._sent
        self._moved, self._sent = velocity * dt, self._sent + dt
        self._position, self._velocity = target, velocity
        self._aim = target if values is None else values
        return Verdict(sent, values is None, self.stopped, self._take_events())

    def _break(self, kind: Kind, on: profiles.On, dimension: Dimension, found: float, limit: float) -> None:
        self._log(kind, on, "", dimension.name, found, limit)
        if on == "stop" and self.reason is None:
            self.reason = f"{kind} of {dimension.name}: {found:.6g}, limit {limit:.6g} ({dimension.unit})"

    def _stop(self, kind: Kind, reason: str) -> None:
        if self.reason is None:
            self.reason = reason
            self._log(kind, "stop", reason)

    def _log(self, kind: Kind, act: Act, reason: str, *details: Any) -> None:
        event = Event(self.steps, kind, act, reason, *details)
        self.events.append(event)
        self.counts[kind, act] += 1
        self._fresh.append(event)

    def _take_events(self) -> tuple[Event, ...]:
        events, self._fresh = tuple(self._fresh), []
        return events


def _form(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
