"""Progress on stderr: a bar or spinner on a terminal; elsewhere a line after 2 s and then every 30 s.

A thread prints the lines, because a single step may take longer than that.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

FIRST_S, EVERY_S = 2.0, 30.0  # seconds; work that ends sooner prints nothing
Report = Callable[[float, str], None]


@contextmanager
def progress(what: str, total: float, shown: bool = True) -> Iterator[Report]:
    """Yields ``report(done, text)``, where ``done`` counts up to ``total``. The first call sets where work begins."""
    if not shown:
        yield lambda done, text: None
    elif not interactive():
        with _Lines(what, total) as lines:
            yield lines.count
    else:
        # Imported late to save memory where only lines are shown.
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        clocks = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
        with Progress(*columns, *clocks, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total, text="")
            yield lambda done, text: bar.update(task, completed=done, text=text)


@contextmanager
def status(what: str, shown: bool = True) -> Iterator[Callable[[str], None]]:
    """For work that cannot be counted. Yields ``report(what)``, which names the current step."""
    if not shown:
        yield lambda text: None
    elif not interactive():
        with _Lines(what) as lines:
            yield lines.rename
    else:
        from rich.console import Console

        with Console(stderr=True).status(what) as spinner:
            yield spinner.update


def interactive() -> bool:
    """Whether stderr is a terminal that can move its cursor."""
    if not sys.stderr.isatty():
        return False
    from rich.console import Console

    return Console(stderr=True).is_interactive


class _Lines:
    """Lines from a thread: after FIRST_S, then every EVERY_S, and a last one if any was printed."""

    def __init__(self, what: str, total: float | None = None) -> None:
        self.what, self.total = what, total
        self.first: float | None = None  # what was done when it began
        self.done, self.text, self.began = 0.0, "", time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._print, daemon=True)

    def count(self, done: float, text: str) -> None:
        if self.first is None:
            self.first, self.began = done, time.monotonic()
        self.done, self.text = done, text

    def rename(self, what: str) -> None:
        self.what = what

    def line(self) -> str:
        spent = time.monotonic() - self.began
        if self.total is None:
            return f"{self.what}: {_duration(spent)} so far"
        made, clock = self.done - (self.first or 0.0), f"{_duration(spent)} so far"
        if made > 0 and self.done < self.total:
            clock = f"{_duration(spent / made * (self.total - self.done))} left"
        line = f"{self.what}: {self.done:g} of {self.total:g}, {clock}"
        return f"{line}, {self.text}" if self.text else line

    def __enter__(self) -> _Lines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _print(self) -> None:
        pause, printed = FIRST_S, False
        while not self._ended.wait(pause):
            print(self.line(), file=sys.stderr, flush=True)
            pause, printed = EVERY_S, True
        if printed:
            print(self.line(), file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
