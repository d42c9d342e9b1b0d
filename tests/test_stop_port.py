"""The stop's own port: what its parser takes, what it refuses, who keeps a place, and what happens when it dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import load_http
import pytest
from procfs import children

from rlrc.errors import UserError
from rlrc.runtime.control.stop_listener import UNKNOWN
from rlrc.runtime.control.stop_port import StopPort
from rlrc.runtime.control.stop_switch import StopSwitch
from rlrc.runtime.wire import http_head
from rlrc.runtime.wire.http_head import Refusal

TOKEN = "secret"
SLOW_S = 1.0  # on a machine that other tests share; tests/robustness/load.py asks for .1


class Pressed:
    """What a StopPort's owner does: it latches. ``late_s``: how long it takes to say so."""

    def __init__(self, **options: Any) -> None:
        self.reasons: list[str] = []
        self.lost = threading.Event()
        self.late_s = 0.0
        self.port = StopPort("127.0.0.1", 0)
        self.port.start(TOKEN, **options)
        self.port.watch(self.press, self.state, self.lost.set)

    def press(self, reason: str) -> None:
        time.sleep(self.late_s)
        self.reasons.append(reason)

    def state(self) -> dict[str, Any]:
        return {"stopped": bool(self.reasons), "reason": self.reasons[0] if self.reasons else ""}

    def opened(self, host: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port.port), 10, source_address=(host, 0))

    def say(self, sent: bytes) -> bytes:
        """All that it answers until it hangs up, or has answered once."""
        with self.opened() as connection:
            connection.sendall(sent)
            return heard(connection)


def heard(connection: socket.socket) -> bytes:
    found = b""
    with suppress(ConnectionError):
        while part := connection.recv(2**16):
            found += part
            head, end, body = found.partition(b"\r\n\r\n")
            length = head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]
            if end and len(body) >= int(length or b"0"):
                break
    return found


def request(method: str = "POST", token: str = TOKEN, *fields: str, path: str = "/stop") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1:1", f"Authorization: Bearer {token}", *fields]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


@pytest.fixture
def pressed() -> Iterator[Pressed]:
    made = Pressed(page=8080)
    yield made
    made.port.close()


@pytest.mark.parametrize("held_s", [0.0, 0.2])
def test_an_answer_reaches_its_client_when_the_run_ends_at_once(held_s: float) -> None:
    """A stop ends a run that cannot be re-armed: the port closes right after the answer. ``held_s``: how long the
    listener does not run meanwhile."""
    pressed = Pressed()
    pressed.late_s = held_s
    with pressed.opened() as connection:
        connection.sendall(request())
        if held_s:
            time.sleep(held_s / 2)
            os.kill(pressed.port.pid, signal.SIGSTOP)
        while not pressed.reasons:
            time.sleep(0.001)
        time.sleep(0.05)
        closing = threading.Thread(target=pressed.port.close)
        closing.start()
        if held_s:
            time.sleep(held_s)
            os.kill(pressed.port.pid, signal.SIGCONT)
        assert heard(connection).endswith(b'{"stopped": true, "reason": "HTTP"}')
        closing.join()


def test_a_stop_and_what_is_asked_about_it(pressed: Pressed) -> None:
    with pressed.opened() as connection:
        connection.sendall(request("GET"))
        assert heard(connection).endswith(b'{"stopped": false, "reason": ""}')
        connection.sendall(request(*("POST", TOKEN, "Content-Length: 4")) + b"body" + request("GET"))  # at once
        assert heard(connection).endswith(b'{"stopped": true, "reason": "HTTP"}')
    assert pressed.reasons == ["HTTP"]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "Api-Key"])
