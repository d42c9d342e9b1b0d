"""A gate in front of aiohttp: each request is parsed strictly and checked before aiohttp receives any of it.

    check(head)            # raises Refusal (no token, too large, ...); must be fast, since it runs in the event loop
    runner = web.AppRunner(app(...), ...); await listen(runner, check, Places(128, 0.0), host, port, tls)

aiohttp decompresses bodies, joins folded header fields, queues pipelined requests and logs what it cannot parse before
it calls a handler.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import traceback
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from aiohttp import web

from rlrc.runtime.wire import http_head
from rlrc.runtime.wire.http_head import Head, Refusal
from rlrc.runtime.wire.ports import LARGEST, Places, RateLimit

Check = Callable[[Head], None]

MAX_UNANSWERED = 8  # pipelined requests of a connection; HTTP clients send one at a time
LINGER_S = 1.0  # a refused client's data are discarded for so long; closing at once could lose the response
MAX_LINGERING = 64  # connections; beyond that, the oldest is closed
HANDSHAKE_S = 5.0
BACKLOG = 256  # connections queued by the kernel; clients beyond them retry after a second
FAULTS, FAULT_S = 8, 10.0  # burst of log lines about errors in handlers, and seconds per further line

log = logging.getLogger(__name__)
_faults = RateLimit(FAULTS, FAULT_S)


class HttpConnection(web.RequestHandler):
    """``unknown_s``: limit until the first accepted request; ``idle_s``: limit until the next one."""

    __slots__ = ("_body", "_check", "_data", "_discarded", "_lingering", "_places", "_refused", "_timer", "_unanswered")

    def __init__(
        self,
        check: Check,
        places: Places,
        lingering: deque[HttpConnection],
        unknown_s: float,
        idle_s: float,
        server: web.Server,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]  # AppRunner passes None too; its annotation is too narrow
            keepalive_timeout=idle_s,
            lingering_time=LINGER_S,
            max_line_size=http_head.LARGEST,
            max_field_size=http_head.LARGEST,
            auto_decompress=False,
        )
        self._check, self._places, self._lingering = check, places, lingering
        self._timer = loop.call_later(unknown_s, self.force_close)
        self._data, self._body, self._unanswered = b"", 0, 0
        self._refused, self._discarded = False, 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if not self._places.take(self, self.force_close):
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._timer.cancel()
        self._places.free(self)
        if self in self._lingering:
            self._lingering.remove(self)
        super().connection_lost(exc)

    def keep_place(self) -> None:
        """The client has shown the token or was answered: its connection is not replaced by new ones."""
        self._places.mark_answered(self)

    def mark_answered(self) -> None:
        self._unanswered -= 1

    def data_received(self, data: bytes) -> None:
        if not data:  # aiohttp's own call, for data it held back
            return super().data_received(data)
        while data and not self._refused:
            if self._body:
                part, data = data[: self._body], data[self._body :]
                self._body -= len(part)
                super().data_received(part)
                continue
            data = data if self._data else data.lstrip(b"\r\n")  # some clients send these after a body
            start = max(0, len(self._data) - len(http_head.END) + 1)
            self._data += data
            end = self._data.find(http_head.END, start) + len(http_head.END)
            if end < len(http_head.END):
                if len(self._data) > http_head.LARGEST:
                    self._refuse(_too_large())
                elif self._data and not http_head.begins(self._data):
                    self._refuse(http_head.no_http())
                return
            head, data, self._data = self._data[:end], self._data[end:], b""
            try:
                self._body = self._check_head(head)
            except Refusal as error:
                return self._refuse(error)
            self._timer.cancel()
            self._unanswered += 1
            super().data_received(head)
        if self._refused:
            self._discarded += len(data)
            if self._discarded > LARGEST + http_head.LARGEST:
                self.force_close()

    def _check_head(self, data: bytes) -> int:
        """Returns the size of the body. Raises Refusal."""
        if len(data) > http_head.LARGEST:
            raise _too_large()
        if self._unanswered >= MAX_UNANSWERED:
            raise Refusal(503, f"expected up to {MAX_UNANSWERED} pipelined requests, found more")
        head = http_head.parse(data)
        self._check(head)
        return head.length

    def _refuse(self, refusal: Refusal) -> None:
        self._refused, self._data = True, b""
        if self.transport is None:
            return
        if self._unanswered:  # this response would be out of order
            return self.close()
        self.transport.write(http_head.response(refusal.status, f"{refusal.text}\n"))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._timer.cancel()
        self._timer = self._loop.call_later(LINGER_S, self.force_close)
        self._places.free(self)  # for new connections
        self._lingering.append(self)
        if len(self._lingering) > MAX_LINGERING:
            self._lingering.popleft().force_close()

    # aiohttp's own log lines would quote the request, including its token.

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if status >= 500 and not isinstance(exc, ConnectionError):  # ConnectionError: the client disconnected
            self.log_exception(exc_info=exc)
        text = "internal server error; see the server's log" if status >= 500 else "expected HTTP"
        response = web.Response(status=status, text=f"{text}\n")
        response.force_close()
        return response

    def log_exception(self, *_: Any, exc_info: BaseException | None = None, **__: Any) -> None:
        """Log the error's type and place, without its text, at a limited rate."""
        if exc_info is not None and _faults.spend():
            frames = traceback.extract_tb(exc_info.__traceback__)
            where = f" in {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
            log.error("internal server error: %s%s", type(exc_info).__name__, where)


async def listen(
    runner: web.AppRunner,
    check: Check,
    places: Places,
    host: str,
    port: int,
    tls: ssl.SSLContext | None,
    unknown_s: float,
    idle_s: float,
) -> asyncio.Server:
    """Raises OSError if the port is taken."""
    await runner.setup()
    assert runner.server is not None
    loop = asyncio.get_running_loop()
    connection = partial(HttpConnection, check, places, deque[HttpConnection](), unknown_s, idle_s, runner.server, loop)
    handshake = None if tls is None else HANDSHAKE_S
    return await loop.create_server(connection, host, port, backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=handshake)


@web.middleware
async def count_answers(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Count a connection's unanswered requests. Has to be the application's first middleware."""
    try:
        return await handler(request)
    finally:
        protocol = request.protocol
        if isinstance(protocol, HttpConnection):
            protocol.mark_answered()


def _too_large() -> Refusal:
    return Refusal(431, f"expected a head of up to {http_head.LARGEST} bytes, found more")
