"""Chunks of actions on the loop's time: which action is for which step, and how one chunk follows another.

Steps count the actions that were played: while the robot is held, the plan stands still. The first action of a chunk is
for the first command after its observation was made. So a late chunk has missed its first actions, and a very late one
all of them: they are never sent. Strategies:

- "synchronous": a chunk is played to its end before the next is requested; the robot is held meanwhile;
- "replace": the newest chunk is played as soon as it arrives;
- "ensemble": the average of all chunks that have an action for the step, older ones counting more (ACT, arXiv
  2304.13705, section IV: weights exp(-0.01 i), the oldest first);
- "continue": the newest chunk, conditioned to continue the former one (real-time chunking,
  rlrc.runtime.inference.continuation).
"""

from __future__ import annotations

from collections import deque
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from rlrc.errors import UserError
from rlrc.runtime.inference.continuation import Continuation
from rlrc.runtime.safety.angles import nearest

Strategy = Literal["synchronous", "replace", "ensemble", "continue"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
DECAY = 0.01
REMEMBERED = 10  # delays that the next one is estimated from: their largest (arXiv 2506.07339, section 4.1)


class Planned(NamedTuple):
    """What is planned for a step: the action (dim,), the number of its newest chunk, and its place in that chunk."""

    action: NDArray[np.float32]
    chunk: int
    place: int


def check_execute(execute: int | None, horizon: int) -> None:
    """Raises UserError unless a chunk has ``execute`` steps."""
    if execute is not None and not 1 <= execute <= horizon:
        raise UserError(f"expected to execute 1 to {horizon} steps of a chunk, found {execute}; give another --execute")


class Chunks:
    """``execute``: steps of a chunk to play before the next is requested (None: all if synchronous, else none).

    ``periods`` (dim,) of periodic angles, inf for all else (rlrc.runtime.safety.angles).
    """

    def __init__(
        self,
        strategy: Strategy,
        horizon: int,
        execute: int | None = None,
        periods: NDArray[np.float64] | None = None,
    ) -> None:
        check_execute(execute, horizon)
        self.strategy, self.horizon = strategy, horizon
        self._periods = periods
        self._least = execute or (horizon if strategy == "synchronous" else 0)
        self._chunks: deque[tuple[int, int, NDArray[np.float32]]] = deque()  # number, start, actions; oldest first
        self._delays: deque[int] = deque(maxlen=REMEMBERED)
        self._count = 0

    def add(self, actions: NDArray[np.float32], start: int, step: int) -> bool:
        """A chunk for the steps from ``start``, which arrived before ``step``. False: all of it is late."""
        if step:  # the wait before the first step is no delay
            self._delays.append(max(step - start, 0))
        if self.strategy == "synchronous":
            actions = actions[: self._least]
        self._count += 1
        if start + len(actions) <= step:
            return False
        self._chunks.append((self._count, start, actions))
        return True

    def at(self, step: int) -> Planned | None:
        """What to send at a step; None: no chunk has an action for it."""
        while self._chunks and self._end(0) <= step:
            self._chunks.popleft()
        covering = [chunk for chunk in self._chunks if chunk[1] <= step < chunk[1] + len(chunk[2])]
        if not covering:
            return None
        number, start, actions = covering[-1]
        if self.strategy != "ensemble" or len(covering) == 1:
            return Planned(actions[step - start], number, step - start)
        weights = np.exp(-DECAY * np.arange(len(covering)))
        each = np.stack([actions[step - start] for _, start, actions in covering])
        each = nearest(each, each[0], self._periods)
        return Planned((weights @ each / weights.sum()).astype(np.float32), number, step - start)

    def needs_more(self, step: int) -> bool:
        """Whether to request another chunk, whose first action would be for ``step``."""
        if not self._chunks:
            return True
        _, start, actions = self._chunks[-1]
        return step - start >= min(self._least, len(actions))

    def continuation(self, step: int) -> Continuation | None:
        """What a chunk for ``step`` has to continue, if it takes as long as the longest of the last ones."""
        if self.strategy != "continue" or not self._chunks:
            return None
        _, start, actions = self._chunks[-1]
        previous = actions[max(step - start, 0) :]
        return Continuation(previous, min(max(self._delays, default=0), len(previous)))

    def clear(self) -> None:
        self._chunks.clear()

    def _end(self, index: int) -> int:
        _, start, actions = self._chunks[index]
        return start + len(actions)
