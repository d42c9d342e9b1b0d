"""A thread that watches the loop's: a driver's call that hangs would keep every way to stop from working.

    dog = Watchdog(driver, report_hang)
    with dog.watching(seconds):         # around the loop, which calls ``dog.beat`` at every step
        control.run(...)

Where no beat comes for so many seconds, ``robot.stop()`` is called from here; where the loop does not go on after that
either, ``report_hang`` is called, and the process ends with exit code 1. It needs nothing of the loop's thread but the
GIL: an extension that hangs without releasing it hangs this thread too, and only the service manager's watchdog
(rlrc.runtime.control.service_manager) is left.
"""

from __future__ import annotations

import _thread
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager

from rlrc.printable import printable
from rlrc.robots.driver import Driver, describe_driver_error

GRACE = 0.25  # of the bound: a machine that has stood still lets the loop go on first
RETURN_S = 2.0  # for the call to return after robot.stop()
REPORT_S = 30.0  # for log and recording to be written
CLOSING_S = 10.0  # for the driver to be closed

ReportHang = Callable[[str], None]  # with the reason; prints one line
Late = Callable[[], bool]  # whether there has been no beat yet


class Watchdog:
    """``report_hang`` gets the reason where the process has to be ended, and prints it."""

    def __init__(
        self,
        driver: Driver,
        report_hang: ReportHang = lambda reason: print(reason, file=sys.stderr),
        report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self._driver, self.report_hang, self._report, self._end = driver, report_hang, report, end
        self._beaten = time.monotonic()

    def beat(self) -> None:
        """The loop goes on. From its thread."""
        self._beaten = time.monotonic()

    @contextmanager
    def watching(self, seconds: float) -> Iterator[None]:
        """Until the end of the block a beat is expected every ``seconds``; else the robot is stopped."""
        with self._thread(seconds, self._halt):
            yield

    @contextmanager
    def closing(self) -> Iterator[None]:
        """The block is to end within CLOSING_S; else the process is ended."""
        with self._thread(CLOSING_S, self._give_up):
            yield

    @contextmanager
    def _thread(self, seconds: float, act: Callable[[Late], None]) -> Iterator[None]:
        over = threading.Event()
        self.beat()
        threading.Thread(target=self._watch, args=(seconds, act, over), name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _watch(self, seconds: float, act: Callable[[Late], None], over: threading.Event) -> None:
        while not over.is_set():
            seen = self._beaten
            if (left := seen + seconds - time.monotonic()) > 0:
                time.sleep(min(left, 0.5))
                continue

            def late(seen: float = seen) -> bool:
                return self._beaten == seen and not over.is_set()

            time.sleep(GRACE * seconds)
            if late():
                act(late)
                while late():
                    time.sleep(0.01)

    def _halt(self, late: Late) -> None:
        reason = f"{self._what()}; robot.stop() was called"
        _thread.start_new_thread(self._end_if_still, (late,))  # at once: starting a Thread waits until it runs
        try:
            self._driver.halt(reason)
        except BaseException as error:
            reason += f", and failed: {describe_driver_error(error)}"
        self._print(reason)

    def _end_if_still(self, late: Late) -> None:
        time.sleep(RETURN_S)
        if late():
            self._give_up(late)

    def _give_up(self, late: Late) -> None:
        """Log and recording, then the end: a thread that hangs cannot be ended alone."""
        reason = self._driver.halted or self._what()
        thread = threading.Thread(target=self.report_hang, args=(reason,), daemon=True)
        thread.start()
        thread.join(REPORT_S)
        self._end(1)

    def _what(self) -> str:
        """What does not return."""
        now, call = time.monotonic(), self._driver.call
        name, since = ("the loop", self._beaten) if call is None else (f"the driver's {call[0]}", call[1])
        return f"{name} has not returned for {(now - since) * 1e3:.0f} ms"

    def _print(self, line: str) -> None:
        """In another thread: a terminal may block its writers."""
        threading.Thread(target=self._report, args=(line,), daemon=True).start()


def finish_process(known: Set[threading.Thread], code: int, end: Callable[[int], object] = os._exit) -> int:
    """The exit code of a program that is over. Threads that a driver has started and not ended, for which Python would
    wait, end with the process; those ``known`` before do not count."""
    deadline = time.monotonic() + RETURN_S
    left = [one for one in threading.enumerate() if not one.daemon and one not in known]
    for thread in left:
        thread.join(max(0.0, deadline - time.monotonic()))
    names = ", ".join(printable(thread.name) for thread in left if thread.is_alive())
    if names:
        print(f"rlrc: the driver's close has left threads that go on: {names}; let it end them", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        end(code)
    return code
