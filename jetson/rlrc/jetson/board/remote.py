"""A shell on another machine: commands by ssh, or, the same code, by a shell on this one.

What is asked of the other side is a POSIX shell, GNU coreutils and find: it needs no rlrc to be sent an artifact.
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
LOST = 255  # what ssh ends with when it is ssh that failed
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
    """The way there failed, not what was asked."""


class Shell:
    """``prefix`` takes a command line as its last argument; ``where`` names it in errors."""

    def __init__(self, prefix: Sequence[str], where: str) -> None:
        self._prefix, self.where = tuple(prefix), where

    @classmethod
    def ssh(cls, host: str, program: str = "ssh") -> Shell:
        """``host`` as ssh takes it: [user@]host, or a name of ~/.ssh/config; ``program`` with its own options.

        Raises UserError for what is no host.
        """
        if not re.fullmatch(r"[\w.@:%\[\]-]+", host) or host.startswith("-"):
            raise UserError(f"expected a host as ssh takes it, found {host!r}; give [user@]host")
        name, *options = shlex.split(program)
        return cls((name, *OPTIONS, *options, host), host)

    def run(self, command: str, text: str | None = None) -> str:
        """What the command prints. ``text`` is what it reads. Raises ConnectionLost, and UserError if it fails."""
        code, out, complaint = self.attempt(command, text)
        if code:
            raise UserError(f"expected {self._short(command)} to work on {self.where}, found: {complaint}; see there")
        return out

    def attempt(self, command: str, text: str | None = None) -> tuple[int, str, str]:
        """(exit code, what it printed, the last line of what it complained about). Raises ConnectionLost."""
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
        """The file from the byte ``start`` on into the command; ``sent`` gets how many more bytes went out.

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
                with suppress(BrokenPipeError):  # its exit code tells why
                    _pour(stream, process.stdin, sent)
            finally:
                with process.stderr as complaints:
                    with suppress(BrokenPipeError):
                        process.stdin.close()
                    said = complaints.read().decode(errors="replace").strip()
                code = process.wait()
        if code == LOST or code < 0:
            raise ConnectionLost(said.splitlines()[-1] if said else f"exit code {code}")
        if code:
            raise UserError(f"expected to write on {self.where}, found: {said or f'exit code {code}'}; make room there")

    def _short(self, command: str) -> str:
        return command if len(command) < 60 else f"{command[:57]}..."


def _pour(stream: IO[bytes], into: IO[bytes], sent: Callable[[int], None]) -> None:
    while block := stream.read(BLOCK):
        into.write(block)
        sent(len(block))
