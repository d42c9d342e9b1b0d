"""Whether a measured state can be true, given the limits and the commands that were sent.

Of every dimension that is measured, in its unit, with its velocity limit V:

- A robot does not move faster than V. Between two states it may have moved by V times the time between them, and by
  ``jump`` more: for noise, and for stamps that jitter. Where a state has repeated itself, the time since it last
  changed counts, up to ``REPEATED_S``; and where a step took long, that step's time, for its command was so far and the
  robot may follow it at once.
- A robot follows its commands, late perhaps, and perhaps by less. The commands may lead by at most ``lead`` before the
  state has gone a twentieth of that in their direction. Commands back and forth cancel out.
- A state that is the same to the last bit under a new stamp, while the commands are faster than a tenth of V, is no new
  one: of such a way it may miss ``still`` at most, back and forth counted twice.

So a state that stays the same is true for a robot that rests, and a robot that is blocked is stopped once its commands
have run ahead by ``lead``. Noise below a twentieth of ``lead`` hides nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlrc.runtime.safety.angles import near
from rlrc.runtime.safety.braking import BrakingLimits
from rlrc.runtime.safety.profile import Dimension, Tracking

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
    """Of M measured dimensions: with what their profile says, and else what their limits imply.

    Without a velocity limit neither jump nor lead is limited. ``periods`` (M,): those of rlrc.runtime.safety.angles.
    """

    def __init__(self, dimensions: Sequence[Dimension], limits: BrakingLimits, periods: Vector | None) -> None:
        velocity, room = limits.velocity, (limits.high - limits.low) / 2
        implied = np.maximum(np.minimum(velocity * LEAD_S, room), velocity * limits.longest)
        # Grippers close on things, and do not get where they were sent.
        grippers = np.array([dimension.meaning == "gripper" for dimension in dimensions], bool)
        self._jump = _limits([dimension.jump for dimension in dimensions], velocity * JITTER_S)
        self._lead = _limits([dimension.lead for dimension in dimensions], np.where(grippers, np.inf, implied))
        self._still = _limits([dimension.still for dimension in dimensions], self._lead)
        self._repeated = max(limits.longest, REPEATED_S)
        self._velocity = np.where(np.isinf(velocity), 0.0, velocity)  # jump and lead are infinite there
        self._slow, self._periods = SLOW * self._velocity, periods
        self._last: Vector | None = None
        self._steps: deque[float] = deque(maxlen=DELAYED)  # how long the last ones took

    def forget(self) -> None:
        """The next state is taken as it is: the robot may have been moved meanwhile."""
        self._last = None

    def doubts(self, sensed: Vector, stamp: float, moved: Vector, seconds: float) -> list[Doubt]:
        """``sensed`` was measured at ``stamp``; since the last call the commands went ``moved`` (M,) further.

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
        way = np.maximum(np.abs(moved) - self._slow * seconds, 0.0)
        self._missed = np.where(same, self._missed + (way if fresh else 0.0), 0.0)
        return _doubts("lead", np.abs(self._ahead), self._lead) or _doubts("still", self._missed, self._still)


def _limits(given: Sequence[Tracking | None], implied: Vector) -> Vector:
    """(M,): those of the profile, and the implied ones where it says nothing."""
    return np.array([one if limit is None else limit.limit for limit, one in zip(given, implied, strict=True)], float)


def _doubts(what: What, found: Vector, limits: Vector) -> list[Doubt]:
    beyond = found > limits
    if not beyond.any():
        return []
    return [Doubt(int(index), what, float(found[index]), float(limits[index])) for index in np.flatnonzero(beyond)]
