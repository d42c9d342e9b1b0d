"""SIGINT, SIGTERM and SIGHUP raise Interrupted while a command runs, so that it cleans up and says how to resume.

``hold`` delays that while a state is being changed. Needs the standard library only.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from rlrc.errors import Interrupted

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CODES = {128 + number for number in NUMBERS}  # exit codes of a command that was interrupted

_holding = 0
_pending: int | None = None  # the signal that arrived while signals were held


@contextmanager
def raise_on_signal() -> Iterator[None]:
    """Within the context, signals raise Interrupted in the main thread. In any other thread it does nothing.

    Ignored signals stay ignored: nohup ignores SIGHUP, and shells ignore SIGINT for background jobs of scripts.
    """
    global _pending
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [number for number in NUMBERS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _on_signal) for number in handled}
    try:
        yield
    finally:
        _pending = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def hold() -> Iterator[None]:
    """A signal that arrives within the context raises when the context ends. May be nested."""
    global _holding
    _holding += 1
    try:
        yield
    finally:
        _holding -= 1
    check()


def pending() -> bool:
    """Whether a signal has arrived and is still held."""
    return _pending is not None


def check() -> None:
    """Raises Interrupted for a signal that has arrived and is no longer held."""
    global _pending
    if _pending is not None and not _holding:
        number, _pending = _pending, None
        raise Interrupted(code=128 + number)


def stop() -> NoReturn:
    """Raises Interrupted even while signals are held: all processes of a distributed run end when one gets a signal."""
    global _pending
    number, _pending = _pending or signal.SIGINT, None
    raise Interrupted(code=128 + number)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _pending
    _pending = number
    check()
