"""One step of the control loop while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from rlrc.robots.robot import Sensed
from rlrc.runtime.control.chunks import Planned
from rlrc.runtime.safety.verdict import Verdict


@dataclass(slots=True)
class Step:
    """Each part of the step adds what the next parts and the log need. Times are seconds of the loop's clock.

    ``skipped``: steps before this one that the loop left out. ``fault``: what is wrong with the robot or its sensors.
    ``spent_ms``: milliseconds by part (rlrc.runtime.control.telemetry.PARTS).
    """

    number: int
    due: float
    skipped: int
    begun: float
    sensed: Sensed | None = None
    fault: str | None = None
    inference_ms: float = np.nan  # of the chunk that arrived at this step
    planned: Planned | None = None
    age_ms: float = np.nan
    verdict: Verdict = field(init=False)
    sent: float = np.nan
    stopped: bool = False  # once the command was sent
    spent_ms: dict[str, float] = field(default_factory=dict)


Show = Callable[[Step], None]
