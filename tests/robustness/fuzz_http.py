"""The ports that stop a robot, opened in one process for fuzz.py's targets "stop" and "page".

A message is all that a connection sends. An answer of 200 to a stop without the token is a finding, and so is whatever
a client could not read as one line: "expected ..., found ...".
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
TURNS = 30  # of an event loop, in which every answer that needs no time has come
HELLO: dict[str, Any] = {"stop": 1, "kind": "run"}


class StopTarget:
    """rlrc.runtime.control.stop_listener's Listener on a port; this is both the client and the process that stops."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._wire, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._wire.setblocking(False)
        self._listener = Listener(self._listening, self._theirs, TOKEN, None, 8080)

    async def give(self, message: bytes) -> str | None:
        """Raises AssertionError where the listener did what it should not."""
        found, pressed = b"", 0
        with socket.create_connection(self._listening.getsockname()) as connection:
            connection.setblocking(False)
            connection.sendall(message)
            for _ in range(6):
                assert self._listener.turn(0)
                pressed += self._answer()
                found += received(connection)
        assert self._listener.turn(0)
        assert not pressed or TOKEN.encode() in message
        return refusal(found)

    def _answer(self) -> int:
        pressed = 0
        while asked := received(self._wire):
            pressed += asked.startswith(PRESS)
            self._wire.send(json.dumps(STATE).encode())
        return pressed

    async def close(self) -> None:
        for one in (self._listening, self._wire, self._theirs):
            one.close()


class PageTarget:
    """rlrc.runtime.page.server behind its gate; the loop that it talks to says yes to everything."""

    def __init__(self, server: Server, feed: Feed, runner: web.AppRunner) -> None:
        self._server, self._feed, self._runner, self._places = server, feed, runner, Places(CONNECTIONS, 0.0)
        loop = asyncio.get_running_loop()
        loop.add_reader(feed.fileno(), self._wished)
        loop.add_reader(server.mirror.reader.socket.fileno(), server.mirror.receive)

    @staticmethod
    async def open() -> PageTarget:
        feed = Feed(("front",))
        feed.ends.socket.setblocking(False)
        server = Server(feed.ends, HELLO, TOKEN)
        runner = web.AppRunner(server.app(), handle_signals=False, shutdown_timeout=0.1)
        await runner.setup()
        return PageTarget(server, feed, runner)

    async def give(self, message: bytes) -> str | None:
        """Raises AssertionError where the page did what it should not."""
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
        await asyncio.sleep(2 * NEWS_S)  # the pages that are connected end
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._feed.fileno())
        loop.remove_reader(self._server.mirror.reader.socket.fileno())
        await self._runner.cleanup()
        self._feed.close()
        self._server.mirror.reader.socket.close()

    def _wished(self) -> None:
        for wish in self._feed.receive() or ():
            assert "words" not in wish or wish["words"] is None or wish["words"].isprintable()
            self._feed.send({"id": wish["id"], "answer": {}})


class Wire(asyncio.Transport):
    """What a connection writes."""

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


def received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(2**16)
    except (BlockingIOError, ConnectionError):
        return b""


def refusal(found: bytes) -> str | None:
    """Why the first request was refused; None: it was answered."""
    if not found:
        return "expected a whole request, found a part"
    head, _, body = found.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.[01] (\d{3}) ", head)
    assert status is not None, head
    assert int(status[1]) != 500, found
    if int(status[1]) < 400:
        return None
    length = re.search(rb"(?i)content-length: (\d+)", head)
    assert length is not None, head
    text = body[: int(length[1])].decode()
    if text.startswith("{"):
        text = json.loads(text)["error"]
    elif int(status[1]) in (404, 405):  # aiohttp's own
        return "expected another path or method"
    return text.strip()


def seeds(protocol: str) -> list[bytes]:
    """Those of the page are for all that it answers; the first is a stop, the last two are refused."""

    def request(method: str, path: str, body: bytes = b"", *fields: str, token: str = TOKEN) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1:8080", f"Authorization: Bearer {token}", *fields]
        lines += [f"Content-Length: {len(body)}"] if body else []
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + body

    refused = [request("POST", "/stop", token="other"), request("POST", "/stop", b"x", "Content-Encoding: gzip")]
    own = "Origin: http://127.0.0.1:8080"
    if protocol == "stop":
        preflight = request("OPTIONS", "/stop", b"", own, "Access-Control-Request-Headers: authorization")
        return [request("POST", "/stop", b"{}", own), request("GET", "/stop") * 2, preflight, *refused]
    wishes = [("/rearm", "reason", "all clear"), ("/instruction", "text", "close it"), ("/instruction", "text", None)]
    bodies = [(path, json.dumps({key: words}).encode()) for path, key, words in wishes]
    found = [
        request("POST", "/stop", b"{}"),
        request("GET", "/stop"),
        request("GET", "/page.js"),
        request("GET", "/events"),
    ]
    return [*found, *(request("POST", path, body) for path, body in bodies), request("POST", "/bench", b"{}"), *refused]
