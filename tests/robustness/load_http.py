"""Attacks of tests/robustness/load.py on HTTP ports, and the time that a stop takes during an attack.

An attack floods the given ports without a token, from a separate process at lower priority, so that it takes no CPU
time from the server. Stops are sent in three ways: to the stop port through a persistent connection (as by the operator
page) or a new one each time (as by curl), and to the page port.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import random
import socket
import ssl
import struct
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from rlrc.processes import die_with_parent

CONNECTIONS = 4  # at once per port; before rlrc parsed requests itself, 4 delayed a stop by 14 s
HELD = 300  # connections of an attack that stay open
TIMEOUT_S = 30.0  # for a stop
EVERY_S = 0.02  # pause between two stops
LARGE = 17 * 2**20


def _zeros(wbits: int, blocks: int = 512) -> bytes:
    """Half a megabyte that decompresses to half a gigabyte."""
    packer, block = zlib.compressobj(9, zlib.DEFLATED, wbits), bytes(2**20)
    first, again = (packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + again * (blocks - 1)


def _zstd(size: int = 2**34) -> bytes:
    """A zstd frame (RFC 8878) without a content size; each block decompresses to 128 KiB of one byte."""
    block = (2**17 << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    return b"\x28\xb5\x2f\xfd\x00\x58" + block * (size // 2**17)


def _post(path: str, body: bytes, *fields: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def _hello() -> bytes:
    """A complete ClientHello, which a TLS server must answer with a signature."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


class Attack:
    """``messages``: one per connection, in turn; ``held``: keep connections open; ``drip``: repeated on open ones."""

    def __init__(self, messages: Sequence[bytes], held: bool = False, drip: bytes = b"") -> None:
        self.messages, self.held, self.drip = messages, held, drip

    def run(self, ports: Sequence[int], ending: Any) -> int:
        """Attack until ``ending`` is set. Returns the number of connections."""
        number, open_ones = 0, deque[socket.socket]()
        while not ending.is_set():
            for port in ports:
                for _ in range(CONNECTIONS):
                    number += 1
                    with suppress(OSError):
                        open_ones.append(self._send(port, self.messages[number % len(self.messages)]))
            while len(open_ones) > (HELD if self.held else CONNECTIONS * len(ports)):
                open_ones.popleft().close()
            for one in list(open_ones) if self.drip else ():
                with suppress(OSError):
                    one.send(self.drip, socket.MSG_DONTWAIT)
        for one in open_ones:
            one.close()
        return number

    def once(self, port: int) -> socket.socket:
        """Send every message. Returns the connection of the last one, still open."""
        for data in self.messages[:-1]:
            self._send(port, data).close()
        return self._send(port, self.messages[-1])

    def _send(self, port: int, data: bytes) -> socket.socket:
        """Send on a new connection; ignore that the server stops reading or closes it."""
        connection = socket.create_connection(("127.0.0.1", port), 1.0)
        connection.settimeout(0.2)
        try:
            connection.sendall(data)
        except OSError:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return connection


def _encoded(coding: str, body: bytes) -> Attack:
    return Attack([_post(path, body, f"Content-Encoding: {coding}") for path in PATHS])


def _begun(rest: bytes, **options: Any) -> Attack:
    return Attack([_BEGUN[path] + rest for path in PATHS], **options)


PATHS = ("/stop", "/act", "/")
_BEGUN = {path: f"POST {path} HTTP/1.1\r\nHost: x\r\n".encode() for path in PATHS}
_CHUNKED = b"Transfer-Encoding: chunked\r\n"
_CHUNKS = b"\r\n" + b"1\r\n0\r\n" * 50_000
_NOISE = random.Random(1)

