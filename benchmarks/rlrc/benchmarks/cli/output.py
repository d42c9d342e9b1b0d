"""Shared parts of the benchmark commands: options, progress, and output of results."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from rlrc.benchmarks.results import machine
from rlrc.benchmarks.results.results import NamedArtifact, check_out, dump, open_artifacts, write
from rlrc.progress import EVERY_S, interactive, status
from rlrc.progress import progress as progress_of
from rlrc.tables import print_table


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    out: Path | None = None
    """result file to write"""
    json: bool = False
    """print the result as JSON instead"""

    def finish(self, result: dict[str, Any], table: Table, note: str) -> None:
        """Write the result and print it."""
        if self.out:
            write(self.out, dump(result))
        if self.json:
            print(json.dumps(result))
            return
        console = Console()
        print_table(table, console)
        if note:
            console.print(note, soft_wrap=True)
        if self.out:
            console.print(f"next: rlrc report {self.out} --out report.html", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class ResultOptions(OutputOptions):
    force: bool = False
    """replace the result file"""

    def check_out(self) -> None:
        """Raises UserError for a result file that exists or cannot be written; called before any work."""
        check_out(self.out, self.force)


@dataclass(frozen=True, kw_only=True)
class ArtifactOptions(ResultOptions):
    """Options of the benchmarks that compare artifacts."""

    artifacts: Positional[tuple[str, ...]]
    """artifacts, as FOLDER or NAME=FOLDER"""
    baseline: str | None = None
    """artifact to compare the others with (default: the first one)"""
    threads: int = 1
    """threads of each engine"""

    def open_artifacts(self) -> list[NamedArtifact]:
        """The artifacts, the baseline first. Raises UserError as ``check_out`` and ``open_artifacts`` do."""
        self.check_out()
        return open_artifacts([*([self.baseline] if self.baseline else []), *self.artifacts])


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield ``advance(more)``, which adds ``more`` to the progress towards ``total``."""
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        report(done, "")

    with progress_of(what, total) as report:
        report(0, "")
        yield advance


@contextmanager
def plain_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """``progress`` without a bar (1 to 2 MB) or a thread, where memory or time of this process are measured."""
    done, end, last = 0, "\r" if sys.stderr.isatty() else "\n", time.monotonic()

    def advance(more: int) -> None:
        nonlocal done, last
        before, done, now = done, done + more, time.monotonic()
        if sys.stderr.isatty() or 10 * before // total < 10 * done // total or now - last >= EVERY_S:
            last = now
            sys.stderr.write(f"{what} {done}/{total}{end}")
            sys.stderr.flush()

    yield advance
    if done:
        sys.stderr.write("\n" * sys.stderr.isatty())


@contextmanager
def stages(what: str) -> Iterator[Callable[[str], None]]:
    """Yield ``step(now)``, which shows the current stage and its duration; without a terminal, one line a stage."""
    with status(what) as report:

        def step(now: str) -> None:
            report(f"{what}: {now}")
            if not interactive():
                print(f"{what}: {now}", file=sys.stderr, flush=True)

        yield step


def result_of(kind: str, rows: list[dict[str, Any]], threads: int) -> dict[str, Any]:
    return {"kind": kind, "command": machine.command(), "machine": machine.describe(threads), "rows": rows}
