"""The HTTP server of the page's process: the page, server-sent events, images, and operators' requests.

    GET /                the page; its files need no token. Everything else does:
    GET /events          "hello" (the metadata), then "news" ten times a second: steps, state, events
    GET /camera/0        the newest image as JPEG; ?after=7 waits for a newer one than number 7
    GET, POST /stop      {"stopped", "reason"}; POST stops. The second path of a stop: the first is a port and a process
                         of its own (rlrc.runtime.control.stop_port), which the page uses as well
    POST /rearm          {"reason"}: re-arms, or 409 {"error": why not}
    POST /instruction    {"text"}; null: the robot's or the client's own instruction
    POST /bench          {"calls", "p50_ms", "p99_ms", "max_ms"} of inference, or 409

The token is sent in the header Authorization: Bearer TOKEN. Other sites cannot send it: not by forms or images, nor by
DNS rebinding.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgpack
from aiohttp import web
from PIL import Image

from rlrc.errors import UserError
from rlrc.printable import printable
from rlrc.runtime.board.monitor import Board
from rlrc.runtime.page.feed import Address, FeedEnds
from rlrc.runtime.page.loop_mirror import LoopMirror
from rlrc.runtime.wire import http_head, logs
from rlrc.runtime.wire.gate import HttpConnection, count_answers, listen
from rlrc.runtime.wire.http_head import Head, Refusal
from rlrc.runtime.wire.ports import Access, Places

STATIC = Path(__file__).parent / "static"
FILES = {"/": "page.html"} | {f"/{name}": name for name in ("page.css", "page.js", "chart.js", "icon.svg")}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'{stop}; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
NEWS_S, WRITE_S = 0.1, 5.0  # interval of news, and limit for a browser to read them
VIEWERS = 16
FIRST_REQUEST_S, IDLE_S = 10.0, 75.0  # limits until a connection's first request, and until the next one
CONNECTIONS = 64 + 6 * VIEWERS  # a connection that has not shown the token may be replaced by a new one
BODY, BODY_S = 4096, 5.0  # limits of a body: bytes, and seconds to send them
BOARD_S = 1.0
CURSOR = re.compile("[0-9]{1,15}")
MAX_TEXT = 500  # characters of an instruction or a reason
ANSWER_S = 60.0
QUALITY = 80

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Belongs to one event loop. Every browser gets ``metadata`` unchanged; ``board`` gives a Jetson's readings."""

    def __init__(self, ends: FeedEnds, metadata: dict[str, Any], token: str, board: Board | None = None) -> None:
        self.mirror, self.metadata, self._access = LoopMirror(ends), metadata, Access(token)
        self._cameras, self._viewers = len(ends.cameras), 0
        self._board, self._read, self._figures = board, -BOARD_S, dict[str, Any]()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=BODY, middlewares=[count_answers, _keep_place])
        for path in FILES:
            app.router.add_get(path, _file)
        app.router.add_get("/events", self._events)
        app.router.add_get("/camera/{index:[0-9]{1,2}}", self._camera)
        app.router.add_get("/stop", self._get_stop)
        for path in ("stop", "rearm", "instruction", "bench"):
            app.router.add_post(f"/{path}", self._request)
        app.on_response_prepare.append(self._prepare)
        return app

    def check(self, head: Head) -> None:
        """Raises Refusal for requests without the token, except for the page's files, and for bodies too large."""
        if not (is_file(head.method, head.path) or self._access.allows(head.get("authorization"))):
            raise Refusal(401, "expected the header Authorization: Bearer TOKEN")
        if head.length > (BODY if head.method == "POST" else 0):
            raise Refusal(413, f"expected a body of up to {BODY} bytes in a POST, found {head.length} bytes")

    def figures(self) -> dict[str, Any]:
        """The board's readings, updated once a second; empty on a machine that is no Jetson."""
        now = time.monotonic()
        if self._board is not None and self._board.exists and now - self._read >= BOARD_S:
            reading, self._read = self._board.latest(), now
            if reading is not None:
                self._figures = {
                    "watts": reading.watts,
                    "celsius": reading.hottest,
                    "gpu_load": reading.gpu_load,
                    "memory": [reading.memory_used, reading.memory_total],
                    "throttled": list(reading.throttled),
                }
        return self._figures

    async def _prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(HEADERS)
        response.headers["Content-Security-Policy"] = POLICY.format(stop=self._stop_source(request))
        response.headers.pop("Server", None)

    def _stop_source(self, request: web.Request) -> str:
        """The stop's port as a source to connect to, on the host name that the browser used."""
        port, host = self.metadata.get("stop"), http_head.host(request.headers.get("Host", ""))
        if port is None or host is None:
            return ""
        return f" {request.scheme}://{'*' if host.startswith('[') else host}:{port}"  # policies have no IPv6 addresses

    @contextmanager
    def _viewing(self) -> Iterator[None]:
        self._viewers += 1
        try:
            yield
        finally:
            self._viewers -= 1

    async def _events(self, request: web.Request) -> web.StreamResponse:
        if self._viewers >= VIEWERS:
            return web.json_response({"error": f"expected at most {VIEWERS} pages, found more"}, status=503)
        response, mirror = web.StreamResponse(headers={"Content-Type": "text/event-stream"}), self.mirror
        with self._viewing():
            await response.prepare(request)
            sent = {
                "steps": mirror.counted["steps"] - len(mirror.steps),
                "events": mirror.counted["events"] - len(mirror.events),
            }
            kind, message = "hello", {**self.metadata, "steps": [], "events": []}
            while not mirror.ended.is_set():
                message["state"] = {**mirror.state, "silent_s": round(time.monotonic() - mirror.heard, 2)}
                message["board"] = self.figures()
                for name, kept in (("steps", mirror.steps), ("events", mirror.events)):
                    new = min(mirror.counted[name] - sent[name], len(kept))
                    message[name] = [kept[i] for i in range(len(kept) - new, len(kept))]
                    sent[name] = mirror.counted[name]
                text = f"event: {kind}\ndata: {json.dumps(message, separators=(',', ':'))}\n\n"
                try:
                    await asyncio.wait_for(response.write(text.encode()), WRITE_S)
                except (OSError, asyncio.TimeoutError):
                    break
                kind, message = "news", {}
                await asyncio.sleep(NEWS_S)
        return response

    async def _camera(self, request: web.Request) -> web.Response:
        camera, after = int(request.match_info["index"]), request.query.get("after", "0")
        if camera >= self._cameras or not CURSOR.fullmatch(after):
            return web.json_response({"error": "expected the numbers of a camera and of a picture"}, status=404)
        picture = await self.mirror.picture(camera, int(after))
        if picture is None:
            return web.Response(status=204)
        if picture.jpeg is None:
            picture.jpeg = _encode_jpeg(picture.pixels)
        return web.Response(body=picture.jpeg, content_type="image/jpeg", headers={"X-Number": str(picture.number)})

    async def _get_stop(self, request: web.Request) -> web.Response:
        reason = self.mirror.state.get("stopped")
        return web.json_response({"stopped": reason is not None, "reason": reason or ""})

    async def _request(self, request: web.Request) -> web.Response:
        """Pass the request to the loop and return its reply."""
        message: dict[str, Any] = {"do": request.path[1:]}
        if message["do"] in ("rearm", "instruction"):
            try:
                body = await asyncio.wait_for(request.read(), BODY_S)
                message["words"] = read_text(body, "text" if message["do"] == "instruction" else "reason")
            except UserError as error:
                return web.json_response({"error": str(error)}, status=400)
            except asyncio.TimeoutError:
                return web.json_response({"error": f"expected the body within {BODY_S:g} s"}, status=408)
        try:
            reply = await self.mirror.request(message, ANSWER_S)
        except (OSError, asyncio.TimeoutError):
            return web.json_response({"error": "expected a reply of the loop, found none"}, status=503)
        return web.json_response(reply, status=409 if "error" in reply else 200)


