"""SIGINT, SIGTERM and SIGHUP raise Interrupted while a command works, so that it cleans up and says how to continue.

``hold`` puts that off where a state would be left half changed. Needs the standard library only.
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
_pending: int | None = None  # the signal that came while it was held


@contextmanager
def raise_on_signal() -> Iterator[None]:
    """Within it the signals raise Interrupted in the main thread; in another thread it does nothing.

    One that is ignored stays so: nohup ignores SIGHUP, and shells ignore SIGINT for what a script starts with ``&``.
    """
    global _pending
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [number for number in NUMBERS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _on_signal) for number in heeded}
    try:
        yield
    finally:
        _pending = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def hold() -> Iterator[None]:
    """A signal that comes within it raises when it ends. May be nested."""
    global _holding
    _holding += 1
    try:
        yield
    finally:
        _holding -= 1
    check()


def pending() -> bool:
    """Whether a signal came that is still held."""
    return _pending is not None


def check() -> None:
    """Raises Interrupted for a signal that came and is no longer held."""
    global _pending
    if _pending is not None and not _holding:
        number, _pending = _pending, None
        raise Interrupted(code=128 + number)


def stop() -> NoReturn:
    """Raises Interrupted, held or not: all processes of a team end together, whichever of them received the signal."""
    global _pending
    number, _pending = _pending or signal.SIGINT, None
    raise Interrupted(code=128 + number)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _pending
    _pending = number
    check()
