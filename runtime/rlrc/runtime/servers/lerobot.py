"""LeRobot's protocol for asynchronous inference (gRPC), as its robot client speaks it: on this machine only.

The client says how it calls its sensors (SendPolicyInstructions), sends observations as they come, in chunks of 2 MiB
(SendObservations), and asks for actions again and again (GetActions). One observation waits, the newest; one that was
answered already or hardly differs from the last is left out, unless the client has nothing left to do ("must_go").
What it says about the policy to load is not looked at. Its messages are pickles: rlrc.runtime.servers.pickles.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import grpc
import numpy as np

from rlrc.artifact import PolicySpec
from rlrc.errors import UserError
from rlrc.runtime.servers import pickles, protobuf
from rlrc.runtime.servers.logs import fields
from rlrc.runtime.servers.observations import Observations, shown
from rlrc.runtime.servers.pickles import Call
from rlrc.runtime.servers.ports import CLIENTS, Access, forget
from rlrc.runtime.servers.session import LARGEST, Client, Refused, Session

PROTOCOL = "lerobot"
SERVICE = "transport.AsyncInference"
BEGIN, MIDDLE, END = 1, 2, 3  # of an observation in chunks
SENT_S = 10.0  # longest time that a client may take to send an observation
AWAITED_S = 2.0  # how long a request for actions waits for an observation, as LeRobot's server does
STEP_S = 1 / 30  # between the time stamps of a chunk's actions, which the client only writes down
# Normalised: the distance at which LeRobot's server leaves an observation out, 1 of joints that go from -100 to 100.
SIMILAR = 0.01
LATEST = 2**31 - 2**16  # step that the client may be at
NUMBERS = 1024  # of a robot's state
IDLE_S = 1.0  # a client that waits for nothing and has said nothing for so long makes room for another

OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 4 * 2**20),
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
    "not ready": grpc.StatusCode.UNAVAILABLE,  # upon which LeRobot's client tries again
    "busy": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "observation": grpc.StatusCode.INVALID_ARGUMENT,
    "policy": grpc.StatusCode.INVALID_ARGUMENT,
}

log = logging.getLogger(__name__)


class Timed(NamedTuple):
    """An observation as the policy takes it. ``module``: where the client has LeRobot's classes."""

    module: str
    timestamp: float
    timestep: int
    must_go: bool
    observation: dict[str, Any]


@dataclass(frozen=True)
class Features:
    """What the client calls its sensors: state -> its numbers, pictures; and how many actions it wants of a chunk."""

    states: dict[str, tuple[str, ...]]
    pictures: dict[str, str]
    renamed: dict[str, str]
    actions: int

    def frame(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """A robot's observation as LeRobot's data sets call it. Raises UserError."""
        frame: dict[str, Any] = {"task": raw["task"]} if "task" in raw else {}
        for key, names in self.states.items():
            frame[key] = np.array([_number(raw, name) for name in names])
        for key, name in self.pictures.items():
            if name in raw:
                frame[key] = pickles.array(raw[name])
        return {self.renamed.get(key, key): value for key, value in frame.items()}


class Robot:
    """A client, from one Ready to the next."""

    def __init__(self, client: Client, spec: PolicySpec) -> None:
        self.client, self._spec = client, spec
        self.seen, self.asking = time.monotonic(), 0  # and how many of its requests for actions are not answered yet
        self.features: Features | None = None
        self._waiting: Timed | None = None
        self._came = asyncio.Event()
        self._last: Timed | None = None
        self._answered: deque[int] = deque(maxlen=1024)  # steps

    @property
    def idle(self) -> bool:
        return not self.asking and time.monotonic() - self.seen > IDLE_S

    def offer(self, timed: Timed) -> bool:
        """-> whether it waits to be answered now, in the place of the one before."""
        if not timed.must_go and (timed.timestep in self._answered or self._similar(timed)):
            return False
        self._waiting = timed
        self._came.set()
        return True

    async def newest(self) -> Timed | None:
        """The observation that waits, or comes within 2 s."""
        try:
            await asyncio.wait_for(self._came.wait(), AWAITED_S)
        except asyncio.TimeoutError:
            return None
        self._came.clear()
        timed, self._waiting = self._waiting, None
        return timed

    def answered(self, timed: Timed) -> None:
        self._answered.append(timed.timestep)
        self._last = timed

    def _similar(self, timed: Timed) -> bool:
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
        self._robots: dict[str, Robot] = {}
        self._server: Any = None

    async def start(self, host: str, port: int) -> int:
        """-> the port. Raises UserError if it is taken."""
        unary, streamed = grpc.unary_unary_rpc_method_handler, grpc.stream_unary_rpc_method_handler
        handlers = {
            "Ready": unary(self._told(self.ready)),
            "SendPolicyInstructions": unary(self._told(self.instruct)),
            "SendObservations": streamed(self._told(self._observed)),
            "GetActions": unary(self._told(self.actions)),
        }
        self._server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=2 * CLIENTS)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        try:
            found = self._server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError:
            raise UserError(f"expected a free port on {host}, found {port} taken; give another") from None
        await self._server.start()
        return int(found)

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(1.0)

    async def ready(self, peer: str, message: bytes) -> bytes:
        """An episode begins."""
        if peer not in self._robots and len(self._robots) >= CLIENTS:
            idle = next((one for one, robot in self._robots.items() if robot.idle), None)
            if idle is None:
                raise Refused("busy", f"expected at most {CLIENTS} clients, found as many; try again later")
            del self._robots[idle]
        self._robots[peer] = Robot(self._session.client(), self._session.spec)
        return b""

    async def instruct(self, peer: str, message: bytes) -> bytes:
        self._robot(peer).features = _features(pickles.read(protobuf.data(message)))
        return b""

    async def observe(self, peer: str, pickled: bytes) -> bytes:
        robot = self._robot(peer)
        if robot.features is None:
            raise UserError("expected SendPolicyInstructions before observations, found none; use LeRobot's client")
        timed = _timed(pickles.read(pickled), robot.features, self._observations)
        if not robot.offer(timed):
            self._session.metrics.count("rlrc_observations_total", protocol=PROTOCOL, outcome="left out")
        return b""

    async def actions(self, peer: str, message: bytes) -> bytes:
        robot = self._robot(peer)
        robot.asking += 1
        try:
            timed = await robot.newest()
            if timed is None or robot.features is None:
                return b""  # LeRobot's client asks again
            with self._session.answer(PROTOCOL):
                chunk = await robot.client.infer(timed.observation)
        finally:
            robot.asking -= 1
            robot.seen = time.monotonic()
        robot.answered(timed)
        rows = chunk.actions[: robot.features.actions]
        return protobuf.with_data(pickles.timed_actions(timed.module, timed.timestamp, STEP_S, timed.timestep, rows))

    async def _observed(self, peer: str, messages: AsyncIterable[bytes]) -> bytes:
        try:
            return await self.observe(peer, await asyncio.wait_for(whole(messages), SENT_S))
        except asyncio.TimeoutError:
            raise UserError(f"expected an observation within {SENT_S:g} s, found less; send faster") from None
        except UserError:
            self._session.metrics.count("rlrc_observations_total", protocol=PROTOCOL, outcome="observation")
            raise

    def _robot(self, peer: str) -> Robot:
        if (robot := self._robots.get(peer)) is None:
            raise UserError("expected Ready first, found none from this connection; start the client again")
        robot.seen = time.monotonic()
        return robot

    def _told(self, handle: Callable[[str, Any], Awaitable[bytes]]) -> Callable[[Any, Any], Awaitable[bytes]]:
        """With what went wrong as gRPC's status."""

        async def handler(request: Any, context: Any) -> bytes:
            peer = context.peer()
            token = dict(context.invocation_metadata() or ()).get("authorization")
            if not self._access.allows(token if isinstance(token, str) else None):
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "expected authorization: Bearer TOKEN")
            try:
                return await handle(peer, request)
            except UserError as error:
                forget(error)
                code, why, outcome = grpc.StatusCode.INVALID_ARGUMENT, str(error), "request"
            except Refused as error:
                forget(error)
                code, why = CODES.get(error.kind, grpc.StatusCode.FAILED_PRECONDITION), str(error)
                outcome = error.kind
            except Exception:
                log.exception("lerobot client %s", peer, extra=fields(protocol=PROTOCOL, client=peer, outcome="fault"))
                code, outcome = grpc.StatusCode.INTERNAL, "fault"
                why = "expected to answer, found a fault of the server; its log says more"
            told = fields(protocol=PROTOCOL, client=peer, outcome=outcome)
            log.info("lerobot client %s: %s", peer, why, extra=told)
            await context.abort(code, why)
            return b""

        return handler


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
    raise UserError("expected the end of an observation, found the end of its stream; send it whole")


