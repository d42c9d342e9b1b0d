"""A shell on another machine by ssh, or on this one.

The other side needs a POSIX shell, GNU coreutils and find; rlrc is not needed there to receive an artifact.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from rlrc.errors import UserError

BLOCK = 1 << 20
LOST = 255  # exit code of ssh if ssh itself failed
OPTIONS = (
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=10",
    "-o",
    "ServerAliveInterval=5",
    "-o",
    "ServerAliveCountMax=3",
)


class ConnectionLost(Exception):
    """The connection failed, not the command."""


class Shell:
    """``prefix`` takes a command line as its last argument; ``where`` names it in errors."""

    def __init__(self, prefix: Sequence[str], where: str) -> None:
        self._prefix, self.where = tuple(prefix), where

    @classmethod
    def ssh(cls, host: str, program: str = "ssh") -> Shell:
        """``host`` as ssh takes it: [user@]host, or a name of ~/.ssh/config; ``program`` with its own options.

        Raises UserError for an invalid host.
        """
        if not re.fullmatch(r"[\w.@:%\[\]-]+", host) or host.startswith("-"):
            raise UserError(f"expected a host as ssh takes it, found {host!r}; give [user@]host")
        name, *options = shlex.split(program)
        return cls((name, *OPTIONS, *options, host), host)

    def run(self, command: str, text: str | None = None) -> str:
        """The command's output. ``text``: its input. Raises ConnectionLost, and UserError if the command fails."""
        code, out, complaint = self.attempt(command, text)
        if code:
            raise UserError(f"expected {self._short(command)} to work on {self.where}, found: {complaint}; see there")
        return out

    def attempt(self, command: str, text: str | None = None) -> tuple[int, str, str]:
        """(exit code, output, last line of its errors). Raises ConnectionLost."""
        try:
            done = subprocess.run(
                [*self._prefix, command],
                input=text or "",
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
        except FileNotFoundError as error:
            raise UserError(f"expected the program {error.filename}, found none; install it") from None
        complaint = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        if done.returncode == LOST:
            raise ConnectionLost(complaint)
        return done.returncode, done.stdout, complaint

    def live(self, command: str) -> int:
        """Runs the command in this terminal; -> its exit code. Raises ConnectionLost."""
        program, *rest = self._prefix
        terminal = ["-t"] if program.endswith("ssh") else []
        code = subprocess.call([program, *terminal, *rest, command])
        if code == LOST:
            raise ConnectionLost("the connection ended")
        return code

    def send(self, command: str, source: Path, start: int, sent: Callable[[int], None]) -> None:
        """Sends the file from the byte ``start`` on to the command; calls ``sent`` with the size of each block.

        Raises ConnectionLost, and UserError if the command fails.
        """
        with source.open("rb") as stream:
            stream.seek(start)
            process = subprocess.Popen(
                [*self._prefix, command], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            assert process.stdin is not None
            assert process.stderr is not None
            try:
                with suppress(BrokenPipeError):  # the exit code says why
                    _copy_stream(stream, process.stdin, sent)
            finally:
                with process.stderr as complaints:
                    with suppress(BrokenPipeError):
                        process.stdin.close()
                    errors = complaints.read().decode(errors="replace").strip()
                code = process.wait()
        if code == LOST or code < 0:
            raise ConnectionLost(errors.splitlines()[-1] if errors else f"exit code {code}")
        if code:
            raise UserError(
                f"expected to write on {self.where}, found: {errors or f'exit code {code}'}; make room there"
            )

    def _short(self, command: str) -> str:
        return command if len(command) < 60 else f"{command[:57]}..."


def _copy_stream(stream: IO[bytes], into: IO[bytes], sent: Callable[[int], None]) -> None:
    while block := stream.read(BLOCK):
        into.write(block)
        sent(len(block))
