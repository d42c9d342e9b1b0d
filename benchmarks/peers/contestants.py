"""Contestants as the race sees them: separate processes that compute one chunk per request."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from select import select
from typing import Any

HERE = Path(__file__).resolve().parent
ROOTS = ("compressor", "exporters", "runtime", "benchmarks", "jetson")
WAIT_S = 900.0  # compilation takes minutes on a busy machine


class Skip(Exception):
    """The contestant cannot run; the message states the reason."""


@dataclass
class Contestant:
    """``python``: interpreter of the contestant's environment; ``script``: file in this folder."""

    name: str
    python: str
    script: str
    arguments: Sequence[str]
    metadata: dict[str, Any] = field(default_factory=dict)
    trials: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    process: Any = None

    def start(self, threads: int) -> None:
        """Start the process. Raises Skip with the reason if the contestant cannot run."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        environment["PYTHONPATH"] = os.pathsep.join(str(HERE.parents[1] / root) for root in ROOTS)
        if self.script == "run_lerobot.py":
            del environment["PYTHONPATH"]  # it runs in a separate environment without rlrc
        try:
            self.process = subprocess.Popen(
                [self.python, str(HERE / self.script), *self.arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
            )  # fmt: skip
        except OSError as error:
            raise Skip(f"{self.python} cannot be run: {error.strerror}") from None
        self.metadata = self._answer()

    def ask(self, word: str) -> dict[str, Any]:
        try:
            self.process.stdin.write(f"{word}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Skip(self._ended()) from None
        return self._answer()

    def act(self) -> tuple[float, float]:
        """Compute a chunk. Returns milliseconds of wall time and of CPU time over all cores."""
        answer = self.ask("act")
        return float(answer["ms"]), float(answer["cpu_ms"])

    def trial(self) -> None:
        milliseconds, spent = self.act()
        self.trials.append(milliseconds)
        self.processor.append(spent)

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            with suppress(BrokenPipeError):  # close() flushes requests that the process did not read
                self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()

    def _answer(self) -> dict[str, Any]:
        if not select([self.process.stdout], [], [], WAIT_S)[0]:
            raise Skip(f"no answer within {WAIT_S:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise Skip(self._ended())
        answer: dict[str, Any] = json.loads(line)
        if "skipped" in answer:
            raise Skip(answer["skipped"])
        return answer

    def _ended(self) -> str:
        return f"its process ended with code {self.process.wait()}"
