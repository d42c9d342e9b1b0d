"""What the page's process answers: the page itself, what is new as server-sent events, pictures, and operators' wishes.

    GET /                the page; its files have no secrets and need no token. All that follows needs it:
    GET /events          hello (what does not change), then news ten times a second: steps, state, events
    GET /camera/0        the newest picture as JPEG; ?after=7 waits for one newer than that
    GET, POST /stop      {"stopped", "reason"}; POST stops. The second way: the first is a port and a process of its own
                         (rlrc.runtime.control.stop_port), which the page uses as well
    POST /rearm          {"reason"}: goes on, or 409 {"error": why not}
    POST /instruction    {"text"}; null: the robot's or the client's own words again
    POST /bench          {"calls", "p50_ms", "p99_ms", "max_ms"} of inference, or 409

The token is a header (Authorization: Bearer TOKEN), which no page of somebody else's can send: neither a form nor an
image of another site gets in, nor a name that was made to point here.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import msgpack
from aiohttp import web
from PIL import Image

from rlrc.errors import UserError
from rlrc.printable import printable
from rlrc.runtime.board.monitor import Board
from rlrc.runtime.page.feed import Address, Ends, Mirror
from rlrc.runtime.wire import http_head, logs
from rlrc.runtime.wire.gate import HttpConnection, answering, listen
from rlrc.runtime.wire.http_head import Head, Refusal
from rlrc.runtime.wire.packets import receive
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
STEPS = 6000  # that a browser gets when it comes: half a minute at 200 Hz
EVENTS = 200
NEWS_S, WRITTEN_S = 0.1, 5.0  # how often there is news, and how long a browser may take to read it
PICTURE_S = 2.0  # longest wait for a newer picture
LOOKED_S = PICTURE_S + 2.0  # after its last request for one, which may have waited so long, nobody looks
VIEWERS = 16
ASKED_S, IDLE_S = 10.0, 75.0  # longest until a connection's first request, and until the next one
CONNECTIONS = 64 + 6 * VIEWERS  # one that has not shown the token makes room for a new one
BODY, BODY_S = 4096, 5.0  # bytes, and seconds that a client may take to send them
BOARD_S = 1.0
CURSOR = re.compile("[0-9]{1,15}")
WORDS = 500  # characters of an instruction, or of a reason
ANSWERED_S = 60.0
QUALITY = 80

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Of one event loop. ``hello`` is sent to every browser as it is; ``board`` is what a Jetson tells of itself."""

    def __init__(self, ends: Ends, hello: dict[str, Any], token: str, board: Board | None = None) -> None:
        self.mirror, self.hello, self._access = Mirror(ends), hello, Access(token)
        self._board, self._read, self._figures = board, -BOARD_S, dict[str, Any]()
        self.steps: deque[Any] = deque(maxlen=STEPS)
        self.events: deque[Any] = deque(maxlen=EVENTS)
        self.counted = {"steps": 0, "events": 0}  # all there have been
        self.state: dict[str, Any] = {}
        self.heard = time.monotonic()
        self.ended = asyncio.Event()
        self._pictures: dict[int, tuple[int, Any, bytes | None]] = {}  # count, picture, as JPEG once one is wanted
        self._newer = asyncio.Condition()
        self._looked, self._viewers = 0.0, 0
        self._numbers, self._asked = count(), dict[int, asyncio.Future[dict[str, Any]]]()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=BODY, middlewares=[answering, _known])
        for path in FILES:
            app.router.add_get(path, _file)
        app.router.add_get("/events", self._events)
        app.router.add_get("/camera/{index:[0-9]{1,2}}", self._camera)
        app.router.add_get("/stop", self._told)
        for path in ("stop", "rearm", "instruction", "bench"):
            app.router.add_post(f"/{path}", self._wish)
        app.on_response_prepare.append(self._prepare)
        return app

    def check(self, head: Head) -> None:
        """Raises Refusal for a request without the token, but for the page's files, and for one that is too large."""
        if not (is_file(head.method, head.path) or self._access.allows(head.get("authorization"))):
            raise Refusal(401, "expected the header Authorization: Bearer TOKEN")
        if head.length > (BODY if head.method == "POST" else 0):
            raise Refusal(413, f"expected a body of up to {BODY} bytes in a POST, found {head.length} bytes")

    async def _prepare(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(HEADERS)
        response.headers["Content-Security-Policy"] = POLICY.format(stop=self._stop_source(request))
        response.headers.pop("Server", None)

    def _stop_source(self, request: web.Request) -> str:
        """The stop's own port, where the page may send a stop: on the host that the browser knows this one by."""
        port, host = self.hello.get("stop"), http_head.host(request.headers.get("Host", ""))
        if port is None or host is None:
            return ""
        return f" {request.scheme}://{'*' if host.startswith('[') else host}:{port}"  # a policy knows no IPv6 addresses

    # From the loop

    def listen(self) -> None:
        """All that has come. Its end is ours."""
        while message := receive(self.mirror.socket):
            self._take(msgpack.unpackb(message))
        if message is not None:
            asyncio.get_running_loop().remove_reader(self.mirror.socket.fileno())
            self.ended.set()

    def _take(self, message: dict[str, Any]) -> None:
        self.heard = time.monotonic()
        if "picture" in message:
            place = message["picture"]
            number = self._pictures[place][0] + 1 if place in self._pictures else 1
            self._pictures[place] = number, self.mirror.picture(message["slot"], message["shape"]), None
            asyncio.ensure_future(self._wake())  # noqa: RUF006  it ends at once
        if "step" in message:
            self.steps.append(message["step"])
            self.counted["steps"] += 1
        for event in message.get("events", ()):
            self.events.append(event)
            self.counted["events"] += 1
        self.state.update(message.get("state", {}))
        if (waiting := self._asked.pop(message.get("id", -1), None)) is not None and not waiting.done():
            waiting.set_result(message["answer"])

    async def _wake(self) -> None:
        async with self._newer:
            self._newer.notify_all()

    async def watch(self) -> None:
        """For ever: pictures are only copied for those who look."""
        while True:
            self.mirror.watch(time.monotonic() - self._looked < LOOKED_S)
            await asyncio.sleep(0.2)

    # To the browsers

    def figures(self) -> dict[str, Any]:
        """Of the board, read once a second; nothing on a machine that is no Jetson."""
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
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        with self._viewing():
            await response.prepare(request)
            seen = {
                "steps": self.counted["steps"] - len(self.steps),
                "events": self.counted["events"] - len(self.events),
            }
            kind, told = "hello", {**self.hello, "steps": [], "events": []}
            while not self.ended.is_set():
                told["state"] = {**self.state, "silent_s": round(time.monotonic() - self.heard, 2)}
                told["board"] = self.figures()
                for name, kept in (("steps", self.steps), ("events", self.events)):
                    new = min(self.counted[name] - seen[name], len(kept))
                    told[name] = [kept[i] for i in range(len(kept) - new, len(kept))]
                    seen[name] = self.counted[name]
                text = f"event: {kind}\ndata: {json.dumps(told, separators=(',', ':'))}\n\n"
                try:
                    await asyncio.wait_for(response.write(text.encode()), WRITTEN_S)
                except (OSError, asyncio.TimeoutError):
                    break
                kind, told = "news", {}
                await asyncio.sleep(NEWS_S)
        return response

    async def _camera(self, request: web.Request) -> web.Response:
        place, after = int(request.match_info["index"]), request.query.get("after", "0")
        if place >= len(self.mirror.cameras) or not CURSOR.fullmatch(after):
            return web.json_response({"error": "expected the numbers of a camera and of a picture"}, status=404)
        self._looked = time.monotonic()
        self.mirror.watch(True)
        async with self._newer:
            try:
                await asyncio.wait_for(self._newer.wait_for(lambda: self._number(place) > int(after)), PICTURE_S)
            except asyncio.TimeoutError:
                return web.Response(status=204)
        number, picture, encoded = self._pictures[place]
        if encoded is None:
            encoded = _jpeg(picture)
            self._pictures[place] = number, picture, encoded
        return web.Response(body=encoded, content_type="image/jpeg", headers={"X-Number": str(number)})

    def _number(self, place: int) -> int:
        return self._pictures[place][0] if place in self._pictures else 0

    async def _told(self, request: web.Request) -> web.Response:
        reason = self.state.get("stopped")
        return web.json_response({"stopped": reason is not None, "reason": reason or ""})

    async def _wish(self, request: web.Request) -> web.Response:
        """To the loop, and its answer back."""
        wish: dict[str, Any] = {"do": request.path[1:], "id": next(self._numbers)}
        if wish["do"] in ("rearm", "instruction"):
            try:
                body = await asyncio.wait_for(request.read(), BODY_S)
                wish["words"] = words(body, "text" if wish["do"] == "instruction" else "reason")
            except UserError as error:
                return web.json_response({"error": str(error)}, status=400)
            except asyncio.TimeoutError:
                return web.json_response({"error": f"expected the body within {BODY_S:g} s"}, status=408)
        waiting = self._asked[wish["id"]] = asyncio.get_running_loop().create_future()
        try:
            self.mirror.socket.send(msgpack.packb(wish))
            answer = await asyncio.wait_for(waiting, ANSWERED_S)
        except (OSError, asyncio.TimeoutError):
            return web.json_response({"error": "expected an answer of the loop, found none"}, status=503)
        finally:
            self._asked.pop(wish["id"], None)
        return web.json_response(answer, status=409 if "error" in answer else 200)


async def _file(request: web.Request) -> web.Response:
    path = STATIC / FILES[request.path]
    return web.Response(body=path.read_bytes(), content_type=TYPES[path.suffix], charset="utf-8")


def is_file(method: str, path: str) -> bool:
    return method == "GET" and path in FILES


def words(body: bytes, key: str) -> str | None:
    """``{"KEY": "some words"}`` -> those words in one line, without control characters. Raises UserError."""
    expected = f'expected {{"{key}": TEXT}} in JSON, with up to {WORDS} characters or null'
    try:
        text = json.loads(body)[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{expected}, found no such text; send one") from None
    if text is None:
        return None
    if not isinstance(text, str) or len(text) > WORDS:
        raise UserError(f"{expected}, found another value; send such a text")
    return printable(" ".join(text.split()))


@web.middleware
async def _known(request: web.Request, handler: Handler) -> web.StreamResponse:
    """``Server.check`` has let it through: a request for more than the page's files has shown the token."""
    if not is_file(request.method, request.path) and isinstance(request.protocol, HttpConnection):
        request.protocol.keep_place()
    return await handler(request)


def _jpeg(picture: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def serve(ends: Ends, hello: dict[str, Any], address: Address, token: str) -> None:
    """Until the other end is closed."""
    asyncio.run(_serve(ends, hello, address, token))


async def _serve(ends: Ends, hello: dict[str, Any], address: Address, token: str) -> None:
    logs.begin("text")  # of faults only, and so that no library's line is written as it comes
    ends.socket.setblocking(False)
    with Board.monitor() as board:
        await _answer(Server(ends, hello, token, board), ends, address)


async def _answer(server: Server, ends: Ends, address: Address) -> None:
    runner = web.AppRunner(server.app(), handle_signals=False, shutdown_timeout=0.5)
    places, tls = Places(CONNECTIONS, 0.0), _tls(address)
    try:
        listening = await listen(runner, server.check, places, address.host, address.port, tls, ASKED_S, IDLE_S)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror  # asyncio's is longer
        ends.socket.send(msgpack.packb({"error": why}))
        return
    ends.socket.send(msgpack.packb({"port": listening.sockets[0].getsockname()[1]}))
    asyncio.get_running_loop().add_reader(ends.socket.fileno(), server.listen)
    watching = asyncio.ensure_future(server.watch())
    await server.ended.wait()
    watching.cancel()
    listening.close()
    await runner.cleanup()


def _tls(address: Address) -> ssl.SSLContext | None:
    if address.certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(address.certificate, address.key)
    return context
