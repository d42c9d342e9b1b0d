"""LeRobot's protocol for asynchronous inference (gRPC), as its robot client speaks it: on this machine only.

The client says how it calls its sensors (SendPolicyInstructions), sends observations as they come, in chunks of 2 MiB
(SendObservations), and asks for actions again and again (GetActions). One observation waits, the newest; one that was
answered already or hardly differs from the last is left out, unless the client has nothing left to do ("must_go").
What it says about the policy to load is not looked at. Its messages are pickles: rlrc.runtime.wire.pickles.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import unquote

import grpc
import numpy as np

from rlrc.artifact import PolicySpec
from rlrc.errors import UserError
from rlrc.runtime.servers import lerobot_features
from rlrc.runtime.servers.lerobot_features import Features, Known, state_folder
from rlrc.runtime.servers.observations import Observations, brief
from rlrc.runtime.servers.session import Client, Refused, Session
from rlrc.runtime.wire import pickles, protobuf
from rlrc.runtime.wire.logs import fields
from rlrc.runtime.wire.ports import CLIENTS, LARGEST, Access, forget

PROTOCOL = "lerobot"
SERVICE = "transport.AsyncInference"
BEGIN, MIDDLE, END = 1, 2, 3  # of an observation in chunks
SENT_S = 10.0  # longest time that a client may take to send an observation
AWAITED_S = 2.0  # how long a request for actions waits for an observation, as LeRobot's server does
STEP_S = 1 / 30  # between the time stamps of a chunk's actions, which the client only writes down
# Normalised: the distance at which LeRobot's server leaves an observation out, 1 of joints that go from -100 to 100.
SIMILAR = 0.01
LATEST = 2**31 - 2**16  # step that the client may be at
PAUSE_S = 1.0  # before a refusal of a client that is unknown, or was refused so many times in a row
REFUSALS = 2
PAUSING = 16  # such answers at once; more are sent at once
RETURNS_S = 60.0  # since a client was last heard of: it may come back by another connection
IDLE_S = 1.0  # a client that waits for nothing and has said nothing for so long makes room for another

OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", LARGEST),
    ("grpc.max_metadata_size", 8192),
    ("grpc.max_concurrent_streams", 8),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 600_000),  # without a request
    ("grpc.keepalive_time_ms", 30_000),  # a peer that went away without a word is noticed
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
CODES = {
    "token": grpc.StatusCode.UNAUTHENTICATED,
    "not ready": grpc.StatusCode.UNAVAILABLE,  # upon which LeRobot's client tries again
    "busy": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "observation": grpc.StatusCode.INVALID_ARGUMENT,
    "policy": grpc.StatusCode.INVALID_ARGUMENT,
}

# Connection, request and the seconds that the client will wait -> answer.
Handle = Callable[[str, Any, "float | None"], Awaitable[bytes]]

log = logging.getLogger(__name__)


class ReceivedObservation(NamedTuple):
    """An observation as the policy takes it. ``module``: where the client has LeRobot's classes."""

    module: str
    timestamp: float
    timestep: int
    must_go: bool
    observation: dict[str, Any]


class RobotClient:
    """A client, from one Ready to the next."""

    def __init__(self, client: Client, spec: PolicySpec) -> None:
        self.client, self._spec = client, spec
        self.seen, self.asking = time.monotonic(), 0  # and how many of its requests for actions are not answered yet
        self.refused: Counter[str] = Counter()  # of each request, one after the other
        self.features: Features | None = None
        self._waiting: ReceivedObservation | None = None
        self._came = asyncio.Event()
        self._last: ReceivedObservation | None = None
        self._answered: deque[int] = deque(maxlen=1024)  # steps

    @property
    def idle(self) -> bool:
        return not self.asking and time.monotonic() - self.seen > IDLE_S

    def offer(self, timed: ReceivedObservation) -> bool:
        """-> whether it waits to be answered now, in the place of the one before."""
        if not timed.must_go and (timed.timestep in self._answered or self._similar(timed)):
            return False
        self._waiting = timed
        self._came.set()
        return True

    async def comes(self) -> bool:
        """Whether an observation waits, or comes within 2 s."""
        try:
            await asyncio.wait_for(self._came.wait(), AWAITED_S)
        except asyncio.TimeoutError:
            return False
        return True

    def newest(self) -> ReceivedObservation | None:
        """The observation that waits, which is then to be answered."""
        self._came.clear()
        timed, self._waiting = self._waiting, None
        return timed

    def answered(self, timed: ReceivedObservation) -> None:
        self._answered.append(timed.timestep)
        self._last = timed

    def unanswered(self) -> None:
        """The client has nothing for an observation that was taken: the next one is not left out, whatever it is."""
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


