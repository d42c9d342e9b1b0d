"""The guard's verdict on a step: what to send, and what it did about the policy's command."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

# What a command broke, what was wrong with a step, and what was done with the guard.
Broken = Literal["workspace", "position", "velocity", "acceleration", "braking", "tracking", "jump", "lead", "still"]
Wrong = Literal["command", "measured", "clock", "fault"]
Kind = Literal[Broken, Wrong, "start", "stop", "rearm"]
Act = Literal["clamp", "hold", "stop", "start", "rearm"]


class Event(NamedTuple):
    """What the guard did at a step, and why.

    ``found`` and ``limit`` are in the dimension's unit for positions, per second for velocities and braking, per second
    squared for accelerations.
    """

    step: int
    kind: Kind
    act: Act
    reason: str = ""
    dimension: str | None = None
    found: float | None = None
    limit: float | None = None

    def __str__(self) -> str:
        numbers = "" if self.found is None else f": {self.found:.6g}, limit {self.limit:.6g}"
        where = "" if self.dimension is None else f" of {self.dimension}"
        return f"step {self.step}: {self.act}: {self.kind}{where}{numbers}{self.reason and f': {self.reason}'}"


class Verdict(NamedTuple):
    """``command`` (dim,) is what to send; None: nothing, since the guard does not know where the robot is.

    ``held``: the command is a hold, not the policy's. ``stopped``: the stop is latched.
    """

    command: NDArray[np.float64] | None
    held: bool
    stopped: bool
    events: tuple[Event, ...]
