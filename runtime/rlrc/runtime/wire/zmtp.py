"""The reply side of ZeroMQ's request-reply over TCP: ZMTP 3.0 (rfc.zeromq.org/spec/23) without security.

libzmq's REP and ROUTER sockets limit the size of a frame, but not the frames of a message or the number of peers, and
they cannot drop a peer, so any peer can exhaust the memory (docs/decisions). Here a request is one frame after the
empty frame of REQ sockets, and the number of peers and their times to send and read are limited.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable
from functools import partial

from rlrc.errors import UserError
from rlrc.runtime.wire.logs import fields
from rlrc.runtime.wire.ports import PING_S, PINGS, Places, RateLimit, is_connected, release_frames

# (a request, or why it was refused) -> the answer
Answer = Callable[["bytes | UserError"], Awaitable[bytes]]

SECONDS = 10.0  # limit for the handshake, for sending a request, and for reading an answer
MORE, LONG, COMMAND = 1, 2, 4  # flags of a frame
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x05READY" + b"\x0bSocket-Type" + (3).to_bytes(4, "big") + b"REP"
LARGEST_COMMAND = 2048
DISCARD_FACTOR = 8  # larger requests than so many times the limit end the connection

log = logging.getLogger(__name__)


class ProtocolViolation(Exception):
    """The peer violates the protocol or a limit."""


class Replier:
    """``answering(peer, connected)`` returns the function that answers this peer's requests in order and never raises;
    ``connected()``: whether the peer is still connected.
    """

    def __init__(self, answering: Callable[[str, Callable[[], bool]], Answer], largest: int, peers: int) -> None:
        self._answering, self._largest, self._places = answering, largest, Places(peers, SECONDS)
        self._open: dict[asyncio.Task[None], StreamWriter] = {}
        self._server: asyncio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Returns the port. Raises UserError if it is taken."""
        try:
            self._server = await asyncio.start_server(self._accept, host, port)
        except OSError as error:
            raise UserError(f"expected a free port on {host}, found {port}: {error.strerror}; choose another") from None
        return int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        if self._server is None:
            return
        self._server.close()
        for writer in self._open.values():
            writer.close()  # ends pending reads
        if self._open:
            await asyncio.wait(list(self._open), timeout=1.0)
        for task in self._open:
            task.cancel()

    def _accept(self, reader: StreamReader, writer: StreamWriter) -> None:
        if not self._places.take(writer, writer.transport.abort):
            writer.close()
            return
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._open[task] = writer
        task.add_done_callback(lambda task: self._places.free(self._open.pop(task)))

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        peer = str(writer.get_extra_info("peername", ("",))[0])
        try:
            _keep_alive(writer)
            await asyncio.wait_for(_introduce(reader, writer), SECONDS)
            await self._talk(reader, writer, self._answering(peer, partial(is_connected, writer.transport)))
        except ProtocolViolation as error:
            log.info("gr00t client %s: %s", peer, error, extra=fields(protocol="gr00t", client=peer, outcome="request"))
        except (asyncio.IncompleteReadError, asyncio.TimeoutError, ConnectionError) as error:
            release_frames(error)
            log.info("gr00t client %s: gone", peer, extra=fields(protocol="gr00t", client=peer, outcome="gone"))
        finally:
            writer.transport.abort()  # drops answers that were not read

    async def _talk(self, reader: StreamReader, writer: StreamWriter, answer: Answer) -> None:
        pings = RateLimit(PINGS, PING_S)
        while True:
            await asyncio.sleep(0)  # let other tasks run, even if the next request has arrived
            first = await reader.readexactly(1)  # without a limit
            request = await asyncio.wait_for(self._request(reader, writer, first[0]), SECONDS)
            if request is None:
                if not pings.spend():
                    raise ProtocolViolation("expected at most one ping a second, found more; send fewer")
                continue
            answered = await answer(request)
            writer.write(_encode_frame(MORE, b"") + _encode_frame(0, answered))
            await asyncio.wait_for(writer.drain(), SECONDS)
            self._places.mark_answered(writer)

    async def _request(self, reader: StreamReader, writer: StreamWriter, flags: int) -> bytes | UserError | None:
        """The request's body, or why it was refused; None for a command."""
        frame = await _read_frame(reader, flags, LARGEST_COMMAND if flags & COMMAND else 0)
        if flags & COMMAND:
            if frame[:5] == b"\x04PING":  # followed by two bytes of its time-out
                writer.write(_encode_frame(COMMAND, b"\x04PONG" + frame[7:]))
                await writer.drain()
            return None
        if not flags & MORE:
            raise ProtocolViolation("expected an empty frame and a request, found one frame; use a REQ socket")
        flags = (await reader.readexactly(1))[0]
        if flags & (MORE | COMMAND):
            raise ProtocolViolation("expected a request of one frame, found more; use a REQ socket")
        size = await _read_size(reader, flags, DISCARD_FACTOR * self._largest)
        if size <= self._largest:
            return await reader.readexactly(size)
        while size:  # a client that is not read would wait for its answer forever
            size -= len(await reader.readexactly(min(size, 2**16)))
        return UserError(f"expected a request of up to {self._largest} bytes, found a larger one; send smaller images")


async def _introduce(reader: StreamReader, writer: StreamWriter) -> None:
    writer.transport.set_write_buffer_limits(0)  # so that ``drain`` waits until the peer has read everything
    writer.write(GREETING)
    greeting = await reader.readexactly(len(GREETING))
    if greeting[0] != 0xFF or greeting[9] != 0x7F or greeting[10] < 3:
        raise ProtocolViolation("expected ZMTP 3, found another greeting; use ZeroMQ 4 or later")
    if greeting[12:32] != GREETING[12:32]:
        raise ProtocolViolation("expected the mechanism NULL, found another; disable security")
    writer.write(_encode_frame(COMMAND, READY))
    flags = (await reader.readexactly(1))[0]
    ready = await _read_frame(reader, flags, LARGEST_COMMAND)
    if not flags & COMMAND or ready[:6] != READY[:6]:
        raise ProtocolViolation("expected the command READY, found another frame; use a REQ socket")


async def _read_frame(reader: StreamReader, flags: int, largest: int) -> bytes:
    return await reader.readexactly(await _read_size(reader, flags, largest))


async def _read_size(reader: StreamReader, flags: int, largest: int) -> int:
    if flags & ~(MORE | LONG | COMMAND):
        raise ProtocolViolation(f"expected a frame, found flags {flags:#x}; use ZeroMQ")
    size = int.from_bytes(await reader.readexactly(8 if flags & LONG else 1), "big")
    if size > largest:
        raise ProtocolViolation(
            f"expected a frame of up to {largest} bytes, found {size}; send less, from a REQ socket"
        )
    return size


def _encode_frame(flags: int, body: bytes) -> bytes:
    if len(body) < 256:
        return bytes((flags, len(body))) + body
    return bytes((flags | LONG,)) + len(body).to_bytes(8, "big") + body


def _keep_alive(writer: StreamWriter) -> None:
    """Detect peers that vanished within half a minute, to free their places."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