ATTACKS: dict[str, Callable[[], Attack]] = {
    "gzip bodies": lambda: _encoded("gzip", _zeros(31)),
    "deflate bodies": lambda: _encoded("deflate", _zeros(15)),
    "br bodies": lambda: _encoded("br", _NOISE.randbytes(2**19)),
    "zstd bodies": lambda: _encoded("zstd", _zstd()),
    "bodies encoded twice": lambda: _encoded("gzip, deflate", _zeros(31)),
    "chunks": lambda: _begun(_CHUNKED + _CHUNKS),
    "encoded chunks": lambda: _begun(_CHUNKED + b"Content-Encoding: gzip\r\n" + _CHUNKS),
    "many header fields": lambda: _begun(b"".join(b"x-%d: y\r\n" % number for number in range(50_000))),
    "long header fields": lambda: _begun(b"x: " + b"y" * 2**20 + b"\r\n"),
    "folded header fields": lambda: _begun(b"x: y\r\n" + b" z\r\n" * 100_000),
    "slow heads": lambda: _begun(b"", held=True, drip=b"x"),
    "slow bodies": lambda: _begun(b"Content-Length: 4000\r\n\r\n", held=True, drip=b"x"),
    "large bodies": lambda: _begun(b"Content-Length: %d\r\n\r\n" % LARGE + bytes(LARGE)),
    "pipelined requests": lambda: Attack(
        [b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path * 10_000 for path in (b"/", b"/healthz", b"/stop")]
    ),
    "files": lambda: Attack([b"GET /page.js HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"]),
    "wrong tokens": lambda: _begun(b"Authorization: Bearer x\r\n\r\n"),
    "expectations": lambda: _begun(b"Content-Length: 10\r\nExpect: 100-continue\r\n\r\n", held=True),
    "HTTP/2": lambda: Attack([b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)) * 10_000]),
    "upgrades": lambda: Attack([b"GET /events HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n" * 100]),
    "TLS hellos": lambda: Attack([_hello()]),
    "half TLS hellos": lambda: Attack([_hello()[:100]], held=True),
    "TLS garbage": lambda: Attack([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + _NOISE.randbytes(2**16)]),
    "garbage": lambda: Attack([_NOISE.randbytes(2**18) for _ in range(8)]),
    "connections": lambda: Attack([b""]),
    "silent connections": lambda: Attack([b""], held=True),
}


@contextmanager
def run_attack(name: str, ports: Sequence[int]) -> Iterator[dict[str, int]]:
    """Run an attack in a separate process. On exit, the map contains the number of connections."""
    context = multiprocessing.get_context("spawn")
    ending, results, summary = context.Event(), context.SimpleQueue(), dict[str, int]()
    process = context.Process(target=_attack, args=(name, list(ports), ending, results), daemon=True)
    process.start()
    results.get()  # wait until the attack has begun
    try:
        yield summary
        ending.set()
        summary["connections"] = results.get()
        process.join()
    finally:
        process.kill()


def _attack(name: str, ports: list[int], ending: Any, results: Any) -> None:
    die_with_parent()
    os.nice(10)
    attack = ATTACKS[name]()
    results.put(None)
    results.put(attack.run(ports, ending))


class Operator:
    """Sends stops with the token. ``stop``, ``page``: URLs of the stop port and of the page port."""

    def __init__(self, stop: str, page: str, token: str) -> None:
        self._token, self._stop, self._page = token, urlsplit(stop), urlsplit(page)
        self._kept = self._connection(self._stop.netloc)
        self.press(self._kept)

    def close(self) -> None:
        self._kept.close()

    def _connection(self, address: str) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(address, timeout=TIMEOUT_S)

    def press(self, connection: http.client.HTTPConnection) -> None:
        """Send a stop. Raises HTTPException if the answer does not confirm it."""
        connection.request("POST", "/stop", headers={"Authorization": f"Bearer {self._token}"})
        with connection.getresponse() as response:
            answer = response.read()
        if response.status != 200 or not json.loads(answer)["stopped"]:
            raise http.client.HTTPException(f"expected a stop, found {response.status} {answer[:200]!r}")

    def run(self, seconds: float) -> dict[str, dict[str, Any]]:
        """Send stops for ``seconds``. Returns their times in milliseconds by way."""

        def press_new(address: str) -> None:
            connection = self._connection(address)
            try:
                self.press(connection)
            finally:
                connection.close()

        ways: dict[str, Callable[[], None]] = {
            "kept": lambda: self.press(self._kept),
            "new": lambda: press_new(self._stop.netloc),
            "page": lambda: press_new(self._page.netloc),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        failed = {way: Counter[str]() for way in ways}
        ended = time.monotonic() + seconds
        while time.monotonic() < ended:
            for way, press in ways.items():
                begun = time.perf_counter()
                try:
                    press()
                except (OSError, http.client.HTTPException) as error:
                    failed[way][type(error).__name__] += 1
                    if way == "kept":
                        self._kept.close()  # the next stop reconnects
                times[way].append((time.perf_counter() - begun) * 1e3)
                time.sleep(EVERY_S)
        return {way: summarize(values) | {"failed": failed[way]} for way, values in times.items()}


def summarize(milliseconds: Sequence[float]) -> dict[str, Any]:
    p50, p99, most = np.percentile(milliseconds, (50, 99, 100)).round(2).tolist()
    return {"stops": len(milliseconds), "p50_ms": p50, "p99_ms": p99, "max_ms": most}


def stops(
    operator: Operator, ports: Sequence[int], seconds: float, tick: Callable[[int], None], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Time stops without an attack, then during each attack on ``ports``. Returns one row per attack."""
    rows: list[dict[str, Any]] = [{"attack": "none", "connections": 0, **operator.run(seconds)}]
    for name in names:
        tick(1)
        with run_attack(name, ports) as made:
            time.sleep(min(0.5, seconds))
            row = operator.run(seconds)
        rows.append({"attack": name, **made, **row})
    return rows
