"""Clients that cost much: floods of small frames, connections that are left open, what broken ones leave in the log."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from load_attacks import GREETING, READY, UPGRADE, masked
from serving import Served, said, wait_for
from test_serve_openpi import asked, observation, opened

from rlrc.runtime.wire import ports
from rlrc.runtime.wire.ports import CONNECTIONS, Places, RateLimit

PROTOCOLS = ("openpi", "openvla", "gr00t", "lerobot")
SECONDS = 8.0  # of a connection: less than any other limit that would end it
FLOODS = {
    "pings": ("openpi", UPGRADE, masked(0x9, b"") * 1000, b"too many pings"),
    "pongs": ("openpi", UPGRADE, masked(0xA, b"") * 1000, b"too many pings"),
    "frames": ("openpi", UPGRADE, masked(0x2, b"x") * 40_000, b"too many small frames"),
    "ZMTP's pings": ("gr00t", GREETING + READY, b"\x04\x07\x04PING\x00\x01" * 1000, GREETING),
}


@pytest.fixture
def served(toy_artifact: Path) -> Iterator[Served]:
    with Served(toy_artifact, "--mapping", "openvla", "openvla-oft", protocols=PROTOCOLS) as running:
        yield running


def test_who_floods_is_cut_off(served: Served) -> None:
    with opened(served) as beside:
        for name, (protocol, opening, flood, expected) in FLOODS.items():
            found = said(served.ports[protocol], opening, flood, SECONDS)
            assert expected in found, name
            assert len(found) < 5000, name  # no answer to every one
            assert "actions" in asked(beside, observation())
    _, log = served.end()
    assert len(log) < 5000


@pytest.mark.parametrize("protocol", ["openpi", "openvla"])
def test_connections_that_are_left_open_keep_nobody_out(served: Served, protocol: str) -> None:
    files = Path(f"/proc/{served.process.pid}/fd")
    before = len(os.listdir(files))
    with ExitStack() as stack, opened(served) as beside:
        for _ in range(2 * CONNECTIONS):
            stack.enter_context(socket.create_connection(("127.0.0.1", served.ports[protocol]), 8))
        wait_for(lambda: served.get("/healthz", protocol)[0] == 200)
        wait_for(lambda: len(os.listdir(files)) < before + CONNECTIONS + 8)
        assert "actions" in asked(beside, observation())


def test_what_is_broken_leaves_no_traceback(served: Served) -> None:
    half = b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", served.ports["openvla"]), 8) as connection:
        connection.sendall(half)
        wait_for(lambda: served.get("/healthz", "openvla")[0] == 200)
    assert said(served.ports["openvla"], b"\x16\x03\x01" + bytes(100), seconds=SECONDS).startswith(b"HTTP/1.1 400")
    code, log = served.end()
    assert code == 0
    assert "openvla client 127.0.0.1: gone" in log
    assert "Traceback" not in log


def test_a_place_is_made_by_who_has_waited_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now, left = [0.0], []
    monkeypatch.setattr(ports.time, "monotonic", lambda: now[0])
    places = Places(2, patience_s=10)
    assert places.take("a", lambda: left.append("a"))
    now[0] = 5.0
    assert places.take("b", lambda: left.append("b"))
    places.mark_answered("a")
    now[0] = 14.0
    assert not places.take("c", lambda: left.append("c"))  # b came 9 s ago, and a works
    now[0] = 15.0
    assert places.take("c", lambda: left.append("c"))
    assert left == ["b"]
    assert not places.take("d", lambda: left.append("d"))
    places.free("a")
    assert places.take("d", lambda: left.append("d"))
    assert left == ["b"]


def test_an_allowance_grows_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(ports.time, "monotonic", lambda: now[0])
    allowance = RateLimit(2, seconds=10)
    assert [allowance.spend() for _ in range(3)] == [True, True, False]
    allowance = RateLimit(2, seconds=10)
    assert allowance.spend()
    assert allowance.spend()
    now[0] = 10.0
    assert [allowance.spend() for _ in range(2)] == [True, False]


def test_what_was_refused_or_never_finished_is_let_go(served: Served) -> None:
    """Exceptions and parsers are parts of cycles: their messages would stay until the garbage collector comes."""
    size, number = 12 * 2**20, 20
    post = b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (size + 1)
    request = GREETING + READY + b"\x01\x00\x02" + (size + 1).to_bytes(8, "big")
    refused = UPGRADE + masked(0x2, b"\x91" * size)
    for protocol, sent in {"openvla": post + bytes(size), "gr00t": request + bytes(size), "openpi": refused}.items():
        before = memory(served)
        with ExitStack() as stack:
            for _ in range(number):
                connection = socket.create_connection(("127.0.0.1", served.ports[protocol]), 8)
                stack.enter_context(connection).sendall(sent)
        wait_for(lambda before=before: memory(served) < before + number * size // 3)


def memory(served: Served) -> int:
    return int(Path(f"/proc/{served.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