def test_the_token_is_taken_as_on_every_port(pressed: Pressed, scheme: str) -> None:
    assert b"200 OK" in pressed.say(request().replace(b"Bearer", scheme.encode()))
    assert b"401 Unauthorized" in pressed.say(request().replace(b"Bearer", b"Basic"))
    assert pressed.reasons == ["HTTP"]


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (request(token="secre"), 401),
        (request(token="secret\xe9"), 401),
        (request(token=""), 401),
        (b"POST /stop HTTP/1.1\r\n\r\n", 401),
        (request(path="/"), 404),
        (request(path="/stop/"), 404),
        (request("PUT"), 405),
        (request("OPTIONS"), 403),
        (request("POST", TOKEN, "Content-Encoding: gzip", "Content-Length: 9"), 415),
        (request("POST", TOKEN, "Content-Encoding: zstd"), 415),
        (request("POST", TOKEN, "Content-Encoding: gzip", "Content-Encoding: identity"), 400),
        (request("POST", TOKEN, "Transfer-Encoding: chunked"), 411),
        (request("POST", TOKEN, "Upgrade: h2c"), 400),
        (request("POST", TOKEN, "Expect: 100-co\x9dtinue"), 417),
        (request("POST", TOKEN, "Expect: 200-ok"), 417),
        (request("POST", TOKEN, "Content-Length: 1", "Content-Length: 2"), 400),
        (request("POST", TOKEN, "Content-Length: -1"), 400),
        (request("POST", TOKEN, "Content-Length: \xb2"), 400),
        (request("POST", TOKEN, "x: folded", "  on"), 400),
        (request("POST", TOKEN, "a name: x"), 400),
        (request("POST", TOKEN, "x: a\rb"), 400),
        (request("POST", TOKEN + "\r"), 400),
        (request("POST", TOKEN, "x: a\0b"), 400),
        (request("POST", TOKEN, *["x: y"] * 70), 431),
        (b"POST /stop HTTP/1.1\r\nx: " + b"y" * 2**14, 431),
        (b"POST /st\xc3\xb6p HTTP/1.1\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00" + bytes(100), 400),
        (b"post /stop HTTP/1.1\r\n", 400),
    ],
)
def test_what_is_refused_stops_nothing_and_leaves_nothing(
    pressed: Pressed, capfd: pytest.CaptureFixture[str], sent: bytes, status: int
) -> None:
    answer = pressed.say(sent)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    told = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert told.startswith("expected ")
    assert TOKEN not in told
    assert pressed.say(request("GET")).endswith(b'{"stopped": false, "reason": ""}')
    assert pressed.reasons == []
    assert capfd.readouterr() == ("", "")


def test_a_head_that_comes_a_byte_at_a_time(pressed: Pressed) -> None:
    with pressed.opened() as connection:
        for byte in request():
            connection.send(bytes((byte,)))
        assert b"200 OK" in heard(connection)


