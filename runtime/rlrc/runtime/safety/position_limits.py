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


class PositionLimit(NamedTuple):
    """One limit of a dimension's position. The robot may be measured ``slack`` beyond it, a command may not be."""

    kind: Literal["position", "workspace"]
    on: On
    low: float
    high: float
    slack: float

    def exceeded(self, position: float, more: float) -> float | None:
        """The end, ``low`` or ``high``, that a position exceeds by more than ``more``; None if it exceeds neither."""
        if position > self.high + more:
            return self.high
        return self.low if position < self.low - more else None


def find_position_limits(profile: RobotProfile, index: int) -> list[PositionLimit]:
    """The position limits of a dimension: its own, the workspace's, both or none."""
    dimension, axis, box, found = (
        profile.dimensions[index],
        profile.box(index),
        profile.workspace,
        list[PositionLimit](),
    )
    if dimension.turns:
        return []  # every angle is within its limits
    if axis is not None and box is not None:
        found.append(PositionLimit("workspace", box.on, *axis, box.slack))
    if (own := dimension.position) is not None:
        found.append(PositionLimit("position", own.on, own.low, own.high, own.slack))
    return found


def strict_range(measured: Sequence[Sequence[PositionLimit]]) -> NDArray[np.float64]:
    """(2, D) for the limits of D dimensions: the positions between which none of them holds or stops the robot."""
    strict = [[limit for limit in found if limit.on != "clamp"] for found in measured]
    low = [max((limit.low - limit.slack for limit in found), default=-math.inf) for found in strict]
    high = [min((limit.high + limit.slack for limit in found), default=math.inf) for found in strict]
    return np.array([low, high])


def braking_limits(profile: RobotProfile, lasting: NDArray[np.bool_], longest: float) -> braking.BrakingLimits:
    """All limits as vectors. Raises UserError if position limits and workspace do not overlap."""
    rows = []
    for index, dimension in enumerate(profile.dimensions):
        found = find_position_limits(profile, index)
        low = max((limit.low for limit in found), default=-braking.FAR)
        high = min((limit.high for limit in found), default=braking.FAR)
        if low >= high:
            raise UserError(
                f"expected position and workspace of {dimension.name} to overlap, found {high:.6g} to {low:.6g} "
                f"between them; {REMEDY}"
            )
        speeds = [math.inf if limit is None else limit.limit for limit in (dimension.velocity, dimension.acceleration)]
        rows.append((low, high, *speeds))
    lows, highs, velocities, accelerations = np.array(rows).T
    return braking.BrakingLimits(lows, highs, velocities, accelerations, lasting, longest)
