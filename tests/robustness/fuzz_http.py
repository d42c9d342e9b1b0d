"""The HTTP ports that can stop a robot, in one process, as targets "stop" and "page" of fuzz.py.

A message is everything that a connection sends. Findings are a stop without the token, and an error that is not one
line of the form "expected ..., found ...".
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections import deque
from typing import Any

from aiohttp import web

from rlrc.runtime.control.stop_listener import PRESS, Listener
from rlrc.runtime.page.feed import Feed
from rlrc.runtime.page.server import CONNECTIONS, FIRST_REQUEST_S, NEWS_S, Server
from rlrc.runtime.wire.gate import HttpConnection
from rlrc.runtime.wire.ports import Places

TOKEN = "t0k"
STATE = {"stopped": True, "reason": "HTTP"}
TURNS = 30  # of the event loop, enough for every answer that does not wait
METADATA: dict[str, Any] = {"stop": 1, "kind": "run"}


class StopTarget:
    """The Listener of rlrc.runtime.control.stop_listener; this class acts as the client and as the control loop."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._wire, self._listener_wire = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._wire.setblocking(False)
        self._listener = Listener(self._listening, self._listener_wire, TOKEN, None, 8080)

    async def send(self, message: bytes) -> str | None:
        """Returns why the message was refused, or None. Raises AssertionError for a finding."""
        answer, pressed = b"", 0
        with socket.create_connection(self._listening.getsockname()) as connection:
            connection.setblocking(False)
            connection.sendall(message)
            for _ in range(6):
                assert self._listener.turn(0)
                pressed += self._answer()
                answer += receive(connection)
        assert self._listener.turn(0)
        assert not pressed or TOKEN.encode() in message
        return refusal(answer)

    def _answer(self) -> int:
        pressed = 0
        while request := receive(self._wire):
            pressed += request.startswith(PRESS)
            self._wire.send(json.dumps(STATE).encode())
        return pressed

    async def close(self) -> None:
        for one in (self._listening, self._wire, self._listener_wire):
            one.close()


class PageTarget:
    """rlrc.runtime.page.server behind its gate, with a control loop that accepts every request."""

    def __init__(self, server: Server, feed: Feed, runner: web.AppRunner) -> None:
        self._server, self._feed, self._runner, self._places = server, feed, runner, Places(CONNECTIONS, 0.0)
        loop = asyncio.get_running_loop()
        loop.add_reader(feed.fileno(), self._answer_requests)
        loop.add_reader(server.mirror.reader.socket.fileno(), server.mirror.receive)

    @staticmethod
    async def open() -> PageTarget:
        feed = Feed(("front",))
        feed.ends.socket.setblocking(False)
        server = Server(feed.ends, METADATA, TOKEN)
        runner = web.AppRunner(server.app(), handle_signals=False, shutdown_timeout=0.1)
        await runner.setup()
        return PageTarget(server, feed, runner)

    async def send(self, message: bytes) -> str | None:
        """Returns why the message was refused, or None. Raises AssertionError for a finding."""
        wire, loop, server = Wire(), asyncio.get_running_loop(), self._runner.server
        assert server is not None
        connection = HttpConnection(
            self._server.check, self._places, deque(), FIRST_REQUEST_S, FIRST_REQUEST_S, server, loop
        )
        connection.connection_made(wire)
        for start in range(0, len(message), 1000):
            if not wire.is_closing():
                connection.data_received(message[start : start + 1000])
        for _ in range(TURNS):
            await asyncio.sleep(0)
        connection.connection_lost(None)
        await asyncio.sleep(0)
        return refusal(wire.written)

    async def close(self) -> None:
        self._server.mirror.ended.set()
        await asyncio.sleep(2 * NEWS_S)  # until connected pages have closed
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._feed.fileno())
        loop.remove_reader(self._server.mirror.reader.socket.fileno())
        await self._runner.cleanup()
        self._feed.close()
        self._server.mirror.reader.socket.close()

    def _answer_requests(self) -> None:
        for request in self._feed.receive() or ():
            assert "words" not in request or request["words"] is None or request["words"].isprintable()
            self._feed.send({"id": request["id"], "answer": {}})


class Wire(asyncio.Transport):
    """A transport that keeps what the server writes."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self._closed = b"", False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self._closed

    def close(self) -> None:
        self._closed = True

    abort = close

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


def receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(2**16)
    except (BlockingIOError, ConnectionError):
        return b""


def refusal(answer: bytes) -> str | None:
    """Why the first request was refused, or None if it was answered."""
    if not answer:
        return "expected a whole request, found a part"
    head, _, body = answer.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.[01] (\d{3}) ", head)
    assert status is not None, head
    assert int(status[1]) != 500, answer
    if int(status[1]) < 400:
        return None
    length = re.search(rb"(?i)content-length: (\d+)", head)
    assert length is not None, head
    text = body[: int(length[1])].decode()
    if text.startswith("{"):
        text = json.loads(text)["error"]
    elif int(status[1]) in (404, 405):  # from aiohttp
        return "expected another path or method"
    return text.strip()


def seeds(protocol: str) -> list[bytes]:
    """Valid requests for everything that the port answers. The first is a stop; the last two are refused."""

    def request(method: str, path: str, body: bytes = b"", *fields: str, token: str = TOKEN) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1:8080", f"Authorization: Bearer {token}", *fields]
        lines += [f"Content-Length: {len(body)}"] if body else []
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + body

    refused = [request("POST", "/stop", token="other"), request("POST", "/stop", b"x", "Content-Encoding: gzip")]
    origin = "Origin: http://127.0.0.1:8080"
    if protocol == "stop":
        preflight = request("OPTIONS", "/stop", b"", origin, "Access-Control-Request-Headers: authorization")
        return [request("POST", "/stop", b"{}", origin), request("GET", "/stop") * 2, preflight, *refused]
    fields = [("/rearm", "reason", "all clear"), ("/instruction", "text", "close it"), ("/instruction", "text", None)]
    return [
        request("POST", "/stop", b"{}"),
        *(request("GET", path) for path in ("/stop", "/page.js", "/events")),
        *(request("POST", path, json.dumps({key: text}).encode()) for path, key, text in fields),
        request("POST", "/bench", b"{}"),
        *refused,
    ]
