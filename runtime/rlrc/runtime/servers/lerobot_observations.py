"""Observations of LeRobot's clients: joining their chunks, decoding them, and keeping the newest of each client."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterable, Callable
from typing import Any, NamedTuple

import numpy as np

from rlrc.artifact import PolicySpec
from rlrc.errors import UserError
from rlrc.runtime.servers import lerobot_features
from rlrc.runtime.servers.lerobot_features import Features
from rlrc.runtime.servers.observations import Observations
from rlrc.runtime.servers.quoting import describe_value
from rlrc.runtime.servers.session import Client
from rlrc.runtime.wire import protobuf
from rlrc.runtime.wire.ports import LARGEST

BEGIN, MIDDLE, END = 1, 2, 3  # of an observation in chunks
WAIT_S = 2.0  # limit for an observation to arrive after a request for actions, as in LeRobot's server
IDLE_S = 1.0  # a client without a request for so long may be replaced by a new one
# Distance of normalised states below which LeRobot's server skips an observation: 1 of joints from -100 to 100.
SIMILAR = 0.01
MAX_TIMESTEP = 2**31 - 2**16


class ReceivedObservation(NamedTuple):
    """``observation``: as the policy takes it; ``module``: the client's module of LeRobot's classes."""

    module: str
    timestamp: float
    timestep: int
    must_go: bool
    observation: dict[str, Any]


class RobotClient:
    """A client's state from one Ready to the next: its features and its newest observation."""

    def __init__(self, client: Client, spec: PolicySpec) -> None:
        self.client, self._spec = client, spec
        self.last_heard = time.monotonic()
        self.asking = 0  # open requests for actions
        self.refused: Counter[str] = Counter()  # consecutive refusals, by method
        self.features: Features | None = None
        self._waiting: ReceivedObservation | None = None
        self._arrived = asyncio.Event()
        self._last: ReceivedObservation | None = None
        self._answered: deque[int] = deque(maxlen=1024)  # steps

    @property
    def idle(self) -> bool:
        return not self.asking and time.monotonic() - self.last_heard > IDLE_S

    def offer(self, timed: ReceivedObservation) -> bool:
        """Keep the observation in place of the one before, unless it is skipped. Returns whether it was kept."""
        if not timed.must_go and (timed.timestep in self._answered or self._similar(timed)):
            return False
        self._waiting = timed
        self._arrived.set()
        return True

    async def wait(self) -> bool:
        """Wait up to ``WAIT_S`` for an observation. Returns whether there is one."""
        try:
            await asyncio.wait_for(self._arrived.wait(), WAIT_S)
        except asyncio.TimeoutError:
            return False
        return True

    def take(self) -> ReceivedObservation | None:
        """Remove and return the newest observation."""
        self._arrived.clear()
        timed, self._waiting = self._waiting, None
        return timed

    def mark_answered(self, timed: ReceivedObservation) -> None:
        self._answered.append(timed.timestep)
        self._last = timed

    def mark_failed(self) -> None:
        """An observation was taken but not answered: do not skip the next one."""
        self._answered.clear()
        self._last = None

    def _similar(self, timed: ReceivedObservation) -> bool:
        if self._last is None or self._spec.state is None:
            return False
        last, now = self._last.observation, timed.observation
        scale = np.array(self._spec.state.norm.scale)
        if now["state"].shape != scale.shape or now.get("instruction") != last.get("instruction"):
            return False
        return bool(np.linalg.norm((now["state"] - last["state"]) / scale) < SIMILAR)


async def join_chunks(messages: AsyncIterable[bytes]) -> bytes:
    """Join the chunks of an observation. Raises UserError."""
    parts: list[bytes] = []
    size = 0
    async for message in messages:
        state = protobuf.fields(message).get(1, 0)
        if state not in (BEGIN, MIDDLE, END):
            raise UserError("expected a chunk's transfer state, found another; use LeRobot's client")
        if state == BEGIN:
            parts, size = [], 0
        parts.append(protobuf.data(message, 2))
        size += len(parts[-1])
        if size > LARGEST:
            raise UserError(f"expected an observation of up to {LARGEST} bytes, found more; send smaller pictures")
        if state == END:
            return b"".join(parts)
    raise UserError(
        "expected a complete observation, found the end of its stream: the client disconnected, or sent a message of "
        f"more than {LARGEST} bytes; send it in chunks"
    )


def read_observation(
    message: Any, features: Callable[[dict[str, Any]], Features], observations: Observations
) -> ReceivedObservation:
    """Decode a TimedObservation; ``features`` gives those of its client. Raises UserError."""
    state = lerobot_features.fields(message, "TimedObservation")
    timestamp, timestep, raw = state.get("timestamp"), state.get("timestep"), state.get("observation")
    if type(timestamp) is not float or not math.isfinite(timestamp):
        raise UserError(f"expected a timestamp in seconds, found {describe_value(timestamp)}; use LeRobot's client")
    if type(timestep) is not int or not 0 <= timestep < MAX_TIMESTEP:
        raise UserError(
            f"expected a timestep from 0 to {MAX_TIMESTEP - 1}, found {describe_value(timestep)}; use LeRobot's client"
        )
    if not isinstance(raw, dict):
        raise UserError(f"expected an observation as a map, found {type(raw).__name__}; use LeRobot's client")
    observation = observations.convert(features(raw).frame(raw))
    return ReceivedObservation(message.function.module, timestamp, timestep, state.get("must_go") is True, observation)
