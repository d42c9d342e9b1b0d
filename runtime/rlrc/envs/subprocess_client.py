"""Run a program in another Python environment that answers requests over its stdin and stdout, with timeouts.

A message is four bytes of length (big-endian) and a msgpack map. If the program fails, the last line of its stderr goes
into the error.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import struct
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack

from rlrc.errors import UserError

LARGEST = 64 * 1024 * 1024  # bytes of a message
CLOSE_TIMEOUT_S = 10.0  # time to exit after stdin is closed


class SubprocessClient:
    """``what``: its name in errors. Raises UserError if it cannot be started. Closed at the latest when collected."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], what: str) -> None:
        self.what = what
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the program runs)
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=dict(environment),
                bufsize=0,
            )
        except OSError as error:
            self._stderr.close()
            raise UserError(
                f"expected to start {what} with {command[0]}, found: {error.strerror}; check that path"
            ) from None
        self._end = weakref.finalize(self, _end, self._process, self._stderr)

    def request(self, request: bytes, seconds: float) -> dict[str, Any]:
        """Send a message and wait for the answer. Raises UserError on failure or after ``seconds``."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # the program died: receive() reports how
            self._process.stdin.write(request)
        return self.receive(seconds)

    def receive(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        (length,) = struct.unpack(">I", self._read(4, deadline, seconds))
        if length > LARGEST:
            raise self._make_error(f"a message of {length} bytes")
        try:
            message = msgpack.unpackb(self._read(length, deadline, seconds))
        except ValueError:  # the base of msgpack's errors
            raise self._make_error("a message that is not msgpack") from None
        if not isinstance(message, dict):
            raise self._make_error(f"a message that is a {type(message).__name__}")
        return message

    def close(self) -> None:
        """Close its stdin; kill the program if it does not exit then."""
        self._end()

    def _read(self, size: int, deadline: float, seconds: float) -> bytes:
        assert self._process.stdout is not None
        stream, data = self._process.stdout.fileno(), b""
        while len(data) < size:
            ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._make_error(f"no answer within {seconds:g} s")
            if not (part := os.read(stream, size - len(data))):
                raise self._make_error(self._describe_exit())
            data += part
        return data

    def _describe_exit(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_TIMEOUT_S)
        code = self._process.returncode
        if code is None:
            return "its stdout closed"
        return f"that it was killed by {signal.Signals(-code).name}" if code < 0 else f"that it exited with code {code}"

    def _make_error(self, found: str) -> UserError:
        line = self._last_line()
        self.close()
        return UserError(
            f"expected an answer from {self.what}, found {found}{line and f': {line}'}; "
            "correct that, or run the command again"
        )

    def _last_line(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip()[:300] if lines else ""


def _end(process: subprocess.Popen[bytes], stderr: Any) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
    try:
        process.wait(0 if process.poll() is not None else CLOSE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    stderr.close()
