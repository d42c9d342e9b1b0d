"""What strangers send to the ports that aiohttp answers: refused in one line, before aiohttp, and never in a log."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from load_http import _zeros, _zstd
from serving import Served, said, wait_for

from rlrc.errors import UserError
from rlrc.printable import printable

pytest.importorskip("aiohttp", reason="needs the extra serve")
from rlrc.runtime.page.server import read_text

TOKEN = "hush-hush"
SLOW_S = 1.0  # beside other tests; gzipped blanks took 4 s a request before


@pytest.fixture(scope="module")
def served(arm_toy: Path) -> Iterator[Served]:
    options = ["--mapping", "openvla", "openvla-oft", "--page", "0", "--token", TOKEN]
    with Served(arm_toy, *options, protocols=("openpi", "openvla")) as running:
        yield running


def ports(served: Served) -> dict[str, int]:
    assert served.page is not None
    return {"/act": served.ports["openvla"], "/stop": int(served.page.split("/#")[0].rpartition(":")[2])}


def post(path: str, body: bytes, *fields: str, token: str = TOKEN) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {token}", "Connection: close", *fields]
    return ("\r\n".join([*lines, f"Content-Length: {len(body)}"]) + "\r\n\r\n").encode("latin-1") + body


@pytest.mark.parametrize("path", ["/act", "/stop"])
@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", _zeros(31)),
        ("x-gzip", b"{}"),
        ("deflate", _zeros(15)),
        ("br", b"\x0b\x02\x80\x00\x03"),
        ("zstd", _zstd()),
        ("GZIP", b"not gzip"),
        ("gzip, identity", b"{}"),
    ],
)
def test_encoded_bodies_are_refused_with_the_token_and_without(
    served: Served, path: str, coding: str, body: bytes
) -> None:
    for token in (TOKEN, "wrong"):
        begun = time.monotonic()
        answer = said(ports(served)[path], post(path, body, f"Content-Encoding: {coding}", token=token))
        assert answer.startswith(b"HTTP/1.1 415 "), answer
        assert answer.endswith(
            b"\r\n\r\nexpected a body without Content-Encoding, found an encoded one; send it as it is\n"
        )
        assert time.monotonic() - begun < SLOW_S + 1  # it may linger for a second


def test_the_stop_beside_encoded_bodies(served: Served) -> None:
    """Four connections of gzipped blanks to the page delayed it by 13 s."""
    port, body = ports(served)["/stop"], _zeros(31)
    connections = [socket.create_connection(("127.0.0.1", port), 20) for _ in range(4)]
    try:
        for connection in connections:
            connection.sendall(post("/", body, "Content-Encoding: gzip", token="none"))
        begun = time.monotonic()
        answer = said(port, b"GET /stop HTTP/1.0\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\n\r\n")
        assert b'{"stopped": false' in answer
        assert time.monotonic() - begun < SLOW_S
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("path", ["/act", "/stop"])
@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (post("{}", b"", token="\xe9\xff"), 401),
        (post("{}", b"", token="wrong"), 401),
        (post("{}", b"", "x: y\r\n folded"), 400),
        (post("{}", b"", "x: a\rb"), 400),
        (post("{}", b"", token=TOKEN + "\r"), 400),
        (post("{}", b"", "Content-Length: 0"), 400),
        (post("{}", b"", "Upgrade: websocket"), 400),
        (post("{}", b"", *["x: y"] * 100), 431),
        (post("{}", b"", "x: " + "y" * 2**15), 431),
        (post("{}", b"", "Transfer-Encoding: gzip, chunked"), 411),
        (b"POST {} HTTP/1.1\r\nContent-Length: \xb2\r\n\r\n", 400),
        (b"POST {} HTTP/1.1\r\nAuthorization: Bearer hush-hush\r\nContent-Length: 999999999\r\n\r\n", 413),
        (b"POST {} HTTP/3.0\r\nAuthorization: Bearer hush-hush\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01" + bytes(100), 400),
        (b"GET / HTTP/1.1\r\nAuthorization: Bearer hush-hush\r\n\r\n" * 5000, None),
    ],
)
def test_what_is_no_proper_request_is_refused(served: Served, path: str, sent: bytes, status: int | None) -> None:
    answer = said(ports(served)[path], sent.replace(b"{}", path.encode()))
    if status is not None:
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer
        body = answer.partition(b"\r\n\r\n")[2]
        assert body.startswith(b"expected ")
        assert body.endswith(b"\n")
        assert body.count(b"\n") == 1
    assert TOKEN.encode() not in answer
    assert answer.count(b"HTTP/1.1 ") < 20


def test_the_page_takes_what_it_can_take(served: Served) -> None:
    port = ports(served)["/stop"]
    deep = b'{"text": ' + b"[" * 1900 + b"]" * 1900 + b"}"
    for body in (b'{"text": "\\ud800"}', b'{"text": "a\\u001b[31mb\\u0000"}', b'{"text": null}'):
        assert said(port, post("/instruction", body)).startswith(b"HTTP/1.1 200 ")
    for body in (deep, b'{"text": 5}', b"\xff", b"", b"[1]", b'{"text": "%s"}' % (b"x" * 501)):
        assert said(port, post("/instruction", body)).startswith(b"HTTP/1.1 400 "), body[:20]
    for cursor in ("\u00b2".encode(), b"9" * 400, b"-1", b"%C2%B2", b"1e3", b"%D9%A3"):
        asked = b"GET /camera/0?after=%s HTTP/1.0\r\nAuthorization: Bearer %s\r\n\r\n" % (cursor, TOKEN.encode())
        assert said(port, asked)[9:12] in (b"400", b"404"), cursor


def test_bodies_that_never_come_are_not_waited_for(served: Served) -> None:
    begun = time.monotonic()
    answer = said(ports(served)["/stop"], post("/rearm", b"{}")[:-1])
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - begun < 20


def test_no_token_and_no_byte_of_a_stranger_is_in_the_log(arm_toy: Path) -> None:
    """Of a server with a page; it is stopped by Ctrl-C, which reaches the page's process as well."""
    sent = [
        b"POST /stop HTTP/1.1\r\nAuthorization: Bearer %s\r\r\n\r\n" % TOKEN.encode(),
        b"GET / HTTP/1.1\r\nAuthorization: Bearer %s\r\nx\r\n\r\n" % TOKEN.encode(),
        b"GET /%s HTTP/9.9\r\n\r\n" % TOKEN.encode(),
        b"%s / HTTP/1.1\r\n\r\n" % TOKEN.encode(),
        post("/act", b"{}", "Content-Encoding: gzip"),
        post("/act", b"{}", "Content-Length: 1"),
    ]
    options = ["--mapping", "openvla", "openvla-oft", "--page", "0", "--token", TOKEN]
    with Served(arm_toy, *options, protocols=("openpi", "openvla")) as served:
        for port in ports(served).values():
            for one in sent * 5:
                said(port, one)
        said(served.ports["openpi"], sent[0])
        wait_for(lambda: served.get("/readyz")[0] == 200)
        code, log = served.end(signal.SIGINT)
    assert code == 0
    assert TOKEN not in log
    assert "Traceback" not in log
    assert "Invalid file descriptor" not in log
    assert len(log.splitlines()) < 10, log


