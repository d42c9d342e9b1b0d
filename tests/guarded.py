"""A guard of one dimension whose numbers are easy to work out, for the tests of guard and profile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from rlrc.artifact import ActionSpec, NormStats
from rlrc.runtime.safety.guard import Guard
from rlrc.runtime.safety.profile import Dimension, Limit, Position, RobotProfile, Workspace

SOURCES = {"s": "made up"}
ABSOLUTE = Dimension("x", "absolute", "m", Position(-100.0, 100.0, "s"), Limit(1.0, "s"), Limit(2.0, "s"), state="at_x")
DELTA = replace(ABSOLUTE, meaning="delta")
VELOCITY = replace(ABSOLUTE, meaning="velocity", unit="m/s")
GRIPPER = Dimension("grip", "gripper", "1", Position(0.0, 1.0, "s"), rest=1.0)


def action_of(profile: RobotProfile) -> ActionSpec:
    dimensions = profile.dimensions
    names, meanings, units = zip(*((d.name, d.meaning, d.unit) for d in dimensions), strict=True)
    zeros, ones = (0.0,) * len(names), (1.0,) * len(names)
    return ActionSpec(1, names, meanings, units, NormStats(zeros, ones), 0)


def guard_of(*dimensions: Dimension, workspace: Workspace | None = None, hz: float = 10.0) -> Guard:
    """Ten steps a second; the state has what measures the dimensions, in their order and units."""
    profile = RobotProfile("test", SOURCES, dimensions, workspace)
    sensed = [d for d in dimensions if d.state is not None]
    return Guard(profile, hz, action_of(profile), [str(d.state) for d in sensed], [d.length for d in sensed])


def at(*values: float, dtype: Any = np.float64) -> np.ndarray:
    return np.array(values, dtype)
