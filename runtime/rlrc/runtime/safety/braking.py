"""Which velocities may be commanded now so that every limit can be kept for ever (a viability kernel).

One dimension at position p was last commanded the velocity v. A step of dt commands v' and moves it to p + v' dt.
Limits: low <= p <= high, |v'| <= V, |v' - v| <= A dt. To check them one step at a time is not enough: near a limit at
full speed, every v' that A allows ends outside. So the guard keeps the state in

    K = { (p, v): low <= p <= high, |v| <= V, v > 0 => v^2 / 2A <= high - p, v < 0 => v^2 / 2A <= p - low }.

From every state of K there is a next command within all limits that stays in K, whatever dt is (so the dts of a
jittering clock may vary freely): braking, v' = max(v - A dt, 0) for v > 0. It keeps |v'| <= V and |v' - v| <= A dt, and
if v' > 0,  v^2 / 2A - v'^2 / 2A = dt (v + v') / 2 >= v' dt,  so high - (p + v' dt) >= v^2 / 2A - v' dt >= v'^2 / 2A; if
v' = 0 nothing moves. Downwards it is the same. A start at rest within the bounds is in K, so by induction the set of
commands is never empty and no two limits ever conflict.

All commands that stay in K form an interval, for v' >= 0 ends where v'^2 / 2A + v' dt = high - p:

    v' <= 2 d / (dt + sqrt(dt^2 + 2 d / A)),  d = high - p    (A = inf: d / dt)

together with |v'| <= V and v - A dt <= v' <= v + A dt; ``velocity_range`` returns its ends.

A dimension of meaning "velocity" is commanded v' now and moves at v' until the next command, at most ``longest`` later.
Then K has v^2 / 2A + v longest in the place of v^2 / 2A. At the end of a dt <= longest it has moved
by v dt, and braking to v'' gives back dt (v + v'') / 2 + (v - v'') longest >= v dt if v'' = v - A dt > 0, and all of
it, v^2 / 2A + v longest >= v dt, if v'' = 0: K is kept. The interval is that above with ``longest`` for dt.

A position that is measured instead of commanded (docs/robots.md) may leave K. Then only braking is left: both ends of
the interval are the braking velocity.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

FAR = 1e150  # no limit: larger than any real value, and its square is still finite


class BrakingLimits(NamedTuple):
    """All (D,). Where ``lasting``, a velocity lasts until the next command, at most ``longest`` seconds."""

    low: Vector
    high: Vector
    velocity: Vector
    acceleration: Vector
    lasting: NDArray[np.bool_]
    longest: float

    def of(self, dimensions: list[int]) -> BrakingLimits:
        """The limits of some dimensions."""
        low, high, velocity, acceleration = (limit[dimensions] for limit in self[:4])
        return BrakingLimits(low, high, velocity, acceleration, self.lasting[dimensions], self.longest)


def brake(velocity: Vector, limits: BrakingLimits, dt: float) -> Vector:
    """The velocities after braking for dt seconds: towards zero, never beyond it."""
    size = np.maximum(np.abs(velocity) - limits.acceleration * dt, 0.0)
    return np.copysign(size, velocity) + 0.0  # + 0.0: zero is positive


def highest_velocity(distance: Vector, limits: BrakingLimits, dt: float | Vector) -> Vector:
    """The largest velocity for the next dt after which braking still ends within ``distance``."""
    d = np.minimum(np.maximum(distance, 0.0), FAR)
    return 2 * d / (dt + np.sqrt(dt * dt + 2 * d / limits.acceleration))


def velocity_range(position: Vector, velocity: Vector, limits: BrakingLimits, dt: float) -> tuple[Vector, Vector]:
    """The lowest and the highest velocity that keep every limit now and for ever; braking lies between them."""
    braking, change = brake(velocity, limits, dt), limits.acceleration * dt
    lasts = np.where(limits.lasting, limits.longest, dt)
    down = -highest_velocity(position - limits.low, limits, lasts)
    up = highest_velocity(limits.high - position, limits, lasts)
    lowest = np.maximum(np.maximum(velocity - change, -limits.velocity), down)
    highest = np.minimum(np.minimum(velocity + change, limits.velocity), up)
    return np.minimum(lowest, braking), np.maximum(highest, braking)
