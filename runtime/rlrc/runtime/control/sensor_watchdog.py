"""Checks before every command that the state and all pictures are present, fresh and changing."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.robots.robot import Sensed


class SensorWatchdog:
    """``pictures``: names of the required pictures. ``longest``: seconds that the state or a picture may be old.

    ``live``: two pictures of one camera are never equal bit by bit.
    """

    def __init__(self, pictures: frozenset[str], longest: float, live: bool) -> None:
        self._pictures, self._longest, self._live = pictures, longest, live
        self._last: dict[str, tuple[float, NDArray[Any]]] = {}
        self._compared = False  # whether the cameras were compared with each other

    def fault(self, sensed: Sensed | None, now: float) -> str | None:
        """What is wrong, in words; None if nothing is."""
        if sensed is None:
            return "the robot has sent no state yet"
        if missing := self._pictures - sensed.pictures.keys():
            return f"no picture {', '.join(sorted(missing))}"
        for name, stamp in (("the state", sensed.stamp), *sensed.pictures.items()):
            if not now - stamp <= self._longest:  # true for nan
                return f"{name} is {(now - stamp) * 1e3:.0f} ms old"
            if stamp > now + self._longest:
                return f"{name} comes from {(stamp - now) * 1e3:.0f} ms in the future"
        if not self._live:
            return None
        return self._find_shared(sensed.observation, sensed.pictures) or self._find_repeated(
            sensed.observation, sensed.pictures
        )

    def _find_shared(self, observation: Mapping[str, Any], stamps: Mapping[str, float]) -> str | None:
        """Two cameras of the policy that are wired to one camera of the robot; checked once."""
        if self._compared:
            return None
        for one, other in combinations(sorted(stamps), 2):
            if np.array_equal(observation[one], observation[other]):
                return f"{one} and {other} are the same picture: two cameras of the policy are wired to one"
        self._compared = True
        return None

    def _find_repeated(self, observation: Mapping[str, Any], stamps: Mapping[str, float]) -> str | None:
        for name, stamp in stamps.items():
            before = self._last.get(name)
            if before is not None and stamp == before[0]:
                continue
            picture = observation[name]
            if before is not None and np.array_equal(picture, before[1]):
                return f"{name} has not changed since {(stamp - before[0]) * 1e3:.0f} ms before"
            self._last[name] = (stamp, np.array(picture))  # a copy: some drivers reuse one array
        return None
