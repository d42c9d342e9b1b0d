"""A recorded episode as a robot: which commands does the policy give for the recorded observations? Nothing moves.

Every command brings the next frame, so that the policy's commands can be compared with the recorded ones. A thread
reads ahead; if it falls behind, the last frame grows old, which stops the loop like a slow camera.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import PolicySpec
from rlrc.errors import UserError
from rlrc.robots.robot import RobotError, Sensed

if TYPE_CHECKING:
    from rlrc.runtime.safety.profile import RobotProfile

AHEAD = 16  # frames to read ahead


class ReplayRobot:
    """Raises UserError if the data set does not fit the policy (rlrc.datasets.fit) or lacks the episode.

    ``hz`` is the data set's rate, ``recorded`` (frames, dim) the episode's actions; ``over`` after the command for the
    last frame.
    """

    live_pictures = False  # video may repeat a picture where nothing moves

    def __init__(self, path: Path, episode: int, spec: PolicySpec, cameras: Mapping[str, str]) -> None:
        from rlrc.datasets.fit import match
        from rlrc.datasets.lerobot import Dataset
        from rlrc.datasets.meta import ACTION

        self._data = match(Dataset.open(path), spec, cameras)
        dataset = self._data.dataset
        if not 0 <= episode < len(dataset.episodes):
            raise UserError(
                f"expected an episode from 0 to {len(dataset.episodes) - 1} of {path}, found {episode}; give another "
                "--episode"
            )
        frames = dataset.episodes[episode]
        self.hz = dataset.fps
        self.recorded = dataset.column(ACTION)[frames.start : frames.end].reshape(len(frames), -1)
        self._thread = ThreadPoolExecutor(1, "replay")
        self._unread, self._reading = iter(range(frames.start, frames.end)), deque[Future[Mapping[str, Any]]]()
        for _ in range(AHEAD):
            self._read_another()
        self._observation = self._reading.popleft().result()
        self._shown = 0
        self._moved: list[float] = []  # the times of the commands; each brings the next frame

    @property
    def over(self) -> bool:
        return len(self._moved) >= len(self.recorded)

    def sense(self) -> Sensed | None:
        """Stays at the first frame until the first command."""
        while self._shown < len(self._moved) and self._reading and self._reading[0].done():
            try:
                self._observation = self._reading.popleft().result()
            except UserError as error:  # a damaged file
                raise RobotError(str(error)) from None
            self._shown += 1
            self._read_another()
        stamp = self._moved[max(self._shown - 1, 0)] if self._moved else time.monotonic()
        stamps = {name: stamp for name in self._observation if name.startswith("image.")}
        measured = self._observation.get("state", np.zeros(0, np.float32))
        return Sensed(self._observation, measured, stamp, stamps)

    def command(self, action: NDArray[Any]) -> None:
        self._moved.append(time.monotonic())

    def stop(self) -> None:
        """Nothing moves."""

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._data.dataset.close()

    def _read_another(self) -> None:
        for frame in self._unread:
            self._reading.append(self._thread.submit(self._data.observation, frame))
            return


def drop_tracking(profile: RobotProfile) -> RobotProfile:
    """A robot's limits without tracking limits: a recording does not follow commands."""
    return replace(profile, dimensions=tuple(replace(one, tracking=None) for one in profile.dimensions))