def _features(policy: Any) -> Features:
    """Of a RemotePolicyConfig. Raises UserError."""
    state = _fields(policy, "RemotePolicyConfig")
    features, actions = state.get("lerobot_features"), state.get("actions_per_chunk")
    renamed = state.get("rename_map", {})
    if not isinstance(features, dict) or type(actions) is not int or actions < 1:
        raise UserError("expected lerobot_features and actions_per_chunk, found others; use LeRobot's client")
    if not isinstance(renamed, dict) or not all(isinstance(name, str) for name in renamed.values()):
        raise UserError("expected a rename_map of texts, found another; use LeRobot's client")
    states, pictures = {}, {}
    for key, feature in features.items():
        kind, names = (feature.get("dtype"), feature.get("names")) if isinstance(feature, dict) else (None, None)
        if kind in ("image", "video") and key.startswith("observation.images."):
            pictures[key] = key.removeprefix("observation.images.")
        elif kind == "float32" and key.startswith("observation."):
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise UserError(f"expected names of the numbers of {shown(key)}, found none; use LeRobot's client")
            states[key] = tuple(names)
    if (count := sum(map(len, states.values()))) > NUMBERS:  # a pickle may have one list a thousand times
        raise UserError(f"expected up to {NUMBERS} numbers in a state, found {count}; use LeRobot's client")
    return Features(states, pictures, renamed, actions)


def _timed(message: Any, features: Features, observations: Observations) -> Timed:
    """Of a TimedObservation. Raises UserError."""
    state = _fields(message, "TimedObservation")
    timestamp, timestep, raw = state.get("timestamp"), state.get("timestep"), state.get("observation")
    if type(timestamp) is not float or type(timestep) is not int or not 0 <= timestep < LATEST:
        raise UserError("expected a timestamp and a timestep, found others; use LeRobot's client")
    if not isinstance(raw, dict):
        raise UserError(f"expected an observation as a map, found {type(raw).__name__}; use LeRobot's client")
    observation = observations.of(features.frame(raw))
    return Timed(message.function.module, timestamp, timestep, state.get("must_go") is True, observation)


def _fields(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Call) or message.function.name != name or not isinstance(message.state, dict):
        raise UserError(f"expected LeRobot's {name}, found something else; use LeRobot's client")
    return message.state


def _number(raw: Mapping[str, Any], name: str) -> float:
    value = raw.get(name)
    if isinstance(value, Call):
        found = pickles.array(value)
        value = found.item() if found.ndim == 0 else None
    if not isinstance(value, (int, float)) or not abs(value) < 2**127:  # float32's range; and no NaN
        raise UserError(f"expected the number {shown(name)} in the observation, found another or none; send it")
    return float(value)
