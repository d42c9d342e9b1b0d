"""The process that answers POST /stop, and nothing else.

It shares no event loop, engine or library with other requests, so they cannot delay it: one thread, non-blocking
sockets, heads parsed by rlrc.runtime.wire.http_head. rlrc.runtime.control.stop_port starts it and reads its messages.

    POST /stop       {"stopped", "reason"}, once the other process has latched the stop; the body is ignored
    GET /stop        the same, without stopping
    OPTIONS /stop    for browsers (CORS): the operator's page, which is on another port, may do both

All but OPTIONS need ``Authorization: Bearer TOKEN``. A connection that has not shown the token yet is limited to one
head, ``UNKNOWN_S`` seconds and ``UNKNOWN`` places. If all are taken, the oldest connection of the address with the most
connections is closed. A connection that has shown the token is served first and keeps its place, so a page that
stays connected does not compete with other clients.
"""

from __future__ import annotations

import json
import selectors
import signal
import socket
import ssl
from collections import Counter, deque
from contextlib import suppress
from time import monotonic
from typing import Any

from rlrc.runtime.wire import http_head
from rlrc.runtime.wire.http_head import Head, Refusal
from rlrc.runtime.wire.packets import LARGEST, receive

UNKNOWN, UNKNOWN_S = 128, 5.0  # connections without the token, and seconds in which they must show it
KNOWN, KNOWN_S = 64, 60.0  # connections with it, and seconds until an idle one is closed
HEAD = 2**13  # bytes; browsers send no cookies here
BODY = 4096  # bytes that are skipped; after a request with a larger body the connection is closed
ACCEPTED = 32  # connections accepted in one turn: each is read before others can displace it
TURN_S = 0.01  # time in one turn for connections without the token: a TLS handshake may take milliseconds
ANSWERED_S = 2.0
LINGER_S, DISCARDED = 1.0, 2**16  # seconds and bytes that a refused client may still send, so that it sees the answer
ALIVE_S = 0.25  # how often deadlines are checked

PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "authorization",
    "Access-Control-Max-Age": "7200",
}
READY = "ready"
PRESS, STATE = b"press ", b"state"  # PRESS is followed by the source of the stop, for the reason


class Caller:
    """A connection."""

    def __init__(self, connection: socket.socket, host: str, now: float) -> None:
        self.socket, self.host = connection, host
        self.deadline = now + UNKNOWN_S
        self.data = b""
        self.skip = 0  # bytes of a body that are still to come
        self.known = self.ending = self.closed = False
        self.waiting: object | None = None  # identifies the question that is not answered yet
        self.shaking = isinstance(connection, ssl.SSLSocket)
        self.persistent = True
        self.cors: dict[str, str] = {}