def test_openpis_port_inflates_nothing(served: Served) -> None:
    asked = (
        b"Host: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nAuthorization: Api-Key hush-hush\r\n"
        b"Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n\r\n"
    )
    frame = b"\xc2\x8a" + bytes(4) + _zeros(-15)[:10]  # compressed, by its first bit
    with socket.create_connection(("127.0.0.1", served.ports["openpi"]), 10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n" + asked)
        answer = connection.recv(2**16)
        connection.sendall(frame)
        while part := connection.recv(2**16):
            answer += part
    assert answer.startswith(b"HTTP/1.1 101 ")
    assert b"Extensions" not in answer
    assert answer.endswith(b"reserved bits must be 0")
    encoded = b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\n\r\n"
    assert said(served.ports["openpi"], encoded).startswith(b"HTTP/1.1 415 ")


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("close\nit", "close it"),
        (" a \x1b[2Jb\x9b", "a ?[2Jb?"),
        ("\ud800x", "?x"),
        ("\u202eabc", "?abc"),
        ("é 手", "é 手"),
    ],
)
def test_words_are_one_line_that_can_be_printed(text: str, printed: str) -> None:
    assert read_text(json.dumps({"reason": text}).encode(), "reason") == printed
    assert printable(printed) == printed


@pytest.mark.parametrize("body", [b"", b"{}", b'{"reason": []}', b'{"reason": 1}', b'{"reason"', b"[" * 10**5, b"null"])
def test_what_has_no_words_is_refused(body: Any) -> None:
    with pytest.raises(UserError, match=r"expected .*reason.* in JSON"):
        read_text(body, "reason")
