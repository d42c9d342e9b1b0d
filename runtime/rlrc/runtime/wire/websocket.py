"""A blocking WebSocket client that reads in the caller's thread.

The library's own client reads in another thread; waking that thread and then the caller takes a third of a millisecond,
half of the cost of serving. This client uses the library's protocol without its I/O (websockets.client). Between
requests, a sleeping thread answers the server's pings.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from time import monotonic

from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.protocol import CONNECTING, OPEN
from websockets.uri import parse_uri

PING_CHECK_S = 5.0  # interval of checks for pings; servers wait twenty seconds
READ_BYTES = 2**16


class WebSocket:
    """Connects. Raises OSError (including TimeoutError) or WebSocketException if that fails within ``seconds``.

    For one thread at a time. ``largest``: limit of received messages, bytes.
    """

    def __init__(
        self, url: str, tls: ssl.SSLContext | None, headers: Mapping[str, str], largest: int, seconds: float
    ) -> None:
        uri, deadline = parse_uri(url), monotonic() + seconds
        self._protocol = ClientProtocol(uri, max_size=largest)
        self._frames: deque[Frame] = deque()
        self._ended, self._closed, self._lock = False, threading.Event(), threading.Lock()
        self._socket = socket.create_connection((uri.host, uri.port), _left(deadline))
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is not None:
                self._socket = tls.wrap_socket(self._socket, server_hostname=uri.host)
            self._shake_hands(headers, deadline)
        except BaseException:
            self._socket.close()
            raise
        threading.Thread(target=self._answer_pings, name="pings", daemon=True).start()

    def ask(self, message: bytes, seconds: float) -> str | bytes:
        """Send a binary message and return the next message received. Raises ConnectionClosed or TimeoutError."""
        deadline = monotonic() + seconds
        with self._lock:
            if self._protocol.state is not OPEN:
                raise self._end()
            self._protocol.send_binary(message)
            try:
                self._flush(deadline)
            except TimeoutError:
                raise
            except OSError:
                raise self._end() from None
            return self._message(deadline)

    def receive(self, seconds: float) -> str | bytes:
        """The next message. Raises ConnectionClosed or TimeoutError."""
        with self._lock:
            return self._message(monotonic() + seconds)

    def close(self) -> None:
        """Send a close frame and close, without waiting for the reply."""
        self._closed.set()
        with self._lock, suppress(OSError):
            if self._protocol.state is OPEN:
                self._protocol.send_close(1000)
                self._flush(monotonic() + 0.1)
        self._socket.close()

    def _shake_hands(self, headers: Mapping[str, str], deadline: float) -> None:
        request = self._protocol.connect()
        request.headers.update(headers)
        self._protocol.send_request(request)
        self._flush(deadline)
        while self._protocol.state is CONNECTING:  # if the server then closes, ``ask`` raises
            if self._protocol.handshake_exc is not None:
                raise self._protocol.handshake_exc
            if self._ended:
                raise ConnectionResetError("the connection was closed in its handshake")
            self._read(deadline)

    def _message(self, deadline: float) -> str | bytes:
        parts: list[Frame] = []
        while True:
            while self._frames:
                parts.append(self._frames.popleft())
                if parts[-1].fin:
                    whole = b"".join(bytes(part.data) for part in parts)
                    return whole.decode("utf-8", "replace") if parts[0].opcode is Opcode.TEXT else whole
            if self._ended:
                raise self._end()
            self._read(deadline)

    def _read(self, deadline: float) -> None:
        """Wait for data and take them. Raises TimeoutError."""
        self._socket.settimeout(_left(deadline))
        try:
            data = self._socket.recv(READ_BYTES)
        except TimeoutError:
            raise
        except OSError:  # reset
            data = b""
        self._take(data)
        with suppress(OSError):  # pongs; the peer may have disconnected
            self._flush(deadline)

    def _take(self, data: bytes) -> None:
        if data:
            self._protocol.receive_data(data)
        elif not self._ended:
            self._ended = True
            self._protocol.receive_eof()
        for event in self._protocol.events_received():
            if isinstance(event, Frame) and event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
                self._frames.append(event)

    def _flush(self, deadline: float) -> None:
        for data in self._protocol.data_to_send():
            self._socket.settimeout(_left(deadline))
            if data:
                self._socket.sendall(data)
            else:
                with suppress(OSError):  # the protocol asks to close the sending side
                    self._socket.shutdown(socket.SHUT_WR)

    def _end(self) -> ConnectionClosed:
        """The reason why the connection ended."""
        if not self._ended:
            self._take(b"")
        return self._protocol.close_exc

    def _answer_pings(self) -> None:
        while not self._closed.wait(PING_CHECK_S):
            if not self._lock.acquire(blocking=False):
                continue  # a request is in progress and reads itself
            try:
                self._socket.settimeout(0.0)
                self._take(self._socket.recv(READ_BYTES))
                self._flush(monotonic() + 1.0)
            except (BlockingIOError, ssl.SSLWantReadError):
                continue
            except OSError:
                return
            finally:
                self._lock.release()
            if self._ended:
                return


def _left(deadline: float) -> float:
    return max(0.001, deadline - monotonic())