class Listener:
    """``wire``: a SOCK_SEQPACKET to the controlling process. ``page``: the port of the operator's page."""

    def __init__(
        self, listening: socket.socket, wire: socket.socket, token: str, tls: ssl.SSLContext | None, page: int | None
    ) -> None:
        self._listening, self._wire, self._tls, self._page = listening, wire, tls, page
        self._token = token
        self._callers: dict[Caller, None] = {}  # oldest first
        self._asked: deque[tuple[Caller, object, float]] = deque()  # the wire's answers come in this order
        self._selector = selectors.DefaultSelector()
        for one in (listening, wire):
            one.setblocking(False)
            self._selector.register(one, selectors.EVENT_READ)

    def run(self) -> None:
        """Until the other process closes the wire."""
        while self.turn(ALIVE_S if self._callers else None):
            pass

    def turn(self, seconds: float | None) -> bool:
        """Handles what arrives within ``seconds``; -> whether the other process goes on."""
        ready = [key for key, _ in self._selector.select(seconds)]
        if any(key.fileobj is self._wire for key in ready) and not self._read_answers():
            return False
        callers: list[Caller] = [key.data for key in ready if key.data is not None]
        for caller in callers:
            if caller.known:
                self._serve(caller)
        until = monotonic() + TURN_S
        for caller in reversed(callers):  # under a flood the oldest ones are about to be dropped
            if not caller.known and monotonic() < until:
                self._serve(caller)
        if any(key.fileobj is self._listening for key in ready):
            self._accept()
        self._expire()
        return True

    # Connections

    def _accept(self) -> None:
        for _ in range(ACCEPTED):
            try:
                connection, address = self._listening.accept()
            except OSError:  # no more, or one that is closed already
                return
            try:
                connection.setblocking(False)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._tls is not None:
                    connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
            except OSError:
                connection.close()
                continue
            unknown = [caller for caller in self._callers if not caller.known]
            if len(unknown) >= UNKNOWN:
                most = Counter(caller.host for caller in unknown).most_common(1)[0][0]
                self._drop(next(caller for caller in unknown if caller.host == most))
            caller = Caller(connection, address[0], monotonic())
            self._callers[caller] = None
            self._selector.register(connection, selectors.EVENT_READ, caller)

    def _drop(self, caller: Caller) -> None:
        if not caller.closed:
            caller.closed = True
            self._selector.unregister(caller.socket)
            caller.socket.close()
            del self._callers[caller]

    def _expire(self) -> None:
        now = monotonic()
        for caller in [one for one in self._callers if now > one.deadline]:
            self._drop(caller)
        known = [caller for caller in self._callers if caller.known]
        for caller in sorted(known, key=lambda one: one.deadline)[: max(0, len(known) - KNOWN)]:
            self._drop(caller)
        for caller, mark, deadline in list(self._asked):  # they stay in the queue: their answers may still arrive
            if now > deadline and caller.waiting is mark:
                error = "expected an answer from the controlling process, found none; the stop was passed on"
                self._reply(caller, 503, {"error": error})

    def _serve(self, caller: Caller) -> None:
        """Reads what a connection has sent."""
        if caller.closed:
            return
        try:
            if caller.shaking:
                assert isinstance(caller.socket, ssl.SSLSocket)
                caller.socket.do_handshake()
                caller.shaking = False
                self._selector.modify(caller.socket, selectors.EVENT_READ, caller)
            data = caller.socket.recv(HEAD)
            while isinstance(caller.socket, ssl.SSLSocket) and caller.socket.pending() and len(data) <= HEAD:
                data += caller.socket.recv(HEAD)
        except ssl.SSLWantReadError:
            self._selector.modify(caller.socket, selectors.EVENT_READ, caller)
            return
        except BlockingIOError:
            return
        except ssl.SSLWantWriteError:
            self._selector.modify(caller.socket, selectors.EVENT_WRITE, caller)
            return
        except OSError:
            return self._drop(caller)
        if not data:
            return self._drop(caller)
        if not caller.ending:
            caller.data += data
            return self._read(caller)
        caller.skip += len(data)
        if caller.skip > DISCARDED:
            self._drop(caller)

    # Requests

    def _read(self, caller: Caller) -> None:
        """The next request, once it is complete and the one before has been answered."""
        while not (caller.closed or caller.ending or caller.waiting):
            skipped = min(caller.skip, len(caller.data))
            caller.data, caller.skip = caller.data[skipped:], caller.skip - skipped
            end = caller.data.find(http_head.END)
            if caller.skip or not 0 <= end < HEAD:
                break
            data, caller.data = caller.data[: end + 4], caller.data[end + 4 :]
            self._answer(caller, data)
        if not caller.data or caller.skip or caller.closed or caller.ending:
            return
        if len(caller.data) > HEAD:
            self._refuse(caller, Refusal(431, f"expected a head of up to {HEAD} bytes, found more"))
        elif not http_head.begins(caller.data):
            self._refuse(caller, http_head.no_http())

    def _answer(self, caller: Caller, data: bytes) -> None:
        caller.cors = {}
        try:
            head = http_head.parse(data)
            caller.cors = self._cors(head)
            if head.path != "/stop":
                raise Refusal(404, "expected /stop")
            if head.method == "OPTIONS":
                if not caller.cors:
                    raise Refusal(403, "expected the operator's page")
                self._send(caller, http_head.response(204, close=False, fields=PREFLIGHT | caller.cors))
                return
            if not http_head.has_token(head.get("authorization"), self._token):
                raise Refusal(401, "expected the header Authorization: Bearer TOKEN")
            if head.method not in ("GET", "POST"):
                raise Refusal(405, "expected GET or POST")
        except Refusal as error:
            return self._refuse(caller, error)
        caller.known, caller.deadline = True, monotonic() + KNOWN_S
        caller.skip, caller.persistent = head.length, head.persistent and head.length <= BODY
        caller.waiting = object()
        try:
            self._wire.send(PRESS + (b"the page" if caller.cors else b"HTTP") if head.method == "POST" else STATE)
        except OSError:  # hundreds of stops are waiting unread
            self._reply(caller, 503, {"error": "expected a process that reads, found hundreds of requests before this"})
        else:
            self._asked.append((caller, caller.waiting, monotonic() + ANSWERED_S))

    def _read_answers(self) -> bool:
        """Reads answers of the other process, in the order of the questions; -> whether it goes on."""
        while message := receive(self._wire):
            caller, mark, _ = self._asked.popleft()
            if caller.waiting is mark and not caller.closed:
                self._reply(caller, 200, json.loads(message))
        return message is None

    def _cors(self, head: Head) -> dict[str, str]:
        """Headers that permit the operator's page to read the answer; none for other pages."""
        given, host = head.get("origin"), http_head.host(head.get("host") or "")
        scheme = "http" if self._tls is None else "https"
        if given is None or host is None or self._page is None or given != http_head.origin(scheme, host, self._page):
            return {}
        return {"Access-Control-Allow-Origin": given, "Vary": "Origin"}

    # Responses

    def _reply(self, caller: Caller, status: int, body: dict[str, Any]) -> None:
        caller.waiting = None
        response = http_head.response(
            status, json.dumps(body), "application/json", close=not caller.persistent, fields=caller.cors
        )
        if self._send(caller, response) and not caller.persistent:
            return self._end(caller)
        self._read(caller)

    def _refuse(self, caller: Caller, refusal: Refusal) -> None:
        response = http_head.response(
            refusal.status, json.dumps({"error": refusal.text}), "application/json", fields=caller.cors
        )
        if self._send(caller, response):
            self._end(caller)

    def _send(self, caller: Caller, data: bytes) -> bool:
        """Whether the bytes were sent. A client that does not read so few bytes is dropped."""
        if caller.closed:
            return False
        try:
            if caller.socket.send(data) == len(data):
                return True
        except OSError:
            pass
        self._drop(caller)
        return False

    def _end(self, caller: Caller) -> None:
        caller.ending, caller.known, caller.waiting, caller.data = True, False, None, b""
        caller.deadline, caller.skip = monotonic() + LINGER_S, 0
        if not isinstance(caller.socket, ssl.SSLSocket):
            with suppress(OSError):
                caller.socket.shutdown(socket.SHUT_WR)


def main(listening: int, wire: int) -> None:
    """Reads its configuration as the wire's first message, then reports that it is ready."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)  # the process that started this one ends it, when the robot is at rest
    control = socket.socket(fileno=wire)
    given = json.loads(control.recv(LARGEST))
    tls = None
    if given["certificate"] is not None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            tls.load_cert_chain(given["certificate"], given["key"])
        except OSError as error:
            control.send(str(error).encode())
            return
    listener = Listener(socket.socket(fileno=listening), control, given["token"], tls, given["page"])
    control.send(READY.encode())
    listener.run()
