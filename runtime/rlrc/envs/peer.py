"""A program in a Python environment of its own that answers requests over its stdin and stdout, and never hangs us.

A message is four bytes of length (big-endian) and a msgpack map. What the program prints on stderr is kept: its last
line goes into the error where the program fails.
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

LARGEST = 64 * 1024 * 1024  # bytes of a message; more is no message
PATIENCE = 10.0  # seconds to end after "close"


class Peer:
    """``what`` names it in errors. Raises UserError if it cannot be started; close it, or leave that to Python."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], what: str) -> None:
        self.what = what
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the program runs)
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                env=dict(environment),
                bufsize=0,
            )
        except OSError as error:
            self._complaints.close()
            raise UserError(
                f"expected to start {what} with {command[0]}, found: {error.strerror}; check that path"
            ) from None
        self._end = weakref.finalize(self, _end, self._process, self._complaints)

    def ask(self, request: bytes, seconds: float) -> dict[str, Any]:
        """Send a message and wait for the answer. Raises UserError if it fails or does not come in time."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has died: the missing answer tells how
            self._process.stdin.write(request)
        return self.receive(seconds)

    def receive(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        (length,) = struct.unpack(">I", self._read(4, deadline, seconds))
        if length > LARGEST:
            raise self._failed(f"a message of {length} bytes")
        try:
            message = msgpack.unpackb(self._read(length, deadline, seconds))
        except ValueError:  # msgpack's own errors are such
            raise self._failed("a message that is no msgpack") from None
        if not isinstance(message, dict):
            raise self._failed(f"a message that is a {type(message).__name__}")
        return message

    def close(self) -> None:
        """End it, by force if it does not end by itself once its stdin is closed."""
        self._end()

    def _read(self, size: int, deadline: float, seconds: float) -> bytes:
        assert self._process.stdout is not None
        stream, data = self._process.stdout.fileno(), b""
        while len(data) < size:
            ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._failed(f"no answer within {seconds:g} s")
            if not (part := os.read(stream, size - len(data))):
                raise self._failed(self._ending())
            data += part
        return data

    def _ending(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)
        code = self._process.returncode
        if code is None:
            return "its stdout closed"
        return f"that it was ended by {signal.Signals(-code).name}" if code < 0 else f"that it ended with code {code}"

    def _failed(self, found: str) -> UserError:
        said = self._last_line()
        self.close()
        return UserError(
            f"expected an answer of {self.what}, found {found}{said and f': {said}'}; "
            "correct that, or run the command again"
        )

    def _last_line(self) -> str:
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip()[:300] if lines else ""


def _end(process: subprocess.Popen[bytes], complaints: Any) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        pipe.close()
    try:
        process.wait(0 if process.poll() is not None else PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    complaints.close()
