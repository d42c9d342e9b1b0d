"""openpi's protocol (WebSocket and msgpack), as its public client openpi-client speaks it.

The server first sends its metadata. Then each observation is answered with a chunk: {actions (horizon, dim),
policy_timing {infer_ms}, server_timing {infer_ms, prev_total_ms from the second on}}. An error is a text frame, which
openpi-client raises, and closes the connection with 1011. Encoding: rlrc.runtime.wire.arrays.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import Callable
from functools import cache, partial
from time import perf_counter
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from rlrc.errors import UserError
from rlrc.runtime.servers.observations import Observations
from rlrc.runtime.servers.refusal import RequestRefused
from rlrc.runtime.servers.session import Client, Session
from rlrc.runtime.servers.status import status
from rlrc.runtime.wire import arrays
from rlrc.runtime.wire.frames import WebSocketConnection
from rlrc.runtime.wire.logs import fields
from rlrc.runtime.wire.ports import (
    CLIENTS,
    CONNECTIONS,
    LARGEST,
    PATIENCE_S,
    Access,
    Places,
    is_connected,
    is_loopback,
    release_frames,
)

PROTOCOL = "openpi"
SEND_S = 10.0  # limit for a client to read an answer
CLOSE_S = 2.0  # limit for a client to confirm the end of the connection

log = logging.getLogger(__name__)


class OpenpiServer:
    """Listens on one port. Call ``start``, and ``stop`` after the session has been drained."""

    def __init__(self, session: Session, observations: Observations, access: Access) -> None:
        self._session, self._observations, self._access = session, observations, access
        self._entering, self._clients = Places(CONNECTIONS - CLIENTS, 0.0), Places(CLIENTS, PATIENCE_S)
        self._server: Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Returns the port. Raises UserError if it is taken."""
        try:
            self._server = await serve(
                self._serve,
                host,
                port,
                ssl=self._access.tls,
                process_request=self._request,
                origins=[None],  # refuses pages in browsers, which always send an origin
                compression=None,
                max_size=LARGEST,
                max_queue=1,
                close_timeout=CLOSE_S,
                create_connection=partial(WebSocketConnection, on_open=self._on_open, on_close=self._on_close),  # type: ignore[arg-type]
                logger=logging.getLogger(f"{__name__}.frames"),
            )
        except OSError as error:
            raise UserError(f"expected a free port on {host}, found {port}: {error.strerror}; choose another") from None
        return int(next(iter(self._server.sockets)).getsockname()[1])

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    def _on_open(self, connection: WebSocketConnection) -> None:
        self._entering.take(
            connection, connection.transport.abort
        )  # always succeeds: patience is 0, so the oldest leaves

    def _on_close(self, connection: WebSocketConnection) -> None:
        self._entering.free(connection)
        self._clients.free(connection)
        error = connection.protocol.handshake_exc
        if error is not None and not isinstance(error.__cause__, EOFError):  # EOFError: it left before its request
            # Not the cause: it quotes the request, including its token.
            _log(connection, "request", f"expected openpi's WebSocket, found: {str(error)[:100]}; use openpi-client")

    def _request(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.headers.get_all("Content-Encoding"):
            return connection.respond(415, "expected a request without Content-Encoding, found one\n")
        authorization = ", ".join(request.headers.get_all("Authorization"))  # two headers never match
        found = status(request.path, self._session, self._access, authorization)
        if found is not None:
            code, body, kind = found
            response = connection.respond(code, body)
            response.headers = Headers({**response.headers, "Content-Type": kind})
            return response
        if not self._access.allows(authorization):
            why = "expected the header Authorization: Api-Key TOKEN, found another token or none; send it"
            _log(connection, "token", why)
            return connection.respond(401, f"{why}\n")
        if self._session.draining or not self._clients.take(connection, connection.transport.abort):
            why = "the server is full or shutting down; retry later"
            _log(connection, "busy", why)
            return connection.respond(503, f"{why}\n")
        self._entering.free(connection)
        return None

    async def _serve(self, connection: ServerConnection) -> None:
        try:
            await self._talk(connection)
        except (ConnectionClosed, asyncio.TimeoutError) as error:
            _log(connection, *_describe_end(error))
            release_frames(error)
        except RequestRefused as error:
            _log(connection, error.kind, str(error))
            release_frames(error)
            await _refuse(connection, str(error))
        except Exception:
            peer = _peer(connection)
            log.exception("openpi client %s", peer, extra=fields(protocol=PROTOCOL, client=peer, outcome="fault"))
            await _refuse(connection, "internal server error; see the server's log")

    async def _talk(self, connection: ServerConnection) -> None:
        await self._wait_until_loaded()
        client, total_ms = self._session.client(), None
        await connection.send(arrays.pack(self._metadata() | _no_shared_memory(connection)))
        async for message in connection:
            begun = perf_counter()
            with self._session.track(PROTOCOL):
                connected = partial(is_connected, connection.transport)
                result = await self._result(client, message, total_ms, connected)
                await _send(connection, result)
            self._clients.mark_answered(connection)
            total_ms = (perf_counter() - begun) * 1e3

    async def _wait_until_loaded(self) -> None:
        """A client that connects while the policy is loading waits for the metadata."""
        waits = [
            asyncio.ensure_future(event.wait())
            for event in (self._session.inference.opened, self._session.inference.failed)
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _result(
        self,
        client: Client,
        message: str | bytes,
        total_ms: float | None,
        connected: Callable[[], bool] = lambda: True,
    ) -> bytes:
        begun = perf_counter()
        if isinstance(message, str):
            raise UserError("expected a binary frame, found text; send msgpack")
        chunk = await client.infer(self._observations.convert(arrays.unpack(message)), connected)
        server_timing = {"infer_ms": (perf_counter() - begun) * 1e3}
        if total_ms is not None:
            server_timing["prev_total_ms"] = total_ms
        timing = {"policy_timing": {"infer_ms": chunk.seconds * 1e3}, "server_timing": server_timing}
        return arrays.pack({"actions": chunk.actions, **timing})

    def _metadata(self) -> dict[str, Any]:
        action = self._session.spec.action
        return {
            "server": "rlrc",
            "observation": self._observations.description,
            "horizon": action.horizon,
            "actions": [f"{name} ({unit})" for name, unit in zip(action.names, action.units, strict=True)],
            "guarded": self._session.guarded is not None,
        }


def _peer(connection: ServerConnection) -> str:
    """The peer's address; empty if it has disconnected."""
    return str((connection.remote_address or ("",))[0])


def _log(connection: ServerConnection, outcome: str, why: str) -> None:
    peer = _peer(connection)
    log.info("openpi client %s: %s", peer, why, extra=fields(protocol=PROTOCOL, client=peer, outcome=outcome))


def _describe_end(error: Exception) -> tuple[str, str]:
    """Outcome and message for the log: the client left, or sent something invalid."""
    if not isinstance(error, ConnectionClosed) or error.sent is None or error.rcvd_then_sent:
        return "gone", "gone"
    if error.sent.code == CloseCode.MESSAGE_TOO_BIG:
        return "request", f"expected a message of up to {LARGEST} bytes, found a larger one; send smaller pictures"
    return "request", f"expected WebSocket frames, found: {error.sent.reason or error.sent.code}; use openpi-client"


def _no_shared_memory(connection: ServerConnection) -> dict[str, str]:
    """Metadata for rlrc's clients before December 2026 that request shared memory and refuse servers without it."""
    asked = connection.request is not None and "X-Shared-Memory" in connection.request.headers
    return {"shared_memory": _full_memory()} if asked and is_loopback(_peer(connection)) else {}


@cache
def _full_memory() -> str:
    """The path of one sealed byte. Such clients open it, find no room for a picture, and send it in the message."""
    descriptor = os.memfd_create("rlrc", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 1)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return f"/proc/{os.getpid()}/fd/{descriptor}"


async def _send(connection: ServerConnection, message: bytes) -> None:
    """Raises ConnectionClosed if the client does not read the message in time."""
    slow = asyncio.get_running_loop().call_later(SEND_S, connection.transport.abort)
    try:
        await connection.send(message)
    finally:
        slow.cancel()


async def _refuse(connection: ServerConnection, message: str) -> None:
    try:
        await asyncio.wait_for(connection.send(message), SEND_S)
        await connection.close(1011, "see the text frame")
    except (ConnectionClosed, asyncio.TimeoutError):
        return