async def _file(request: web.Request) -> web.Response:
    path = STATIC / FILES[request.path]
    return web.Response(body=path.read_bytes(), content_type=TYPES[path.suffix], charset="utf-8")


def is_file(method: str, path: str) -> bool:
    return method == "GET" and path in FILES


def read_text(body: bytes, key: str) -> str | None:
    """The text of {"KEY": "some words"} in one line, without control characters. Raises UserError."""
    expected = f'expected {{"{key}": TEXT}} in JSON, with up to {MAX_TEXT} characters or null'
    try:
        text = json.loads(body)[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{expected}, found none; send it") from None
    if text is None:
        return None
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        raise UserError(f"{expected}, found another value; correct it")
    return printable(" ".join(text.split()))


@web.middleware
async def _keep_place(request: web.Request, handler: Handler) -> web.StreamResponse:
    """``Server.check`` has passed, so a request for anything but the page's files has shown the token."""
    if not is_file(request.method, request.path) and isinstance(request.protocol, HttpConnection):
        request.protocol.keep_place()
    return await handler(request)


def _encode_jpeg(picture: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def serve(ends: FeedEnds, metadata: dict[str, Any], address: Address, token: str) -> None:
    """Serve until the loop's process closes its end."""
    asyncio.run(_serve(ends, metadata, address, token))


async def _serve(ends: FeedEnds, metadata: dict[str, Any], address: Address, token: str) -> None:
    logs.configure("text")  # for errors, and to limit what libraries log
    ends.socket.setblocking(False)
    with Board.monitor() as board:
        await _run(Server(ends, metadata, token, board), ends, address)


async def _run(server: Server, ends: FeedEnds, address: Address) -> None:
    runner = web.AppRunner(server.app(), handle_signals=False, shutdown_timeout=0.5)
    places, tls = Places(CONNECTIONS, 0.0), _load_tls(address)
    try:
        listening = await listen(runner, server.check, places, address.host, address.port, tls, FIRST_REQUEST_S, IDLE_S)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror  # asyncio's is longer
        ends.socket.send(msgpack.packb({"error": why}))
        return
    ends.socket.send(msgpack.packb({"port": listening.sockets[0].getsockname()[1]}))
    asyncio.get_running_loop().add_reader(ends.socket.fileno(), server.mirror.receive)
    tracking = asyncio.ensure_future(server.mirror.track_viewers())
    await server.mirror.ended.wait()
    tracking.cancel()
    listening.close()
    await runner.cleanup()


def _load_tls(address: Address) -> ssl.SSLContext | None:
    if address.certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(address.certificate, address.key)
    return context
