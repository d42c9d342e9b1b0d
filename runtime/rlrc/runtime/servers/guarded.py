"""The guard applied to whole chunks before they leave the server, where the client runs the control loop.

The server sees the robot once per chunk. The guard therefore restarts with every chunk, at rest at the observation's
state, and assumes that the robot follows every command. It cannot limit what it does not see: a robot that deviates
within the chunk, and the robot's speed at the time of the request. `rlrc run` sees both.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.errors import UserError
from rlrc.runtime.safety.guard import Guard


class GuardedChunks:
    """The guard of one robot. Once it has stopped, every chunk is refused until ``rearm``."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self._latest: tuple[NDArray[np.float32], Any] | None = None  # chunk and state, refused ones included

    def apply(self, actions: NDArray[np.float32], state: Any) -> NDArray[np.float32]:
        """Limit a chunk (horizon, dim) that was computed from the state (S,).

        Raises UserError if the guard stops or has stopped: no action of the chunk may be executed then.
        """
        guard, self._latest = self.guard, (actions, state)
        if guard.stopped:
            raise self._refusal()
        measured = np.zeros(0) if state is None else np.asarray(state, np.float64)
        guard.start(measured)
        kept = np.empty_like(actions)
        for row, action in enumerate(actions):
            verdict = guard.step(action, measured, guard.period)
            if verdict.stopped or verdict.command is None:
                raise self._refusal()
            kept[row] = verdict.command
            measured = guard.predict_state(measured)
        return kept

    def rearm(self, reason: str) -> None:
        """Raises UserError, and stays stopped, while the newest chunk and state would stop the guard again.

        While it is stopped, requests are refused, but their chunks and states are checked here.
        """
        if self._latest is not None:
            trial = GuardedChunks(copy.deepcopy(self.guard))
            trial.guard.rearm("a trial")
            try:
                trial.apply(*self._latest)
            except UserError as error:
                raise UserError(
                    f"expected the newest chunk and state to pass the guard, found: {trial.guard.reason or error}; "
                    "send an observation that passes (it is refused, but checked), then re-arm"
                ) from None
        self.guard.rearm(reason)

    def _refusal(self) -> UserError:
        return UserError(
            f"expected an active guard, found it stopped ({self.guard.reason}); check the robot, then re-arm "
            "(docs/serving.md)"
        )
