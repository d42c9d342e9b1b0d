"""Differences of angles: 3.13 and -3.14 rad are .01 apart if a dimension is periodic (docs/robots.md).

``periods`` (D,) are inf for dimensions that are not periodic; None: no dimension is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rlrc.runtime.safety.profile import Dimension

Vector = NDArray[np.float64]


def shortest(difference: Vector, periods: Vector | None) -> Vector:
    """Differences (..., D) the short way round, within half a period."""
    if periods is None:
        return difference
    turns = np.rint(difference / periods)  # 0 for inf
    within: Vector = difference - turns * np.where(np.isinf(periods), 0.0, periods)
    return within


def nearest(values: Vector, reference: Vector, periods: Vector | None) -> Vector:
    """The same angles, as the numbers nearest to the reference. Values that already are stay the same bit by bit."""
    if periods is None:
        return values
    away = values - reference
    return np.where(np.abs(away) <= periods / 2, values, reference + shortest(away, periods))


class Angles:
    """For the periodic ones of D dimensions: which of the numbers of an angle, whole turns apart, is meant.

    ``turns`` (D,): whether an angle may turn without end; the others stay on the arc between their position limits.
    """

    def __init__(self, dimensions: Sequence[Dimension]) -> None:
        periods: Vector = np.array([dimension.period for dimension in dimensions])
        limits = [dimension.position for dimension in dimensions]
        self.periods = None if np.isinf(periods).all() else periods  # usually
        self.turns = np.array([dimension.turns for dimension in dimensions], bool)
        self._middle: Vector = np.array([0.0 if one is None else (one.low + one.high) / 2 for one in limits])

    def unwrap(self, values: Vector, position: Vector) -> Vector:
        """Angles as the numbers nearest to the position; those with an arc as the arc's numbers."""
        if self.periods is None:
            return values
        return nearest(values, np.where(self.turns, position, self._middle), self.periods)

    def wrap(self, values: Vector) -> Vector:
        """Angles as the robot and the policy number them: from ``low`` to ``high`` of the profile."""
        return nearest(values, self._middle, self.periods)
