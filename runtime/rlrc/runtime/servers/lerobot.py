"""LeRobot's protocol for asynchronous inference (gRPC), as its robot client speaks it: on this machine only.

The client names its sensors (SendPolicyInstructions), sends observations in chunks of 2 MiB (SendObservations), and
polls for actions (GetActions). Only the newest observation is kept. One that was answered already, or hardly differs
from the last, is skipped, unless the client has no actions left ("must_go"). The policy that the client asks the server
to load is ignored. Its messages are pickles: rlrc.runtime.wire.pickles.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping
from functools import partial
from typing import Any
from urllib.parse import unquote

import grpc

from rlrc.errors import UserError
from rlrc.runtime.servers import lerobot_features
from rlrc.runtime.servers.lerobot_features import Features, RememberedFeatures, state_folder
from rlrc.runtime.servers.lerobot_observations import ReceivedObservation, RobotClient, join_chunks, read_observation
from rlrc.runtime.servers.observations import Observations
from rlrc.runtime.servers.refusal import RequestRefused
from rlrc.runtime.servers.session import Session
from rlrc.runtime.wire import pickles, protobuf
from rlrc.runtime.wire.logs import fields
from rlrc.runtime.wire.ports import CLIENTS, LARGEST, Access, release_frames

PROTOCOL = "lerobot"
SERVICE = "transport.AsyncInference"
SEND_S = 10.0  # limit for a client to send an observation
STEP_S = 1 / 30  # between the timestamps of a chunk's actions, which the client only logs
PAUSE_S = 1.0  # delay of a refusal after REFUSALS in a row, or to an unknown client
REFUSALS = 2
PAUSING = 16  # delayed refusals at a time; others are sent at once
RETURNS_S = 60.0  # a client may reconnect within this time after its last request

OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", LARGEST),
    ("grpc.max_metadata_size", 8192),
    ("grpc.max_concurrent_streams", 8),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 600_000),  # without a request
    ("grpc.keepalive_time_ms", 30_000),  # detects peers that vanished
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
CODES = {
    "token": grpc.StatusCode.UNAUTHENTICATED,
    "not ready": grpc.StatusCode.UNAVAILABLE,  # LeRobot's client retries
    "busy": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "observation": grpc.StatusCode.INVALID_ARGUMENT,
    "policy": grpc.StatusCode.INVALID_ARGUMENT,
}

# (connection, request, the client's deadline in seconds) -> answer
Handle = Callable[[str, Any, "float | None"], Awaitable[bytes]]

log = logging.getLogger(__name__)


class LerobotServer:
    """Listens on one port of the loopback. Call ``start``, and ``stop`` after the session has been drained."""

    def __init__(self, session: Session, observations: Observations, access: Access) -> None:
        self._session, self._observations, self._access = session, observations, access
        self._robots: dict[str, RobotClient] = {}  # by connection
        self._remembered = RememberedFeatures()
        self._pausing = 0
        self._server: Any = None

    async def start(self, host: str, port: int) -> int:
        """Returns the port. Raises UserError if it is taken."""
        unary, streamed = grpc.unary_unary_rpc_method_handler, grpc.stream_unary_rpc_method_handler
        handlers = {
            "Ready": unary(self._with_status("Ready", self.ready)),
            "SendPolicyInstructions": unary(self._with_status("SendPolicyInstructions", self.instruct)),
            "SendObservations": streamed(self._with_status("SendObservations", self._receive)),
            "GetActions": unary(self._with_status("GetActions", self.actions)),
        }
        self._server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=2 * CLIENTS)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            found = self._server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError:
            raise UserError(f"expected a free port on {host}, found {port} taken; choose another") from None
        if port:  # a fixed port identifies the server after a restart
            self._remembered.open(state_folder() / f"lerobot-{port}.json")
        await self._server.start()
        return int(found)

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(1.0)

    async def ready(self, peer: str, message: bytes, within: float | None = None) -> bytes:
        """Start an episode."""
        self._robots.pop(peer, None)
        self._admit(peer)
        return b""

    async def instruct(self, peer: str, message: bytes, within: float | None = None) -> bytes:
        features = lerobot_features.read(pickles.read(protobuf.data(message)), self._observations)
        self._robot(peer).features = features
        self._remembered.add(features)
        return b""

    async def observe(self, peer: str, pickled: bytes) -> bytes:
        robot = self._robot(peer)
        timed = read_observation(pickles.read(pickled), partial(self._features, robot), self._observations)
        if not robot.offer(timed):
            self._session.metrics.count("rlrc_observations_total", protocol=PROTOCOL, outcome="left out")
        return b""

    async def actions(self, peer: str, message: bytes, within: float | None = None) -> bytes:
        robot = self._robot(peer)
        robot.asking += 1
        try:
            if not await robot.wait() or robot.features is None:
                return b""  # LeRobot's client polls again
            return await self._chunk(robot, robot.features.actions, within)
        finally:
            robot.asking -= 1
            robot.last_heard = time.monotonic()

    async def _chunk(self, robot: RobotClient, number: int, within: float | None) -> bytes:
        first = robot.take()
        if first is None:  # another request of this client took it
            return b""
        timed: ReceivedObservation = first

        def newest() -> dict[str, Any]:
            nonlocal timed
            timed = robot.take() or timed  # a newer one may have come in the meantime
            return timed.observation

        answered = False
        try:
            with self._session.track(PROTOCOL):
                # gRPC cancels this if the client disconnects or its deadline passes.
                chunk = await robot.client.infer(newest, within=within)
            robot.mark_answered(timed)
            answered = True
        finally:
            if not answered:
                robot.mark_failed()
        rows = chunk.actions[:number]
        return protobuf.with_data(pickles.write_actions(timed.module, timed.timestamp, STEP_S, timed.timestep, rows))

    async def _receive(self, peer: str, messages: AsyncIterable[bytes], within: float | None = None) -> bytes:
        try:
            return await self.observe(peer, await asyncio.wait_for(join_chunks(messages), SEND_S))
        except asyncio.TimeoutError:
            raise UserError(
                f"expected an observation within {SEND_S:g} s, found an incomplete one; use a faster connection"
            ) from None
        except UserError:
            self._session.metrics.count("rlrc_observations_total", protocol=PROTOCOL, outcome="observation")
            raise

    def _robot(self, peer: str) -> RobotClient:
        """The client of a connection. It may have named its sensors on another connection or to an earlier server."""
        robot = self._robots.get(peer) or self._admit(peer)
        robot.last_heard = time.monotonic()
        return robot

    def _admit(self, peer: str) -> RobotClient:
        if len(self._robots) >= CLIENTS:
            idle = next((one for one, robot in self._robots.items() if robot.idle), None)
            if idle is None:
                raise RequestRefused("busy", f"the server is full ({CLIENTS} clients); retry later")
            del self._robots[idle]
        self._robots[peer] = RobotClient(self._session.client(), self._session.spec)
        return self._robots[peer]

    def _features(self, robot: RobotClient, raw: Mapping[str, Any]) -> Features:
        """The features of the client that sent ``raw``. Raises UserError if it has never named its sensors."""
        if robot.features is None:
            others = [one for one in self._robots.values() if time.monotonic() - one.last_heard < RETURNS_S]
            features = self._remembered.find(raw, [one.features for one in others if one.features is not None])
            lerobot_features.check(features, self._observations)
            robot.features = features
        return robot.features

    def _with_status(self, name: str, handle: Handle) -> Callable[[Any, Any], Awaitable[bytes]]:
        """Report errors as gRPC status."""

        async def handler(request: Any, context: Any) -> bytes:
            peer = context.peer()
            token = dict(context.invocation_metadata() or ()).get("authorization")
            try:
                if not self._access.allows(token if isinstance(token, str) else None):
                    raise RequestRefused(
                        "token", "expected authorization: Bearer TOKEN, found another or none; send it"
                    )
                answer = await handle(peer, request, context.time_remaining())
                if (robot := self._robots.get(peer)) is not None:
                    robot.refused.pop(name, None)
                return answer
            except UserError as error:
                release_frames(error)
                code, why, outcome = grpc.StatusCode.INVALID_ARGUMENT, str(error), "request"
            except RequestRefused as error:
                release_frames(error)
                code, why = CODES.get(error.kind, grpc.StatusCode.FAILED_PRECONDITION), str(error)
                outcome = error.kind
            except Exception:
                log.exception("lerobot client %s", peer, extra=_log_fields(peer, "fault"))
                code, outcome = grpc.StatusCode.INTERNAL, "fault"
                why = "internal server error; see the server's log"
            if outcome != "fault":
                log.info("lerobot client %s: %s", peer, why, extra=_log_fields(peer, outcome))
            await self._pause(name, self._robots.get(peer))
            await context.abort(code, why)
            return b""

        return handler

    async def _pause(self, name: str, robot: RobotClient | None) -> None:
        """Slow down LeRobot's client, which ignores refusals: it polls again at once and goes on sending."""
        if robot is not None:
            robot.refused[name] += 1
        if (robot is None or robot.refused[name] > REFUSALS) and self._pausing < PAUSING:
            self._pausing += 1
            try:
                await asyncio.sleep(PAUSE_S)
            finally:
                self._pausing -= 1


def _log_fields(peer: str, outcome: str) -> dict[str, Any]:
    """``peer``: as gRPC writes it, ipv4:127.0.0.1:50312 or ipv6:%5B::1%5D:50312."""
    host = unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
    return fields(protocol=PROTOCOL, client=host, outcome=outcome)
