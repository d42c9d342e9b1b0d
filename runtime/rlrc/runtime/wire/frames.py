"""WebSocket connections with limits on the frames of one read and on the rate of pings.

The library parses all data of a read before other tasks run, and answers every ping at once: a read of 256 KiB may
contain 40,000 pings.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from websockets.asyncio.server import Server, ServerConnection
from websockets.exceptions import ProtocolError
from websockets.frames import CTRL_OPCODES, Frame
from websockets.server import ServerProtocol

from rlrc.runtime.wire.ports import PING_S, PINGS, RateLimit, release_frames

MAX_FRAMES = 256  # per read: 256 KiB in the smallest fragments of common libraries are fewer


class LimitedProtocol(ServerProtocol):
    """Closes a connection that exceeds the limits with 1002."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._frames, self._pings = 0, RateLimit(PINGS, PING_S)

    def receive_data(self, data: bytes | bytearray) -> None:
        self._frames = 0
        super().receive_data(data)

    def recv_frame(self, frame: Frame) -> None:
        self._frames += 1
        if self._frames > MAX_FRAMES:
            raise ProtocolError("too many small frames")
        if frame.opcode in CTRL_OPCODES and not self._pings.spend():
            raise ProtocolError("too many pings")
        super().recv_frame(frame)


class WebSocketConnection(ServerConnection):
    """Calls ``on_open`` when it is established and ``on_close`` when it ends."""

    def __init__(
        self,
        protocol: ServerProtocol,
        server: Server,
        *,
        on_open: Callable[[WebSocketConnection], None],
        on_close: Callable[[WebSocketConnection], None],
        **options: Any,
    ) -> None:
        few = LimitedProtocol(origins=protocol.origins, max_size=protocol.max_message_size, logger=protocol.logger)
        super().__init__(few, server, **options)
        self._on_open, self._on_close = on_open, on_close

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._on_open(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_close(self)
        super().connection_lost(exc)
        # The parser's frame would keep the last message until the next garbage collection.
        self.protocol.parser.close()
        if self.protocol.parser_exc is not None:
            release_frames(self.protocol.parser_exc)
