"""Differences of angles: 3.13 and -3.14 rad are .01 apart, where a dimension is periodic (docs/robots.md).

``periods`` (D,) are inf for the dimensions that are not; None: none is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def shortest(difference: Vector, periods: Vector | None) -> Vector:
    """Differences (..., D) the short way round: within half a period."""
    if periods is None:
        return difference
    turns = np.rint(difference / periods)  # 0 for inf
    return difference - turns * np.where(np.isinf(periods), 0.0, periods)


def near(values: Vector, reference: Vector, periods: Vector | None) -> Vector:
    """Those of the same angles that are nearest to the reference; bit by bit the same where they are it already."""
    if periods is None:
        return values
    away = values - reference
    return np.where(np.abs(away) <= periods / 2, values, reference + shortest(away, periods))
