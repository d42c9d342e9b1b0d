"""A profile's limits as the guard computes with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlrc.errors import UserError
from rlrc.runtime.safety import braking
from rlrc.runtime.safety.profile import REMEDY, On, RobotProfile


class Bound(NamedTuple):
    """What keeps a dimension's position. ``slack`` is what the robot, not a command, may be measured beyond."""

    kind: Literal["position", "workspace"]
    on: On
    low: float
    high: float
    slack: float

    def crossed(self, position: float, more: float) -> float | None:
        """The end that a position is beyond, by more than ``more``."""
        if position > self.high + more:
            return self.high
        return self.low if position < self.low - more else None


def bounds(profile: RobotProfile, index: int) -> list[Bound]:
    """Those of a dimension: its position limits and the workspace's, none or both."""
    own, axis, box, found = profile.dimensions[index].position, profile.box(index), profile.workspace, list[Bound]()
    if profile.dimensions[index].turns:
        return []  # every angle is within its limits
    if axis is not None and box is not None:
        found.append(Bound("workspace", box.on, *axis, box.slack))
    if own is not None:
        found.append(Bound("position", own.on, own.low, own.high, own.slack))
    return found


def edges(measured: Sequence[Sequence[Bound]]) -> NDArray[np.float64]:
    """(2, D) for the bounds of D dimensions: between which positions none of them holds or stops."""
    strict = [[bound for bound in found if bound.on != "clamp"] for found in measured]
    low = [max((bound.low - bound.slack for bound in found), default=-math.inf) for found in strict]
    high = [min((bound.high + bound.slack for bound in found), default=math.inf) for found in strict]
    return np.array([low, high])


def limits_of(profile: RobotProfile, lasting: NDArray[np.bool_], longest: float) -> braking.BrakingLimits:
    """All limits as vectors. Raises UserError where position limits and workspace have nothing in common."""
    rows = []
    for index, dimension in enumerate(profile.dimensions):
        found = bounds(profile, index)
        low = max((bound.low for bound in found), default=-braking.FAR)
        high = min((bound.high for bound in found), default=braking.FAR)
        if low >= high:
            raise UserError(
                f"expected position and workspace of {dimension.name} to overlap, found {high:.6g} to {low:.6g} "
                f"between them; {REMEDY}"
            )
        speeds = [math.inf if limit is None else limit.limit for limit in (dimension.velocity, dimension.acceleration)]
        rows.append((low, high, *speeds))
    lows, highs, velocities, accelerations = np.array(rows).T
    return braking.BrakingLimits(lows, highs, velocities, accelerations, lasting, longest)
