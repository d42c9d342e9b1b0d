"""Whether a measured state is plausible, given the limits and the commands that were sent.

For every measured dimension, in its unit, with its velocity limit V:

- A robot does not move faster than V. Between two states it may move V times the time between them, plus ``jump`` for
  noise and jittering stamps. If the state has repeated itself, the time since it last changed counts, up to
  ``REPEATED_S``. If a step took long, that step's time counts: its command moved so far, and the robot may follow at
  once.
- A robot follows its commands, perhaps late and perhaps not all the way. The commands may lead by at most ``lead``
  before the state has moved a twentieth of that in their direction. Commands back and forth cancel out.
- A state that is the same to the last bit under a new stamp, while the commands are faster than a tenth of V, is not a
  new measurement. It may miss at most ``still`` of such motion, back and forth added up.

So a constant state is plausible for a robot at rest, and a blocked robot is stopped once its commands have run ahead by
``lead``. Noise below a twentieth of ``lead`` hides nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlrc.runtime.safety.angles import nearest
from rlrc.runtime.safety.braking import BrakingLimits
from rlrc.runtime.safety.profile import Dimension, Tracking

Vector = NDArray[np.float64]
What = Literal["jump", "lead", "still"]

LEAD_S = 0.5  # default lead: what the robot could move in this time
JITTER_S = 0.05  # default jump: likewise
REPEATED_S = 0.2  # longest time (or two periods, if longer) that a state may repeat itself while the robot moves
ROUNDING_S = 1e-6  # stamps closer than this are equal
DELAYED = 4  # steps by which a command may reach the robot later
FOLLOWED = 1 / 20  # of the lead: the robot has followed
SLOW = 0.1  # of the velocity limit: slower commands may be lost in a servo's dead band


class Implausibility(NamedTuple):
    """What is implausible about a dimension (``place`` among the measured ones), how large it is, and the limit."""

    place: int
    what: What
    found: float
    limit: float


class Plausibility:
    """Checks M measured dimensions against the limits in their profile, or else those that their other limits imply.

    Without a velocity limit neither jump nor lead is limited. ``periods`` (M,): see rlrc.runtime.safety.angles.
    """

    def __init__(self, dimensions: Sequence[Dimension], limits: BrakingLimits, periods: Vector | None) -> None:
        velocity, room = limits.velocity, (limits.high - limits.low) / 2
        implied = np.maximum(np.minimum(velocity * LEAD_S, room), velocity * limits.longest)
        # A gripper that closes on an object does not reach its target.
        grippers = np.array([dimension.meaning == "gripper" for dimension in dimensions], bool)
        self._jump = _limits([dimension.jump for dimension in dimensions], velocity * JITTER_S)
        self._lead = _limits([dimension.lead for dimension in dimensions], np.where(grippers, np.inf, implied))
        self._still = _limits([dimension.still for dimension in dimensions], self._lead)
        self._repeated = max(limits.longest, REPEATED_S)
        self._velocity = np.where(np.isinf(velocity), 0.0, velocity)  # jump and lead are infinite there
        self._slow, self._periods = SLOW * self._velocity, periods
        self._last: Vector | None = None
        self._steps: deque[float] = deque(maxlen=DELAYED)  # duration of the last ones

    def forget(self) -> None:
        """Accepts the next state unchecked: the robot may have been moved by hand."""
        self._last = None

    def check(self, sensed: Vector, stamp: float, moved: Vector, seconds: float) -> list[Implausibility]:
        """-> what is implausible; empty if nothing is.

        ``sensed`` (M,) was measured at ``stamp``; since the call ``seconds`` ago, the commands moved ``moved``.
        """
        if self._last is None:
            self._last, self._stamp = sensed, stamp
            self._changed = np.full(len(sensed), stamp)
            self._ahead, self._origin, self._missed = np.zeros(len(sensed)), sensed, np.zeros(len(sensed))
            return []
        sensed = nearest(sensed, self._last, self._periods)
        self._steps.append(seconds)
        return self._find_jumps(sensed, stamp) + self._find_lags(sensed, stamp, moved, seconds)

    def _find_jumps(self, sensed: Vector, stamp: float) -> list[Implausibility]:
        assert self._last is not None
        passed = np.minimum(stamp - self._changed, self._repeated)
        passed = np.maximum(passed, max(stamp - self._stamp, *self._steps, 0.0))
        allowed = self._velocity * passed + self._jump
        gone = np.abs(sensed - self._last)
        return _exceeding("jump", gone, allowed)

    def _find_lags(self, sensed: Vector, stamp: float, moved: Vector, seconds: float) -> list[Implausibility]:
        fresh, same = stamp - self._stamp > ROUNDING_S, sensed == self._last
        self._last, self._stamp = sensed, stamp
        self._changed = np.where(same, self._changed, stamp)
        ahead = self._ahead + moved
        turned = np.sign(ahead) != np.sign(self._ahead)  # the commands now lead the other way
        furthest = np.where(ahead > 0, np.minimum(self._origin, sensed), np.maximum(self._origin, sensed))
        origin = np.where(turned | (ahead == 0), sensed, furthest)
        followed = (sensed - origin) * np.sign(ahead) >= FOLLOWED * self._lead
        self._ahead = np.where(followed, 0.0, ahead)
        self._origin = np.where(followed, sensed, origin)
        way = np.maximum(np.abs(moved) - self._slow * seconds, 0.0)
        self._missed = np.where(same, self._missed + (way if fresh else 0.0), 0.0)
        return _exceeding("lead", np.abs(self._ahead), self._lead) or _exceeding("still", self._missed, self._still)


def _limits(given: Sequence[Tracking | None], implied: Vector) -> Vector:
    """(M,): the profile's limits, and the implied ones where it has none."""
    return np.array([one if limit is None else limit.limit for limit, one in zip(given, implied, strict=True)], float)


def _exceeding(what: What, found: Vector, limits: Vector) -> list[Implausibility]:
    beyond = found > limits
    if not beyond.any():
        return []
    return [
        Implausibility(int(index), what, float(found[index]), float(limits[index])) for index in np.flatnonzero(beyond)
    ]
