"""The malicious client of load.py: one step after the other, against all of a server's ports.

Every step is a connection that breaks a rule: bytes that are nobody's, another protocol's beginning, frames that
declare or hold more than is allowed, connections that are never finished, never read or fed a byte at a time. Ports
that speak HTTP get those of load_http.py, too. Those that are left open stay open, up to ``HELD``, and the oldest go.
It works at a lower priority than the server, as if it were elsewhere: what it makes the server do is what counts.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import load_http
import msgpack

from rlrc.processes import die_with_parent

HELD = 400  # connections that stay open
PAUSE_S = 0.02  # between two steps
HEARD_S = 0.1  # how long a step waits for what the server says
LARGE = 17 * 2**20  # bytes of a message that is really sent; the server takes 16 MiB

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03REQ"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # and empty settings
HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # how TLS begins
OPENINGS = (UPGRADE, b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n", GREETING + READY, PREFACE, HELLO)
HTTP = ("openvla", "page", "stop")
INTRODUCED = {"openpi": UPGRADE, "openvla": b"", "gr00t": GREETING + READY, "lerobot": PREFACE}


class Attacker:
    """``ports`` by protocol, and of the page and its stop; ``slow``: an observation that openpi's server answers.

    ``done``: (step, outcome) -> times.
    """

    def __init__(self, ports: Mapping[str, int], slow: bytes, seed: int) -> None:
        self._ports, self._slow, self._random = ports, slow, random.Random(seed)
        self._http = {name: make() for name, make in load_http.ATTACKS.items()}
        self._held: deque[socket.socket] = deque()
        self._fed: deque[socket.socket] = deque(maxlen=16)  # of those, the ones that get a byte now and then
        self.done: Counter[tuple[str, str]] = Counter()

    def round(self) -> Iterator[None]:
        """Every step at every port once."""
        steps: tuple[Callable[[str], str], ...] = (
            self.oversized, self.large, self.slow_writing, self.hoarding, self.slow_reading, self.half_open,
            self.garbage, self.garbage_inside, self.many, self.half_tls, self.other_protocol, self.unfinished,
            self.flood,
        )  # fmt: skip
        for step in steps:
            for protocol in INTRODUCED:
                self._do(step.__name__.replace("_", " "), partial(step, protocol))
                yield
        for name, attack in self._http.items():
            for port in [port for protocol, port in self._ports.items() if protocol in HTTP]:
                self._do(name, partial(self._once, attack, port))
                yield

    def _do(self, name: str, step: Callable[[], str]) -> None:
        try:
            outcome = step()
        except OSError as error:  # the server has closed it: what was sent goes nowhere
            outcome = "timed out" if isinstance(error, TimeoutError) else "closed"
        self.done[name, outcome] += 1
        self._feed()
        time.sleep(PAUSE_S)

    def _once(self, attack: load_http.Attack, port: int) -> str:
        return self._kept(attack.once(port))

    def oversized(self, protocol: str) -> str:
        """Declares more than 4 GB, and sends a little of it."""
        frames = {
            "openpi": UPGRADE + b"\x82\xff" + (2**40).to_bytes(8, "big") + bytes(4),
            "openvla": b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 1099511627776\r\n\r\n",
            "gr00t": GREETING + READY + b"\x01\x00\x02" + (2**40).to_bytes(8, "big"),
            "lerobot": PREFACE + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
        }
        return self._said(protocol, frames[protocol] + bytes(2**16))

    def large(self, protocol: str) -> str:
        """A message that is whole, and larger than allowed."""
        frames = {
            "openpi": UPGRADE + b"\x82\xff" + LARGE.to_bytes(8, "big") + bytes(4),
            "openvla": b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % LARGE,
            "gr00t": GREETING + READY + b"\x01\x00\x02" + LARGE.to_bytes(8, "big"),
            "lerobot": PREFACE,
        }
        return self._said(protocol, frames[protocol] + bytes(LARGE))

    def slow_writing(self, protocol: str) -> str:
        """The beginning of a message, of which a byte comes now and then."""
        begun = {
            "openpi": UPGRADE + b"\x82\xff" + (2**20).to_bytes(8, "big") + bytes(4),
            "openvla": b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n",
            "gr00t": GREETING + READY + b"\x01\x00\x02" + (2**20).to_bytes(8, "big"),
            "lerobot": PREFACE + b"\x00\x40\x00\x01\x04\x00\x00\x00\x01",
        }
        connection = self._opened(protocol, begun[protocol])
        self._fed.append(connection)
        return self._kept(connection)

    def hoarding(self, protocol: str) -> str:
        """Half of a message that may be as large as it says, and never the rest."""
        size, half = 15 * 2**20, bytes(8 * 2**20)
        begun = {
            "openpi": UPGRADE + b"\x82\xff" + size.to_bytes(8, "big") + bytes(4) + half,
            "openvla": b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + half,
            "gr00t": GREETING + READY + b"\x01\x00\x02" + size.to_bytes(8, "big") + half,
            "lerobot": PREFACE + b"\x00\x40\x00\x01\x04\x00\x00\x00\x01" + bytes(2**13),
        }
        return self._kept(self._opened(protocol, begun[protocol]))

    def slow_reading(self, protocol: str) -> str:
        """Asks for what it never reads, with no room to receive it in: answers, pongs, the metrics again and again."""
        ping = masked(0x9, bytes(125))
        asked = {
            "openpi": UPGRADE + masked(0x2, self._slow) + ping * 100,
            "openvla": b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 200,
            "gr00t": GREETING + READY + _request(msgpack.packb({"endpoint": "ping"})) * 200,
            "lerobot": PREFACE + b"\x00\x00\x08\x06\x00\x00\x00\x00\x00PINGPING" * 200,
        }
        connection = self._opened(protocol, b"", room=1024)
        connection.settimeout(1.0)
        connection.sendall(asked[protocol])
        return self._kept(connection)

    def half_open(self, protocol: str) -> str:
        return self._kept(self._opened(protocol, b""))

    def garbage(self, protocol: str) -> str:
        return self._said(protocol, self._random.randbytes(self._random.randrange(1, 5000)))

    def garbage_inside(self, protocol: str) -> str:
        """After a proper beginning."""
        noise = self._random.randbytes(self._random.randrange(1, 2000))
        inside = {
            "openpi": self._random.choice([noise, masked(0x2, noise), masked(0x1, b"{}"), masked(0x2, b"")]),
            "openvla": b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(noise) + noise,
            "gr00t": self._random.choice([noise, _request(noise)]),
            "lerobot": noise,
        }
        return self._said(protocol, INTRODUCED[protocol] + inside[protocol])

    def many(self, protocol: str) -> str:
        """Connects twenty times and goes, every other time by a reset."""
        for number in range(20):
            connection = self._opened(protocol, b"")
            if number % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        return "sent"

    def half_tls(self, protocol: str) -> str:
        return self._said(protocol, HELLO + self._random.randbytes(100))

    def other_protocol(self, protocol: str) -> str:
        return self._said(protocol, self._random.choice(OPENINGS))

    def unfinished(self, protocol: str) -> str:
        """Half of how the protocol begins."""
        opening = INTRODUCED[protocol] or OPENINGS[1]
        return self._kept(self._opened(protocol, opening[: self._random.randrange(1, len(opening))]))

    def flood(self, protocol: str) -> str:
        """A few hundred thousand bytes of the smallest things that ask for a reaction."""
        small = {
            "openpi": UPGRADE + masked(0x9, b"") * 20_000,
            "openvla": b"GET / HTTP/1.1\r\n\r\n" * 5000,
            "gr00t": GREETING + READY + b"\x04\x07\x04PING\x00\x01" * 20_000,
            "lerobot": PREFACE + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)) * 20_000,
        }
        return self._said(protocol, small[protocol])

    def close(self) -> None:
        for connection in self._held:
            connection.close()

    def _opened(self, protocol: str, first: bytes, room: int | None = None) -> socket.socket:
        """``room``: bytes that it can receive before it reads."""
        connection = socket.socket()
        if room is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        connection.settimeout(5.0)
        connection.connect(("127.0.0.1", self._ports[protocol]))
        connection.sendall(first)
        return connection

    def _said(self, protocol: str, sent: bytes) -> str:
        """What the server does about it: "closed", "answered", or "waited for" in the time that a step has."""
        outcome, deadline = "waited for", time.monotonic() + HEARD_S
        with self._opened(protocol, b"") as connection:
            connection.sendall(sent)
            while (left := deadline - time.monotonic()) > 0:
                connection.settimeout(left)
                try:
                    told = connection.recv(2**16)
                except TimeoutError:
                    return outcome
                if not told:
                    return "closed"
                outcome = "answered"
        return outcome

    def _kept(self, connection: socket.socket) -> str:
        self._held.append(connection)
        while len(self._held) > HELD:
            self._held.popleft().close()
        return "left open"

    def _feed(self) -> None:
        for connection in self._fed:
            try:
                connection.send(b"\0", socket.MSG_DONTWAIT)
            except OSError:  # closed by the server, or by us
                continue


def run(ports: Mapping[str, int], slow: bytes, ending: Any, results: Any) -> None:
    """In a process of its own, round and round until ``ending`` is set; then what was done goes into ``results``."""
    die_with_parent()
    os.nice(10)
    attacker, rounds = Attacker(ports, slow, 1), 0
    while not ending.is_set():
        for _ in attacker.round():
            if ending.is_set():
                break
        else:
            rounds += 1
    done: dict[str, dict[str, int]] = {}
    for (step, outcome), times in sorted(attacker.done.items()):
        done.setdefault(step, {})[outcome] = times
    results.put({"rounds": rounds, "steps": done})
    attacker.close()


def masked(opcode: int, payload: bytes) -> bytes:
    """A whole WebSocket frame of a client, with a mask of zeros."""
    size = len(payload)
    length = bytes((0x80 | size,)) if size < 126 else b"\xff" + size.to_bytes(8, "big")
    return bytes((0x80 | opcode,)) + length + bytes(4) + payload


def _request(body: bytes) -> bytes:
    """A REQ socket's message."""
    return b"\x01\x00\x02" + len(body).to_bytes(8, "big") + body
