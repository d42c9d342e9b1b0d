"""A port for POST /stop. Its listener is a separate process (stop_listener.py); this is the controlling end.

    port = StopPort("127.0.0.1", 0)                      # takes the address; requests wait
    port.start(token)
    while port.ready(press, state): ...                  # if its descriptor is readable; False: the listener ended
    port.close()

The address is bound first, so that the operator's page can get the port before the listener answers.
"""

from __future__ import annotations

import json
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlrc.errors import UserError
from rlrc.runtime.control.stop_listener import PRESS, READY
from rlrc.runtime.wire.packets import receive
from rlrc.runtime.wire.ports import url

LISTENER = "rlrc.runtime.control.stop_listener"
OPENING_S, CLOSING_S = 60.0, 1.0
WAITING = 512  # connections that the kernel keeps until the listener accepts them


class StopPort:
    """``url`` is where to POST. Raises UserError if the address is in use."""

    def __init__(self, host: str, port: int) -> None:
        if not 0 <= port < 2**16:
            raise UserError(f"expected a port of 0 to 65535 for the stop, found {port}; give another")
        try:
            family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
            where = (address[0], port, *address[2:])
            self._listening = socket.create_server(where, family=family, backlog=WAITING)
        except OSError as error:
            raise UserError(f"expected a free port on {host}, found {port}: {error}; give another") from None
        self.port = int(self._listening.getsockname()[1])
        self._host = host
        self._wire, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = False
        self._thread: threading.Thread | None = None
        self.url = ""

    def start(
        self, token: str, certificate: Path | None = None, key: Path | None = None, page: int | None = None
    ) -> None:
        """``page``: the port of the operator's page, which may send stops from a browser."""
        self.url = url("http" if certificate is None else "https", self._host, self.port) + "/stop"
        descriptors = self._listening.fileno(), self._theirs.fileno()
        # Isolated (-I): neither the current folder nor the environment can change what is imported.
        root = str(Path(__file__).parents[3])
        code = f"import sys; sys.path.insert(0, {root!r}); from {LISTENER} import main; main{descriptors}"
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", code],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        self._listening.close()
        self._theirs.close()  # so that ours reports the end when the listener dies
        given = {"token": token, "certificate": certificate and str(certificate), "key": key and str(key), "page": page}
        self._wire.settimeout(OPENING_S)
        try:
            self._wire.send(json.dumps(given).encode())
            answer = self._wire.recv(1024).decode()
        except OSError as error:
            answer = str(error)
        if answer != READY:
            self.close()
            raise UserError(f"expected the stop's listener to start, found: {answer or 'it ended'}; see above")
        self._wire.setblocking(False)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def fileno(self) -> int:
        return self._wire.fileno()

    def ready(self, press: Callable[[str], object], state: Callable[[], dict[str, Any]]) -> bool:
        """Reads all messages: calls ``press(reason)`` for each stop, and answers with ``state()``. -> whether the
        listener goes on."""
        while message := receive(self._wire):
            if message.startswith(PRESS):
                press(message.removeprefix(PRESS).decode())
            with suppress(OSError):  # it has ended: the next ``receive`` reports that
                self._wire.send(json.dumps(state()).encode())
        return message is None

    def watch(
        self, press: Callable[[str], object], state: Callable[[], dict[str, Any]], lost: Callable[[], object]
    ) -> None:
        """Calls ``ready`` in a thread until ``close``; calls ``lost`` if the listener ends before."""

        def listen() -> None:
            while select.select([self._wire], (), ())[0] and self.ready(press, state):
                pass
            if not self._closing:
                lost()

        self._thread = threading.Thread(target=listen, name="stop port", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the listener once it has passed on the answers that were given, or after ``CLOSING_S`` seconds."""
        self._closing = True
        with suppress(OSError):  # the listener has ended already
            self._wire.shutdown(socket.SHUT_RDWR)  # wakes the thread, and ends the listener
        if self._thread is not None:
            self._thread.join()
        if self._process is not None:
            try:
                self._process.wait(CLOSING_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._listening.close()
        self._theirs.close()
        self._wire.close()
