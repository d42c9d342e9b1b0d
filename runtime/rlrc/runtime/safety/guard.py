"""The guard between policy and robot: lets through what keeps every limit of the profile, and else fails closed.

    guard = Guard(profile, hz, policy.action, state.names, state.units)
    guard.start(measured)                      # where the robot is; nothing is sent before
    verdict = guard.step(command, measured, dt)    # each period; guard.hold(measured, dt) where there is no action
    robot.command(verdict.command)             # None: there is nothing safe to send, use the robot's own stop

``measured`` is the robot's state vector, ``dt`` the seconds since the last command. What a command breaks is clamped,
held or stopped as the profile says. NaN, infinity, a wrong shape or type, a state that is missing, old or not finite, a
clock that jumps or stands, and any exception in here stop. A stop latches: until ``rearm`` nothing but the hold goes
out. Hold means the same for all meanings: every dimension is brought to rest within its acceleration limit, never in a
jump, and kept there: an absolute stays where it came to rest, a delta and a velocity become 0, a gripper keeps its last
value. Which commands there are, and why there is always one: rlrc.runtime.safety.braking. Not for several threads.
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
from rlrc.runtime.safety.position_limits import bounds, edges, limits_of
from rlrc.runtime.safety.profile import Dimension, RobotProfile, Tracking
from rlrc.runtime.safety.verdict import Act, Event, Kind, Verdict

KEPT = 1024  # events that ``Guard.events`` holds
ROUNDING = 1e-6  # of a position (of 1 where that is larger): what float32 may add to a command without breaking a limit

_ORDER: dict[str, int] = {"clamp": 0, "hold": 1, "stop": 2}


class Guard:
    """Raises UserError where the profile does not cover the policy's actions, or the state does not measure them.

    ``names`` and ``units`` are those of the robot's state vector. ``periods``: the longest time between commands, and
    the highest age of a state, in periods of ``hz``. ``follows``: whether what is measured comes of the commands; a
    recording's does not.
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
        senses = profiles.senses(profile, action, names, units)
        self._measures, self._entries = list(senses.dimensions), list(senses.entries)
        self._factors, self._states = np.array(senses.factors), len(names)
        dimensions = profile.dimensions
        self._bounds = [bounds(profile, index) for index in range(len(dimensions))]
        meanings = np.array([dimension.meaning for dimension in dimensions])
        self._is_velocity, self._is_delta = meanings == "velocity", meanings == "delta"
        self._is_absolute = ~(self._is_velocity | self._is_delta)
        self._is_measured = np.array([dimension.measured for dimension in dimensions])
        # Deltas and velocities that nothing measures or bounds: where they lead is nobody's business.
        self._is_lost = np.array([d.unbounded is not None and d.state is None for d in dimensions])
        self._edges = edges([self._bounds[index] for index in self._measures])
        self.limits = limits_of(profile, self._is_velocity, self.longest)
        self._tracking = np.array([math.inf if d.tracking is None else d.tracking.limit for d in dimensions])
        measured = [dimensions[index] for index in self._measures]
        self._angles, self._measured_angles = Angles(dimensions), Angles(measured)
        self._plausible: Plausibility | None = None
        if follows:
            self._plausible = Plausibility(measured, self.limits.of(self._measures), self._measured_angles.periods)
        self._position = np.array([dimension.rest or 0.0 for dimension in dimensions])
        self._velocity = np.zeros(len(dimensions))
        self._aim = self._position  # the last target, which matters for absolutes
        self._sent, self._moved = 0.0, np.zeros(len(dimensions))  # when, and by how much: the last command
        self._before = self._position, self._velocity, self._aim, self._sent  # what ``take_back`` returns to
        self.started, self.steps = False, 0
        self.reason: str | None = None  # why it is stopped
        self.events: deque[Event] = deque(maxlen=KEPT)  # the last ones
        self.counts: Counter[tuple[Kind, Act]] = Counter()  # of all
        self._fresh: list[Event] = []  # those that no verdict has told yet

    @property
    def stopped(self) -> bool:
        return self.reason is not None

    @property
    def at_rest(self) -> bool:
        """Whether the last command moves nothing."""
        return not self._velocity.any()

    def start(self, measured: NDArray[np.floating]) -> None:
        """Begins at rest where the robot is. Raises UserError while stopped, and for a state that does not do."""
        if self.reason is not None:
            raise UserError(f"expected a guard that is not stopped, found it stopped ({self.reason}); re-arm it first")
        try:
            sensed = self._sense(measured, 0.0)
        except ValueError as error:
            raise UserError(f"expected the robot's state to start from, found {error}; check its sensors") from None
        position = self._position.copy()  # a gripper that nothing measures keeps what it was told
        position[self._measures] = sensed
        position = self._angles.wrapped(position)
        for index, dimension in enumerate(self.profile.dimensions):
            for bound in self._bounds[index]:
                if (beyond := bound.crossed(float(position[index]), bound.slack)) is not None:
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
            self._plausible.doubts(position[self._measures], self._sent, self._moved[self._measures], 0.0)
        self._moved = np.zeros(len(position))
        self._log("start", "start", "at rest where the robot was measured")

    def step(self, command: Any, measured: Any, dt: float, age: float = 0.0) -> Verdict:
        """What to send for the policy's ``command`` (dim,). ``age``: the seconds since ``measured`` was."""
        return self._guarded(command, True, measured, dt, age)

    def hold(self, measured: Any, dt: float, age: float = 0.0) -> Verdict:
        """The same where there is no command: on towards rest, or staying there."""
        return self._guarded(None, False, measured, dt, age)

    def foreseen(self, measured: NDArray[np.floating]) -> NDArray[np.float64]:
        """The state (S,) once the robot has done as it was told: for a chunk's later steps, which nothing measures."""
        state = np.array(measured, np.float64)
        state[self._entries] = self._angles.wrapped(self._position)[self._measures] / self._factors
        return state

    def take_back(self) -> None:
        """The last verdict has not been sent: the next one goes on from the one before."""
        self._position, self._velocity, self._aim, self._sent = self._before
        self._moved = np.zeros(len(self._position))

    def stop(self, reason: str) -> None:
        """Latches. The next ``step`` or ``hold`` begins to brake."""
        self._stop("stop", reason)

    def rearm(self, reason: str, measured: NDArray[np.floating] | None = None) -> None:
        """Lets commands through again, from the one held last, or with ``measured`` from rest where the robot is.

        Raises UserError, and stays stopped, for a state that does not do. Without one, tracking limits tell whether
        the robot has been moved meanwhile, by stopping again.
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

    def _guarded(self, command: Any, commanded: bool, measured: Any, dt: Any, age: Any) -> Verdict:
        self.steps += 1
        seconds = self.period
        try:
            seconds = self._clock(dt)
            if self.reason is None:
                self._observe(measured, age, seconds)
            if self.reason is None and commanded:
                return self._step(command, seconds)
            return self._brake(seconds)
        except Exception as error:  # our own mistake: the robot must not pay for it
            self._stop("fault", f"{type(error).__name__}: {error}")
        try:
            return self._brake(seconds)
        except Exception as error:
            self._log("fault", "stop", f"no hold either: {type(error).__name__}: {error}")
            return Verdict(None, True, True, self._tell())

    def _clock(self, dt: Any) -> float:
        """The seconds to brake for. A clock that stands, goes back or jumps stops."""
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
        sensed = angles.unwrapped(sensed, expected)
        off = np.abs(shortest(sensed - expected, angles.periods))
        for index in np.flatnonzero(off > self._tracking[self._measures]).tolist():
            dimension = self.profile.dimensions[self._measures[index]]
            assert dimension.tracking is not None
            self._break("tracking", dimension.tracking.on, dimension, float(off[index]), dimension.tracking.limit)
        if self._plausible is not None:
            self._doubt(self._plausible, sensed, self._sent + seconds - float(age), seconds)
        if ((sensed < self._edges[0]) | (sensed > self._edges[1])).any():
            self._find_outside(sensed)
        position = self._position.copy()
        position[self._measures] = sensed
        self._position = np.where(self._is_measured, position, self._position)

    def _doubt(self, plausibility: Plausibility, sensed: NDArray[np.float64], stamp: float, seconds: float) -> None:
        """A state that cannot be true stops, unless the profile says that it holds."""
        moved, self._moved = self._moved, np.zeros(len(self._moved))
        for doubt in plausibility.doubts(sensed, stamp, moved[self._measures], seconds):
            dimension = self.profile.dimensions[self._measures[doubt.place]]
            limit: Tracking | None = getattr(dimension, doubt.what)
            self._break(doubt.what, "stop" if limit is None else limit.on, dimension, doubt.found, doubt.limit)

    def _find_outside(self, sensed: NDArray[np.float64]) -> None:
        """A robot beyond bounds that hold or stop, whoever has brought it there."""
        for index, found in zip(self._measures, sensed.tolist(), strict=True):
            for bound in self._bounds[index]:
                if bound.on != "clamp" and (crossed := bound.crossed(found, bound.slack)) is not None:
                    self._break(bound.kind, bound.on, self.profile.dimensions[index], found, crossed)

    def _sense(self, measured: Any, age: Any) -> NDArray[np.float64]:
        """The measured positions, in the dimensions' units. Raises ValueError for a state that is none."""
        seconds = float(age) if isinstance(age, (int, float, np.floating)) else math.nan
        if not 0 <= seconds <= self.longest:
            raise ValueError(f"a state {age!r} s old, expected up to {self.longest:.6g}")
        if measured is None:
            raise ValueError("no state")
        if not isinstance(measured, np.ndarray) or measured.dtype.kind != "f" or measured.shape != (self._states,):
            raise ValueError(f"{_form(measured)} as state, expected floats ({self._states},)")
        with np.errstate(over="ignore", invalid="ignore"):
            sensed = measured[self._entries].astype(np.float64) * self._factors
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
            values = np.where(self._is_absolute, self._angles.unwrapped(values, self._position), values)
        if any(event.act == "hold" for event in self._fresh):
            return self._brake(dt)
        away = values - self._position
        wanted = np.where(self._is_velocity, values, np.where(self._is_delta, values, away) / dt)
        lowest, highest = braking.reachable(self._position, self._velocity, self.limits, dt)
        safe = np.minimum(np.maximum(wanted, lowest), highest)  # three times as fast as clip
        kept = safe == wanted
        if kept.all():
            return self._send(safe, dt, values, kept, command)
        acts = [self._explain(index, wanted, safe, dt) for index in np.flatnonzero(~kept).tolist()]
        if "stop" in acts or "hold" in acts:
            return self._brake(dt)
        # A target out of reach is approached so that the robot can come to rest there, instead of running beyond; one
        # that moves on meanwhile is followed.
        on = np.maximum(np.copysign(1.0, away) * (values - self._aim) / dt, 0.0)
        calm = np.copysign(np.minimum(np.abs(wanted), braking.fastest(np.abs(away), self.limits, dt) + on), wanted)
        safe = np.where(self._is_absolute & ~kept, np.clip(calm, lowest, highest), safe)
        return self._send(safe, dt, values, kept, command)

    def _explain(self, index: int, wanted: Any, safe: Any, dt: float) -> Act:
        """Logs which limits a dimension's command breaks; returns the severest thing to do about them."""
        dimension = self.profile.dimensions[index]
        position, velocity = float(self._position[index]), float(self._velocity[index])
        speed = float(wanted[index])
        target, rounding = position + speed * dt, ROUNDING * max(1.0, abs(position))
        broken: list[tuple[Kind, profiles.On, float, float]] = []
        for bound in self._bounds[index]:
            if (crossed := bound.crossed(target, rounding)) is not None:
                broken.append((bound.kind, bound.on, target, crossed))
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
        """The hold: every dimension towards rest as its acceleration limit allows."""
        if not self.started:
            return Verdict(None, True, self.stopped, self._tell())
        return self._send(braking.braked(self._velocity, self.limits, dt), dt)

    def _send(
        self,
        velocity: NDArray[np.float64],
        dt: float,
        values: NDArray[np.float64] | None = None,
        kept: NDArray[np.bool_] | None = None,
        command: NDArray[np.floating] | None = None,
    ) -> Verdict:
        """The command of these velocities, the policy's itself where it is ``kept``; remembers where it leads.

        ``values`` are the policy's ``command`` with angles as near to the position as whole turns bring them.
        """
        moved = self._position + velocity * dt
        if values is not None and kept is not None:
            moved = np.where(self._is_absolute & kept, values, moved)
        inside = np.minimum(np.maximum(moved, self.limits.low), self.limits.high)
        target = np.where(self._is_measured, moved, inside)
        target[self._is_lost] = 0.0
        absolute = self._angles.wrapped(target)
        told = np.where(self._is_velocity, velocity, np.where(self._is_delta, velocity * dt, absolute))
        if values is not None and kept is not None:
            told = np.where(~self._is_absolute & kept, values, told)
        if command is not None and kept is not None and self._angles.periods is not None:
            exact = self._angles.wrapped(command.astype(np.float64))  # without the rounding of a turn there and back
            told = np.where(self._angles.turns & self._is_absolute & kept, exact, told)
        self._before = self._position, self._velocity, self._aim, self._sent
        self._moved, self._sent = velocity * dt, self._sent + dt
        self._position, self._velocity = target, velocity
        self._aim = target if values is None else values
        return Verdict(told, values is None, self.stopped, self._tell())

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

    def _tell(self) -> tuple[Event, ...]:
        told, self._fresh = tuple(self._fresh), []
        return told


def _form(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__
