"""What the measuring commands have in common: a progress bar, the head of a result, and its file and table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from rlrc.benchmarks import machine
from rlrc.benchmarks.results import dump, write
from rlrc.runtime.tables import print_table


class Command(Protocol):
    @property
    def out(self) -> Path | None: ...
    @property
    def json(self) -> bool: ...


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda more: bar.advance(task, more)


@contextmanager
def plain_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """``progress`` where the memory of this process is measured: a bar takes a megabyte or two more."""
    done, end = 0, "\r" if sys.stderr.isatty() else "\n"

    def advance(more: int) -> None:
        nonlocal done
        before, done = done, done + more
        if sys.stderr.isatty() or 10 * before // total < 10 * done // total:
            sys.stderr.write(f"{what} {done}/{total}{end}")
            sys.stderr.flush()

    yield advance
    if done:
        sys.stderr.write("\n" * sys.stderr.isatty())


@contextmanager
def stages(what: str) -> Iterator[Callable[[str], None]]:
    """What is being done and for how long; where nobody watches, a line for each."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what)

        def step(now: str) -> None:
            bar.update(task, description=f"{what}: {now}")
            if not console.is_terminal:
                console.print(f"{what}: {now}", soft_wrap=True, highlight=False)

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