class LerobotServer:
    """On one port of the loopback. ``start``, then ``stop`` once the session has been drained."""

    def __init__(self, session: Session, observations: Observations, access: Access) -> None:
        self._session, self._observations, self._access = session, observations, access
        self._robots: dict[str, RobotClient] = {}  # by connection
        self._known = Known()
        self._pausing = 0
        self._server: Any = None

    async def start(self, host: str, port: int) -> int:
        """-> the port. Raises UserError if it is taken."""
        unary, streamed = grpc.unary_unary_rpc_method_handler, grpc.stream_unary_rpc_method_handler
        handlers = {
            "Ready": unary(self._told("Ready", self.ready)),
            "SendPolicyInstructions": unary(self._told("SendPolicyInstructions", self.instruct)),
            "SendObservations": streamed(self._told("SendObservations", self._observed)),
            "GetActions": unary(self._told("GetActions", self.actions)),
        }
        self._server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=2 * CLIENTS)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            found = self._server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError:
            raise UserError(f"expected a free port on {host}, found {port} taken; give another") from None
        if port:  # and so the same after a restart
            self._known.open(state_folder() / f"lerobot-{port}.json")
        await self._server.start()
        return int(found)

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(1.0)

    async def ready(self, peer: str, message: bytes, within: float | None = None) -> bytes:
        """An episode begins."""
        self._robots.pop(peer, None)
        self._admit(peer)
        return b""

    async def instruct(self, peer: str, message: bytes, within: float | None = None) -> bytes:
        features = lerobot_features.read(pickles.read(protobuf.data(message)), self._observations)
        self._robot(peer).features = features
        self._known.add(features)
        return b""

    async def observe(self, peer: str, pickled: bytes) -> bytes:
        robot = self._robot(peer)
        timed = _timed(pickles.read(pickled), partial(self._features, robot), self._observations)
        if not robot.offer(timed):
            self._session.metrics.count("rlrc_observations_total", protocol=PROTOCOL, outcome="left out")
        return b""

    async def actions(self, peer: str, message: bytes, within: float | None = None) -> bytes:
        robot = self._robot(peer)
        robot.asking += 1
        try:
            if not await robot.comes() or robot.features is None:
                return b""  # LeRobot's client asks again
            return await self._chunk(robot, robot.features.actions, within)
        finally:
            robot.asking -= 1
            robot.seen = time.monotonic()

    async def _chunk(self, robot: RobotClient, number: int, within: float | None) -> bytes:
        first = robot.newest()
        if first is None:  # another request of this client has taken it
            return b""
        timed: ReceivedObservation = first

        def newest() -> dict[str, Any]:
            nonlocal timed
            timed = robot.newest() or timed  # one that came while this waited for its turn
            return timed.observation

        answered = False
        try:
            with self._session.answer(PROTOCOL):
                # gRPC cancels this when the client goes away, or its deadline is over.
                chunk = await robot.client.infer(newest, within=within)
            robot.answered(timed)
            answered = True
        finally:
            if not answered:
                robot.unanswered()
        rows = chunk.actions[:number]
        return protobuf.with_data(pickles.timed_actions(timed.module, timed.timestamp, STEP_S, timed.timestep, rows))

    async def _observed(self, peer: str, messages: AsyncIterable[bytes], within: float | None = None) -> bytes:
        try:
            return await self.observe(peer, await asyncio.wait_for(whole(messages), SENT_S))
        except asyncio.TimeoutError:
            raise UserError(f"expected an observation within {SENT_S:g} s, found less; send faster") from None
        except UserError:
            self._session.metrics.count("rlrc_observations_total", protocol=PROTOCOL, outcome="observation")
            raise

    def _robot(self, peer: str) -> RobotClient:
        """Also of a client that has introduced itself by another connection, or to an earlier server."""
        robot = self._robots.get(peer) or self._admit(peer)
        robot.seen = time.monotonic()
        return robot

    def _admit(self, peer: str) -> RobotClient:
        if len(self._robots) >= CLIENTS:
            idle = next((one for one, robot in self._robots.items() if robot.idle), None)
            if idle is None:
                raise Refused("busy", f"expected at most {CLIENTS} clients, found as many; try again later")
            del self._robots[idle]
        self._robots[peer] = RobotClient(self._session.client(), self._session.spec)
        return self._robots[peer]

    def _features(self, robot: RobotClient, raw: Mapping[str, Any]) -> Features:
        """Of the client that sends ``raw``. Raises UserError if it has never introduced itself."""
        if robot.features is None:
            others = [one for one in self._robots.values() if time.monotonic() - one.seen < RETURNS_S]
            features = self._known.find(raw, [one.features for one in others if one.features is not None])
            lerobot_features.check(features, self._observations)
            robot.features = features
        return robot.features

    def _told(self, name: str, handle: Handle) -> Callable[[Any, Any], Awaitable[bytes]]:
        """With what went wrong as gRPC's status."""

        async def handler(request: Any, context: Any) -> bytes:
            peer = context.peer()
            token = dict(context.invocation_metadata() or ()).get("authorization")
            try:
                if not self._access.allows(token if isinstance(token, str) else None):
                    raise Refused("token", "expected authorization: Bearer TOKEN, found another or none; send it")
                answer = await handle(peer, request, context.time_remaining())
                if (robot := self._robots.get(peer)) is not None:
                    robot.refused.pop(name, None)
                return answer
            except UserError as error:
                forget(error)
                code, why, outcome = grpc.StatusCode.INVALID_ARGUMENT, str(error), "request"
            except Refused as error:
                forget(error)
                code, why = CODES.get(error.kind, grpc.StatusCode.FAILED_PRECONDITION), str(error)
                outcome = error.kind
            except Exception:
                log.exception("lerobot client %s", peer, extra=_extra(peer, "fault"))
                code, outcome = grpc.StatusCode.INTERNAL, "fault"
                why = "expected to answer, found a fault of the server; its log says more"
            if outcome != "fault":
                log.info("lerobot client %s: %s", peer, why, extra=_extra(peer, outcome))
            await self._pause(name, self._robots.get(peer))
            await context.abort(code, why)
            return b""

        return handler

    async def _pause(self, name: str, robot: RobotClient | None) -> None:
        """LeRobot's client ignores refusals: it asks for actions again at once, and sends observations at its rate."""
        if robot is not None:
            robot.refused[name] += 1
        if (robot is None or robot.refused[name] > REFUSALS) and self._pausing < PAUSING:
            self._pausing += 1
            try:
                await asyncio.sleep(PAUSE_S)
            finally:
                self._pausing -= 1