def test_the_operators_page_may_stop_and_pages_of_others_may_not(pressed: Pressed) -> None:
    asked = "Access-Control-Request-Headers: authorization"
    own, allowed = "Origin: http://127.0.0.1:8080", b"Access-Control-Allow-Origin: http://127.0.0.1:8080\r\n"
    preflight = b"OPTIONS /stop HTTP/1.1\r\nHost: 127.0.0.1:1\r\n" + f"{asked}\r\n".encode()
    answer = pressed.say(preflight + own.encode() + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 204 ")
    assert allowed in answer
    assert b"Access-Control-Allow-Headers: authorization\r\n" in answer
    for other in ("http://127.0.0.1:8081", "https://127.0.0.1:8080", "http://evil:8080", "null"):
        answer = pressed.say(preflight + f"Origin: {other}\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 403 ")
        assert b"Access-Control" not in answer
    assert pressed.reasons == []
    assert allowed in pressed.say(request("POST", TOKEN, own))
    assert pressed.reasons == ["the page"]
    assert b"Access-Control" not in pressed.say(request("POST", TOKEN, "Origin: http://evil:8080"))  # but it stops


def test_who_has_shown_the_token_keeps_its_place_and_others_of_its_address_make_room(pressed: Pressed) -> None:
    with ExitStack() as stack:
        kept = stack.enter_context(pressed.opened())
        kept.sendall(request("GET"))
        heard(kept)
        other = stack.enter_context(pressed.opened("127.0.0.2"))
        silent = [stack.enter_context(pressed.opened()) for _ in range(3 * UNKNOWN)]
        silent[0].settimeout(SLOW_S)
        assert silent[0].recv(1) == b""  # the oldest has gone
        kept.sendall(request())
        assert b"200 OK" in heard(kept)
        other.sendall(request())  # older than all that flood, from another address
        assert b"200 OK" in heard(other)
        assert b"200 OK" in pressed.say(request())


def test_who_does_not_show_the_token_in_time_is_dropped(pressed: Pressed) -> None:
    begun = time.monotonic()
    with pressed.opened() as silent, pressed.opened() as slow:
        slow.sendall(b"POST /stop HTTP/1.1\r\n")
        for one in (silent, slow):
            one.settimeout(20)
            assert one.recv(1) == b""
    assert 4 < time.monotonic() - begun < 15


def test_an_owner_that_does_not_answer_is_told_of(pressed: Pressed) -> None:
    pressed.late_s = 3.0
    with pressed.opened() as connection:
        connection.sendall(request())
        assert heard(connection).startswith(b"HTTP/1.1 503 ")
        pressed.late_s = 0.0
        connection.sendall(request("GET"))  # its answer, not the late one
        assert heard(connection).endswith(b'{"stopped": true, "reason": "HTTP"}')


@pytest.mark.parametrize("name", ["gzip bodies", "chunks", "many header fields", "slow heads", "TLS hellos", "garbage"])
def test_a_stop_beside_an_attack(pressed: Pressed, name: str) -> None:
    url = f"http://127.0.0.1:{pressed.port.port}"
    operator = load_http.Operator(f"{url}/stop", url, TOKEN)
    with load_http.run_attack(name, [pressed.port.port]) as did:
        row = operator.run(1.0)
    operator.close()
    assert did["connections"] > 0
    assert all(way["stops"] > 2 and way["p50_ms"] < SLOW_S * 1e3 for way in row.values()), row
    assert row["kept"]["failed"] == {}
    assert not pressed.lost.is_set()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_over_tls_a_handshake_that_is_not_finished_delays_nobody(tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(certificate), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    pressed, trusted = Pressed(certificate=certificate, key=key), ssl.create_default_context(cafile=certificate)
    try:
        with ExitStack() as stack:
            for sent in (b"", load_http._hello()[:50], load_http._hello(), b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000)):
                for _ in range(10):
                    with suppress(OSError):
                        stack.enter_context(pressed.opened()).sendall(sent)
            seconds = []
            for _ in range(5):
                begun = time.perf_counter()
                with trusted.wrap_socket(pressed.opened(), server_hostname="127.0.0.1") as connection:
                    connection.sendall(request())
                    assert b"200 OK" in heard(connection)
                seconds.append(time.perf_counter() - begun)
            assert statistics.median(seconds) < SLOW_S
        assert pressed.port.url.startswith("https://127.0.0.1:")
        assert not pressed.lost.is_set()
    finally:
        pressed.port.close()


def test_a_listener_that_dies_stops_and_cannot_be_released() -> None:
    switch = StopSwitch()
    with switch.listen(keyboard=None, port=0):
        pids = children(os.getpid())
        found = [pid for pid in pids if b"stop_listener" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(found[-1], signal.SIGKILL)
        deadline = time.monotonic() + 10
        while not switch.stopped and time.monotonic() < deadline:
            time.sleep(0.01)
        assert switch.reason == f"lost POST {switch.url}"
        with pytest.raises(UserError, match="lost POST http"):
            switch.release()


def test_a_listener_that_cannot_start_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    port = StopPort("127.0.0.1", 0)
    with pytest.raises(UserError, match=r"expected the stop's listener to start, found: .*PEM"):
        port.start(TOKEN, broken, broken)
    with pytest.raises(UserError, match="expected a port of 0 to 65535 for the stop, found 70000"):
        StopPort("127.0.0.1", 70000)


def test_a_head_is_parsed_in_linear_time() -> None:
    """Blanks before a character that is not allowed make some expressions try every place."""
    begun = time.perf_counter()
    with pytest.raises(Refusal):
        http_head.parse(b"GET / HTTP/1.1\r\na:" + b" " * 8000 + b"x" + b" " * 8000 + b"\x01\r\n\r\n")
    assert time.perf_counter() - begun < 0.05


@pytest.mark.parametrize(
    ("field", "host"),
    [("127.0.0.1:8080", "127.0.0.1"), ("robot.local", "robot.local"), ("[::1]:80", "[::1]"), ("a;b", None), ("", None)],
)
def test_hosts(field: str, host: str | None) -> None:
    assert http_head.host(field) == host
