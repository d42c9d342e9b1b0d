"""`rlrc serve` in a process of its own, as an operator starts it, for the tests of protocols and clients."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

from procfs import children

STATE = TemporaryDirectory(prefix="rlrc-state-")
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    "XDG_STATE_HOME": STATE.name,
}


class Served:
    """On any free port of the loopback; ``ports`` by protocol. Ready at once, unless it is told not to wait."""

    def __init__(self, artifact: Path, *options: str, protocols: tuple[str, ...] = ("openpi",), port: int = 0) -> None:
        command = [sys.executable, "-m", "rlrc.runtime.cli", "serve", str(artifact), "--port", str(port)]
        self.process = subprocess.Popen(
            [*command, "--protocol", *protocols, *options],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline()]
        while lines[-1] and not lines[-1].startswith("ready:"):
            lines.append(self.process.stdout.readline())
        if not lines[-1]:
            raise AssertionError((lines, self.process.communicate(timeout=30)))
        self.lines = lines
        self.page = next((line.split()[1] for line in lines if line.startswith("page:")), None)
        self.ports = {
            name: int(line.split()[1].rpartition(":")[2]) for name, line in zip(protocols, lines, strict=False)
        }

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """-> exit code, what it wrote on stderr."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        _, complaints = self.process.communicate(timeout=30)
        return self.process.returncode, complaints

    def get(self, path: str, protocol: str = "openpi", **headers: str) -> tuple[int, str]:
        """-> status and body of an HTTP GET."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.ports[protocol]}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def worker(self) -> int:
        """The process that infers."""
        found = children(self.process.pid)
        workers = [pid for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(workers) == 1
        return workers[0]


def said(port: int, first: bytes, then: bytes = b"", seconds: float = 20.0) -> bytes:
    """All that comes until the server closes the connection. ``then`` is sent after the answer to ``first``."""
    found = b""
    with socket.create_connection(("127.0.0.1", port), seconds) as connection:
        try:
            connection.sendall(first)
            found += connection.recv(2**16)
            connection.sendall(then)
            while part := connection.recv(2**16):
                found += part
        except ConnectionError:
            pass
    return found


def wait_for(condition: object, seconds: float = 20.0) -> None:
    """Until ``condition()`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