def _extra(peer: str, outcome: str) -> dict[str, Any]:
    """``peer`` as gRPC writes it: ipv4:127.0.0.1:50312, ipv6:%5B::1%5D:50312."""
    host = unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
    return fields(protocol=PROTOCOL, client=host, outcome=outcome)


async def whole(messages: AsyncIterable[bytes]) -> bytes:
    """The chunks of an observation, put together. Raises UserError."""
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
        f"expected the end of an observation, found the end of its stream: the client left, or sent a message of more "
        f"than {LARGEST} bytes; send it whole, in chunks"
    )


def _timed(
    message: Any, features: Callable[[dict[str, Any]], Features], observations: Observations
) -> ReceivedObservation:
    """Of a TimedObservation; ``features`` of the client that sends this. Raises UserError."""
    state = lerobot_features.fields(message, "TimedObservation")
    timestamp, timestep, raw = state.get("timestamp"), state.get("timestep"), state.get("observation")
    if type(timestamp) is not float or not math.isfinite(timestamp):
        raise UserError(f"expected a timestamp in seconds, found {brief(timestamp)}; use LeRobot's client")
    if type(timestep) is not int or not 0 <= timestep < LATEST:
        raise UserError(f"expected a timestep from 0 to {LATEST - 1}, found {brief(timestep)}; use LeRobot's client")
    if not isinstance(raw, dict):
        raise UserError(f"expected an observation as a map, found {type(raw).__name__}; use LeRobot's client")
    observation = observations.of(features(raw).frame(raw))
    return ReceivedObservation(message.function.module, timestamp, timestep, state.get("must_go") is True, observation)
