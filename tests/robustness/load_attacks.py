"""The malicious client of load.py, which repeats a series of attacks on all ports of a server.

Every step opens a connection that breaks a rule: garbage, another protocol, frames that declare or contain more than is
allowed, connections that are never finished, never read, or receive a byte at a time. HTTP ports also get the attacks
of load_http.py. At most ``HELD`` connections stay open; the oldest are closed. The client runs at a lower priority than
the server, so that it takes no CPU time from it.
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
ANSWER_S = 0.1  # how long a step waits for an answer
LARGE = 17 * 2**20  # bytes of a large message; the server accepts 16 MiB

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03REQ"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # with empty settings
HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # beginning of a TLS handshake
OPENINGS = (UPGRADE, b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n", GREETING + READY, PREFACE, HELLO)
HTTP = ("openvla", "page", "stop")
INTRODUCED = {"openpi": UPGRADE, "openvla": b"", "gr00t": GREETING + READY, "lerobot": PREFACE}


class Attacker:
    """``ports``: by protocol, plus "page" and "stop"; ``slow``: a valid openpi observation.

    ``done``: (step, outcome) -> count.
    """

    def __init__(self, ports: Mapping[str, int], slow: bytes, seed: int) -> None:
        self._ports, self._slow, self._random = ports, slow, random.Random(seed)
        self._http = {name: make() for name, make in load_http.ATTACKS.items()}
        self._held: deque[socket.socket] = deque()
        self._fed: deque[socket.socket] = deque(maxlen=16)  # those that receive a byte after each step
        self.done: Counter[tuple[str, str]] = Counter()

    def round(self) -> Iterator[None]:
        """Run every step once on every port."""
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
        except OSError as error:  # the server did not read, or closed the connection
            outcome = "timed out" if isinstance(error, TimeoutError) else "closed"
        self.done[name, outcome] += 1
        self._feed()
        time.sleep(PAUSE_S)

    def _once(self, attack: load_http.Attack, port: int) -> str:
        return self._hold(attack.once(port))

    def oversized(self, protocol: str) -> str:
        """Declare a message that is too large, and send a small part of it."""
        frames = {
            "openpi": UPGRADE + b"\x82\xff" + (2**40).to_bytes(8, "big") + bytes(4),
            "openvla": b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 1099511627776\r\n\r\n",
            "gr00t": GREETING + READY + b"\x01\x00\x02" + (2**40).to_bytes(8, "big"),
            "lerobot": PREFACE + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01",
        }
        return self._send(protocol, frames[protocol] + bytes(2**16))

    def large(self, protocol: str) -> str:
        """Send a complete message that is too large."""
        frames = {
            "openpi": UPGRADE + b"\x82\xff" + LARGE.to_bytes(8, "big") + bytes(4),
            "openvla": b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % LARGE,
            "gr00t": GREETING + READY + b"\x01\x00\x02" + LARGE.to_bytes(8, "big"),
            "lerobot": PREFACE,
        }
        return self._send(protocol, frames[protocol] + bytes(LARGE))

    def slow_writing(self, protocol: str) -> str:
        """Send the beginning of a message, then one byte at a time."""
        begun = {
            "openpi": UPGRADE + b"\x82\xff" + (2**20).to_bytes(8, "big") + bytes(4),
            "openvla": b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n",
            "gr00t": GREETING + READY + b"\x01\x00\x02" + (2**20).to_bytes(8, "big"),
            "lerobot": PREFACE + b"\x00\x40\x00\x01\x04\x00\x00\x00\x01",
        }
        connection = self._open(protocol, begun[protocol])
        self._fed.append(connection)
        return self._hold(connection)

    def hoarding(self, protocol: str) -> str:
        """Send half of a message of allowed size, and never the rest."""
        size, half = 15 * 2**20, bytes(8 * 2**20)
        begun = {
            "openpi": UPGRADE + b"\x82\xff" + size.to_bytes(8, "big") + bytes(4) + half,
            "openvla": b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + half,
            "gr00t": GREETING + READY + b"\x01\x00\x02" + size.to_bytes(8, "big") + half,
            "lerobot": PREFACE + b"\x00\x40\x00\x01\x04\x00\x00\x00\x01" + bytes(2**13),
        }
        return self._hold(self._open(protocol, begun[protocol]))

    def slow_reading(self, protocol: str) -> str:
        """Request answers, pongs and metrics repeatedly, with a small receive buffer, and never read them."""
        ping = masked(0x9, bytes(125))
        requests = {
            "openpi": UPGRADE + masked(0x2, self._slow) + ping * 100,
            "openvla": b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 200,
            "gr00t": GREETING + READY + _request(msgpack.packb({"endpoint": "ping"})) * 200,
            "lerobot": PREFACE + b"\x00\x00\x08\x06\x00\x00\x00\x00\x00PINGPING" * 200,
        }
        connection = self._open(protocol, b"", room=1024)
        connection.settimeout(1.0)
        connection.sendall(requests[protocol])
        return self._hold(connection)

    def half_open(self, protocol: str) -> str:
        return self._hold(self._open(protocol, b""))

    def garbage(self, protocol: str) -> str:
        return self._send(protocol, self._random.randbytes(self._random.randrange(1, 5000)))

    def garbage_inside(self, protocol: str) -> str:
        """Send garbage after a valid handshake."""
        noise = self._random.randbytes(self._random.randrange(1, 2000))
        inside = {
            "openpi": self._random.choice([noise, masked(0x2, noise), masked(0x1, b"{}"), masked(0x2, b"")]),
            "openvla": b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(noise) + noise,
            "gr00t": self._random.choice([noise, _request(noise)]),
            "lerobot": noise,
        }
        return self._send(protocol, INTRODUCED[protocol] + inside[protocol])

    def many(self, protocol: str) -> str:
        """Connect and disconnect twenty times, every other time with a reset."""
        for number in range(20):
            connection = self._open(protocol, b"")
            if number % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
        return "sent"

    def half_tls(self, protocol: str) -> str:
        return self._send(protocol, HELLO + self._random.randbytes(100))

    def other_protocol(self, protocol: str) -> str:
        return self._send(protocol, self._random.choice(OPENINGS))

    def unfinished(self, protocol: str) -> str:
        """Send a part of the handshake."""
        opening = INTRODUCED[protocol] or OPENINGS[1]
        return self._hold(self._open(protocol, opening[: self._random.randrange(1, len(opening))]))

    def flood(self, protocol: str) -> str:
        """Send thousands of the smallest messages that the server must handle."""
        small = {
            "openpi": UPGRADE + masked(0x9, b"") * 20_000,
            "openvla": b"GET / HTTP/1.1\r\n\r\n" * 5000,
            "gr00t": GREETING + READY + b"\x04\x07\x04PING\x00\x01" * 20_000,
            "lerobot": PREFACE + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)) * 20_000,
        }
        return self._send(protocol, small[protocol])

    def close(self) -> None:
        for connection in self._held:
            connection.close()

    def _open(self, protocol: str, first: bytes, room: int | None = None) -> socket.socket:
        """Connect and send ``first``. ``room``: size of the receive buffer in bytes."""
        connection = socket.socket()
        if room is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        connection.settimeout(5.0)
        connection.connect(("127.0.0.1", self._ports[protocol]))
        connection.sendall(first)
        return connection

    def _send(self, protocol: str, sent: bytes) -> str:
        """Send, then return "closed", "answered", or "waited for" if nothing happens within ``ANSWER_S``."""
        outcome, deadline = "waited for", time.monotonic() + ANSWER_S
        with self._open(protocol, b"") as connection:
            connection.sendall(sent)
            while (left := deadline - time.monotonic()) > 0:
                connection.settimeout(left)
                try:
                    answer = connection.recv(2**16)
                except TimeoutError:
                    return outcome
                if not answer:
                    return "closed"
                outcome = "answered"
        return outcome

    def _hold(self, connection: socket.socket) -> str:
        self._held.append(connection)
        while len(self._held) > HELD:
            self._held.popleft().close()
        return "left open"

    def _feed(self) -> None:
        for connection in self._fed:
            try:
                connection.send(b"\0", socket.MSG_DONTWAIT)
            except OSError:  # closed by the server or this client
                continue


def run(ports: Mapping[str, int], slow: bytes, ending: Any, results: Any) -> None:
    """Main function of the attacker process: attack until ``ending`` is set, then put a summary into ``results``."""
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
    """A complete WebSocket frame of a client, masked with zeros."""
    size = len(payload)
    length = bytes((0x80 | size,)) if size < 126 else b"\xff" + size.to_bytes(8, "big")
    return bytes((0x80 | opcode,)) + length + bytes(4) + payload


def _request(body: bytes) -> bytes:
    """A message of a ZeroMQ REQ socket."""
    return b"\x01\x00\x02" + len(body).to_bytes(8, "big") + body
