"""Chunks through the guard, where the control loop is the client's: every action before it leaves the server.

The server sees the robot once a chunk. So the guard starts anew with every chunk, at rest where the observation's state
says the robot is, and goes on as if the robot did what it is told. What it cannot see here, it cannot limit: a robot
that did something else within the chunk, and how fast it moved when the chunk was asked for. `rlrc run` sees both.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.errors import UserError
from rlrc.runtime.safety.guard import Guard


class GuardedChunks:
    """One guard, for there is one robot. Once it has stopped, no chunk comes through until ``rearm``."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self._latest: tuple[NDArray[np.float32], Any] | None = None  # chunk and state, those that were refused too

    def through(self, actions: NDArray[np.float32], state: Any) -> NDArray[np.float32]:
        """A chunk (horizon, dim) and the state (S,) that it was computed from -> what keeps every limit.

        Raises UserError if the guard stops or has stopped: then nothing of the chunk is to be executed.
        """
        guard, self._latest = self.guard, (actions, state)
        if guard.stopped:
            raise self._stopped()
        measured = np.zeros(0) if state is None else np.asarray(state, np.float64)
        guard.start(measured)
        kept = np.empty_like(actions)
        for row, action in enumerate(actions):
            verdict = guard.step(action, measured, guard.period)
            if verdict.stopped or verdict.command is None:
                raise self._stopped()
            kept[row] = verdict.command
            measured = guard.predict_state(measured)
        return kept

    def rearm(self, reason: str) -> None:
        """Raises UserError, and stays stopped, while the newest chunk and state would stop it again.

        Clients that ask meanwhile are refused; but what they ask about is looked at here.
        """
        if self._latest is not None:
            trial = GuardedChunks(copy.deepcopy(self.guard))
            trial.guard.rearm("a trial")
            try:
                trial.through(*self._latest)
            except UserError as error:
                raise UserError(
                    f"expected the newest chunk and state to pass the guard, found: {trial.guard.reason or error}; let "
                    "the client send an observation that does (it is refused, but looked at), then re-arm"
                ) from None
        self.guard.rearm(reason)

    def _stopped(self) -> UserError:
        return UserError(
            f"expected a guard that lets actions through, found it stopped ({self.guard.reason}); see to the robot, "
            "then re-arm (docs/serving.md)"
        )
