"""WebSocket connections that no client can make costly.

The library parses all that came in one read before anything else has a turn, and answers every ping at once: a read of
256 KiB can hold 40,000 of them. Here a read may hold so many frames, and pings come so often.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from websockets.asyncio.server import Server, ServerConnection
from websockets.exceptions import ProtocolError
from websockets.frames import CTRL_OPCODES, Frame
from websockets.server import ServerProtocol

from rlrc.runtime.wire.ports import PING_S, PINGS, Allowance, forget

FRAMES = 256  # of one read: 256 KiB in the smallest fragments that libraries make are fewer


class FewFrames(ServerProtocol):
    """Fails a connection with 1002 for more frames than these."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._frames, self._pings = 0, Allowance(PINGS, PING_S)

    def receive_data(self, data: bytes | bytearray) -> None:
        self._frames = 0
        super().receive_data(data)

    def recv_frame(self, frame: Frame) -> None:
        self._frames += 1
        if self._frames > FRAMES:
            raise ProtocolError("too many small frames")
        if frame.opcode in CTRL_OPCODES and not self._pings.spend():
            raise ProtocolError("too many pings")
        super().recv_frame(frame)


class WebSocketConnection(ServerConnection):
    """Tells ``came`` when it is there and ``gone`` when it is no more."""

    def __init__(
        self,
        protocol: ServerProtocol,
        server: Server,
        *,
        came: Callable[[WebSocketConnection], None],
        gone: Callable[[WebSocketConnection], None],
        **options: Any,
    ) -> None:
        few = FewFrames(origins=protocol.origins, max_size=protocol.max_message_size, logger=protocol.logger)
        super().__init__(few, server, **options)
        self._came, self._gone = came, gone

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._came(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone(self)
        super().connection_lost(exc)
        # The parser's frame holds the last message, until the garbage collector comes to it.
        self.protocol.parser.close()
        if self.protocol.parser_exc is not None:
            forget(self.protocol.parser_exc)
