"""A thread that watches the loop's thread: a driver's call that hangs would block every other way to stop.

    watchdog = Watchdog(driver, report_hang)
    with watchdog.watching(seconds):         # around the loop, which calls ``watchdog.beat`` at every step
        control_loop.run(...)

If no beat comes for so many seconds, this thread calls ``robot.stop()``. If the loop still does not go on, it calls
``report_hang`` and ends the process with exit code 1. It depends on the loop's thread only for the GIL: an extension
that hangs without releasing it blocks this thread too; then only the service manager's watchdog
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

GRACE = 0.25  # of the bound: after the whole machine paused, the loop gets time to go on
RETURN_S = 2.0  # for the call to return after robot.stop()
REPORT_S = 30.0  # for log and recording to be written
CLOSING_S = 10.0  # for the driver to be closed

ReportHang = Callable[[str], None]  # takes the reason; prints one line
IsLate = Callable[[], bool]  # whether there still is no beat


class Watchdog:
    """``report_hang`` gets the reason before the process is ended, and prints it. ``report`` prints a line."""

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
        """The loop goes on. Call this from its thread."""
        self._beaten = time.monotonic()

    @contextmanager
    def watching(self, seconds: float) -> Iterator[None]:
        """Stops the robot if ``seconds`` pass without a beat in this block."""
        with self._thread(seconds, self._halt):
            yield

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Ends the process if the block takes longer than CLOSING_S."""
        with self._thread(CLOSING_S, self._end_process):
            yield

    @contextmanager
    def _thread(self, seconds: float, act: Callable[[IsLate], None]) -> Iterator[None]:
        over = threading.Event()
        self.beat()
        threading.Thread(target=self._watch, args=(seconds, act, over), name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _watch(self, seconds: float, act: Callable[[IsLate], None], over: threading.Event) -> None:
        while not over.is_set():
            beaten = self._beaten
            if (left := beaten + seconds - time.monotonic()) > 0:
                time.sleep(min(left, 0.5))
                continue

            def late(beaten: float = beaten) -> bool:
                return self._beaten == beaten and not over.is_set()

            time.sleep(GRACE * seconds)
            if late():
                act(late)
                while late():
                    time.sleep(0.01)

    def _halt(self, late: IsLate) -> None:
        reason = f"{self._describe_hang()}; robot.stop() was called"
        _thread.start_new_thread(self._end_if_still, (late,))  # at once: starting a Thread waits until it runs
        try:
            self._driver.halt(reason)
        except BaseException as error:
            reason += f", and failed: {describe_driver_error(error)}"
        self._print(reason)

    def _end_if_still(self, late: IsLate) -> None:
        time.sleep(RETURN_S)
        if late():
            self._end_process(late)

    def _end_process(self, late: IsLate) -> None:
        """Saves log and recording, then ends the process: Python cannot end a single thread that hangs."""
        reason = self._driver.halted or self._describe_hang()
        thread = threading.Thread(target=self.report_hang, args=(reason,), daemon=True)
        thread.start()
        thread.join(REPORT_S)
        self._end(1)

    def _describe_hang(self) -> str:
        """Which call does not return, and since when."""
        now, call = time.monotonic(), self._driver.call
        name, since = ("the loop", self._beaten) if call is None else (f"the driver's {call[0]}", call[1])
        return f"{name} has not returned for {(now - since) * 1e3:.0f} ms"

    def _print(self, line: str) -> None:
        """In another thread: a terminal may block its writers."""
        threading.Thread(target=self._report, args=(line,), daemon=True).start()


def finish_process(known: Set[threading.Thread], code: int, end: Callable[[int], object] = os._exit) -> int:
    """Returns the exit code ``code``, unless threads other than the ``known`` ones still run: a driver has not ended
    them, and Python would wait for them. Then this ends the process with ``code``."""
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
