"""Whether a measured state can be true, given the limits and what the robot was told.

Of every dimension that is measured, in its unit, with its velocity limit V:

- A robot does not move faster than V. Between two states it may have moved by V times the time between them, and by
  ``jump`` more: for noise, and for stamps that jitter. Where a state has repeated itself, the time since it last
  changed counts, up to ``repeated``; and where a step took long, that step's time, for the robot was told to go that
  far and may do so at once.
- A robot that is told to move does so, late perhaps, and perhaps by less. The commands may lead by at most ``lead``
  before the state has gone a twentieth of that in their direction. What is told back and forth cancels out.
- A state that is the same to the last bit under a new stamp, while the robot is told to move at more than a tenth of V,
  is no new one: of such a way it may miss ``still`` at most, back and forth counted twice.

So a state that stays the same is true for a robot that rests, and a robot that is blocked is stopped once its commands
have run ahead by ``lead``. Noise below a twentieth of ``lead`` hides nothing.
"""

from __future__ import annotations

from collections import deque
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlrc.runtime.circle import near

Vector = NDArray[np.float64]
What = Literal["jump", "lead", "still"]

LEAD_S = 0.5  # the lead is what the robot could move in this time, if the profile says nothing else
JITTER_S = 0.05  # the jump likewise
REPEATED_S = 0.2  # for so long, or two periods, a state may repeat itself before the robot is found further on
ROUNDING_S = 1e-6  # stamps as near as that are one
DELAYED = 4  # steps by which a command may reach the robot later
FOLLOWED = 1 / 20  # of the lead: the robot has followed
SLOW = 0.1  # of the velocity limit: slower commands may be lost in a servo's dead band


class Doubt(NamedTuple):
    """What is wrong with a dimension (``place`` among the measured ones), by how much, and what is allowed."""

    place: int
    what: What
    found: float
    limit: float


class Plausibility:
    """All (M,), inf for what is not limited; without a velocity limit neither jump nor lead is. ``periods``: those of
    rlrc.runtime.circle."""

    def __init__(
        self, velocity: Vector, jump: Vector, lead: Vector, still: Vector, periods: Vector | None, repeated: float
    ) -> None:
        self._repeated = max(repeated, REPEATED_S)
        self._velocity, self._periods = _finite(velocity), periods
        self._jump, self._lead, self._still = jump, lead, still
        self._slow = SLOW * self._velocity
        self._last: Vector | None = None
        self._steps: deque[float] = deque(maxlen=DELAYED)  # how long the last ones took

    def forget(self) -> None:
        """The next state is taken as it is: the robot may have been moved meanwhile."""
        self._last = None

    def doubts(self, sensed: Vector, stamp: float, moved: Vector, seconds: float) -> list[Doubt]:
        """``sensed`` was measured at ``stamp``; since the last call the robot was told to move by ``moved``.

        ``seconds`` is the time that this took. Empty: it can be true.
        """
        if self._last is None:
            self._last, self._stamp = sensed, stamp
            self._changed = np.full(len(sensed), stamp)
            self._ahead, self._origin, self._missed = np.zeros(len(sensed)), sensed, np.zeros(len(sensed))
            return []
        sensed = near(sensed, self._last, self._periods)
        self._steps.append(seconds)
        return self._jumped(sensed, stamp) + self._left_behind(sensed, stamp, moved, seconds)

    def _jumped(self, sensed: Vector, stamp: float) -> list[Doubt]:
        assert self._last is not None
        passed = np.minimum(stamp - self._changed, self._repeated)
        passed = np.maximum(passed, max(stamp - self._stamp, *self._steps, 0.0))
        allowed = self._velocity * passed + self._jump
        gone = np.abs(sensed - self._last)
        return _doubts("jump", gone, allowed)

    def _left_behind(self, sensed: Vector, stamp: float, moved: Vector, seconds: float) -> list[Doubt]:
        fresh, same = stamp - self._stamp > ROUNDING_S, sensed == self._last
        self._last, self._stamp = sensed, stamp
        self._changed = np.where(same, self._changed, stamp)
        ahead = self._ahead + moved
        turned = np.sign(ahead) != np.sign(self._ahead)  # from here on they lead the other way
        furthest = np.where(ahead > 0, np.minimum(self._origin, sensed), np.maximum(self._origin, sensed))
        origin = np.where(turned | (ahead == 0), sensed, furthest)
        followed = (sensed - origin) * np.sign(ahead) >= FOLLOWED * self._lead
        self._ahead = np.where(followed, 0.0, ahead)
        self._origin = np.where(followed, sensed, origin)
        told = np.maximum(np.abs(moved) - self._slow * seconds, 0.0)
        self._missed = np.where(same, self._missed + (told if fresh else 0.0), 0.0)
        return _doubts("lead", np.abs(self._ahead), self._lead) or _doubts("still", self._missed, self._still)


def _finite(velocity: Vector) -> Vector:
    """Zero where there is no limit: jump and lead are infinite there."""
    return np.where(np.isinf(velocity), 0.0, velocity)


def _doubts(what: What, found: Vector, limits: Vector) -> list[Doubt]:
    beyond = found > limits
    if not beyond.any():
        return []
    return [Doubt(int(index), what, float(found[index]), float(limits[index])) for index in np.flatnonzero(beyond)]
