"""The client's WebSocket against the library's own server: messages of any form, pings, ends, and who is silent."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosedError, ConnectionClosedOK, InvalidMessage, InvalidStatus
from websockets.sync.server import ServerConnection, serve

from rlrc.runtime.wire import websocket
from rlrc.runtime.wire.websocket import WebSocket


@contextmanager
def served(answer: Callable[[ServerConnection], None], **options: object) -> Iterator[str]:
    with serve(answer, "127.0.0.1", 0, compression=None, **options) as server:  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()


def opened(url: str, seconds: float = 10.0, **headers: str) -> WebSocket:
    return WebSocket(url, None, headers, 2**22, seconds)


def echo(connection: ServerConnection) -> None:
    for message in connection:
        connection.send(message)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 2**16, 3 * 2**20])
def test_what_is_sent_comes_back(size: int) -> None:
    message = bytes(range(256)) * (size // 256) + bytes(size % 256)
    with served(echo, max_size=None) as url:
        connection = opened(url)
        for _ in range(2):
            assert connection.ask(message, 10) == message
        connection.close()


def test_text_fragments_and_a_first_word() -> None:
    def answer(connection: ServerConnection) -> None:
        connection.send("hello \u00e9")
        connection.recv()
        connection.send([b"one", b"two", b"three"])

    with served(answer) as url:
        connection = opened(url)
        assert connection.receive(10) == "hello \u00e9"
        assert connection.ask(b"x", 10) == b"onetwothree"
        with pytest.raises(ConnectionClosedOK):
            connection.ask(b"x", 10)
        connection.close()


def test_pings_are_answered_while_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "PING_CHECK_S", 0.05)
    with served(echo, ping_interval=0.1, ping_timeout=0.5) as url:
        connection = opened(url)
        time.sleep(1.5)
        assert connection.ask(b"still there", 10) == b"still there"
        connection.close()


def test_who_does_not_answer_in_time() -> None:
    over = threading.Event()

    def wait(connection: Any) -> None:
        over.wait(20)

    with served(wait) as url:
        connection = opened(url)
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            connection.ask(b"x", 0.2)
        assert time.monotonic() - begun < 5
        connection.close()
        over.set()


def test_a_handshake_that_is_refused_or_none() -> None:
    def refuse(connection: ServerConnection, request: object) -> object:
        return connection.respond(401, "no\n")

    with served(echo, process_request=refuse) as url, pytest.raises(InvalidStatus, match="401"):
        opened(url)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"ws://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TimeoutError):
            opened(url, 0.2)
    with pytest.raises(ConnectionRefusedError):
        opened(url)


def test_a_server_that_speaks_something_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"220 mail at your service\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(InvalidMessage):
            opened(f"ws://127.0.0.1:{other.getsockname()[1]}")
        thread.join()


def test_one_that_is_lost_and_one_that_says_why() -> None:
    def lose(connection: ServerConnection) -> None:
        connection.recv()
        connection.socket.shutdown(socket.SHUT_RDWR)

    with served(lose) as url:
        connection = opened(url)
        for _ in range(2):  # and stays so
            with pytest.raises(ConnectionClosedError):
                connection.ask(b"x", 10)
        connection.close()
    with served(lambda connection: connection.close(1011, "broken")) as url:
        connection = opened(url)
        time.sleep(0.2)
        with pytest.raises(ConnectionClosedError) as ended:
            connection.ask(b"x", 10)
        assert ended.value.rcvd is not None
        assert (ended.value.rcvd.code, ended.value.rcvd.reason) == (1011, "broken")
        connection.close()


def test_more_than_there_may_be() -> None:
    with served(lambda connection: connection.send(bytes(2**22 + 1))) as url:
        connection = opened(url)
        with pytest.raises(ConnectionClosedError):
            connection.receive(10)
        connection.close()
