"""Which action is for a step, and when inference is asked for another chunk.

The plan counts the actions that were sent: it stands still while the robot is held. A chunk's first action is for the
first command after its observation was made.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import PolicySpec
from rlrc.robots.robot import Sensed
from rlrc.runtime.control.chunks import Chunks, Planned
from rlrc.runtime.control.inference_process import Answer, InferenceClient
from rlrc.runtime.inference import preprocess
from rlrc.runtime.inference.continuation import Continuation


class Planner:
    """Joins inference and its chunks. ``inference`` runs in parallel with the loop."""

    def __init__(self, inference: InferenceClient, chunks: Chunks, spec: PolicySpec) -> None:
        self.inference, self.chunks, self._spec = inference, chunks, spec
        self._sent: deque[float] = deque(maxlen=4 * chunks.horizon)  # when the last actions were sent
        self.restart()

    def restart(self, actions: NDArray[np.float32] | None = None) -> None:
        """Drops every chunk and begins anew, with the chunk ``actions`` (horizon, dim) if one is given."""
        self.chunks.clear()
        self._sent.clear()
        self._position = 0  # actions that were planned and sent
        self._requested_stamp = 0.0  # of the state that the last chunk was requested for
        if actions is not None:
            self.chunks.add(actions, 0, 0)

    def ask(self, sensed: Sensed, start: int = 0, continuation: Continuation | None = None) -> None:
        """Requests a chunk whose first action is for ``start``. Raises UserError for an observation that does not fit
        the policy, before inference gets it."""
        preprocess.check(sensed.observation, self._spec)
        self.inference.ask(sensed.observation, start, continuation)

    def add(self, answer: Answer) -> None:
        """A chunk that has arrived."""
        assert answer.actions is not None
        self.chunks.add(answer.actions, answer.start, self._position)

    def next_action(self) -> Planned | None:
        """The action for this step; None if no chunk has one."""
        return self.chunks.at(self._position)

    def record_sent(self, at: float) -> None:
        """The action of ``next_action`` was sent."""
        self._position += 1
        self._sent.append(at)

    def request(self, sensed: Sensed) -> None:
        """Asks for the next chunk if one is needed: once for each state, and not while a request is outstanding."""
        if sensed.stamp == self._requested_stamp or self.inference.busy:
            return
        start = self._position - sum(sent >= sensed.stamp for sent in self._sent)
        if self.chunks.needs_more(start):
            self.ask(sensed, start, self.chunks.continuation(start))
            self._requested_stamp = sensed.stamp

    def waiting(self, now: float) -> float:
        """Seconds since the outstanding request; 0 if there is none."""
        since = self.inference.requested_at
        return 0.0 if since is None else now - since
