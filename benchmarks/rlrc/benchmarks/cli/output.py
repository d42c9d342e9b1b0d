"""What the measuring commands have in common: a progress bar, the head of a result, and its file and table."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from rlrc.benchmarks.results import machine
from rlrc.benchmarks.results.results import dump, write
from rlrc.progress import EVERY_S, interactive, status
from rlrc.progress import progress as progress_of
from rlrc.tables import print_table


class Command(Protocol):
    @property
    def out(self) -> Path | None: ...
    @property
    def json(self) -> bool: ...


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """``advance(more)``, of so many in all."""
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        tell(done, "")

    with progress_of(what, total) as tell:
        tell(0, "")
        yield advance


@contextmanager
def plain_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """``progress`` where the memory and the time of this process are measured: a bar takes a megabyte or two more, and
    this prints in no thread of its own."""
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
    """What is being done and for how long; where nobody watches, a line for each."""
    with status(what) as tell:

        def step(now: str) -> None:
            tell(f"{what}: {now}")
            if not interactive():
                print(f"{what}: {now}", file=sys.stderr, flush=True)

        yield step


def result_of(kind: str, rows: list[dict[str, Any]], threads: int) -> dict[str, Any]:
    return {"kind": kind, "command": machine.command(), "machine": machine.describe(threads), "rows": rows}


def finish(command: Command, result: dict[str, Any], table: Table, note: str) -> None:
    if command.out:
        write(command.out, dump(result))
    if command.json:
        print(json.dumps(result))
        return
    console = Console()
    print_table(table, console)
    if note:
        console.print(note, soft_wrap=True)
    if command.out:
        console.print(f"next: rlrc report {command.out} --out report.html", soft_wrap=True)
