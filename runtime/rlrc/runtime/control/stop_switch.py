"""The switch that stops the robot: a flag that latches, set by signals, a key, a hardware button or HTTP.

    with StopSwitch().listen(button=Path("/dev/input/event5"), port=8765) as switch:
        while ...:
            if switch.stopped:              # one attribute: no lock, well under a microsecond
                guard.stop(switch.reason)
            ...
            switch.wait(seconds)            # returns early if somebody presses
        robot.stop()                        # inside the block: after it, Ctrl-C ends the program again

A separate thread waits for all of them, so that the flag is set even while the main thread is inside the engine:
signals reach the thread through a file descriptor that the interpreter writes to at once (signal.set_wakeup_fd). The
thread needs the GIL: an engine that keeps the GIL delays the flag. Inference in its own process may die or hang without
effect here; start it with "spawn", since a forked process inherits the signal handlers.

A lost source stops the robot too: a button whose file ends, a terminal that hangs up, a failure of the thread.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import select
import selectors
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rlrc.errors import UserError
from rlrc.runtime.control.stop_port import StopPort

# Ctrl-C, a service manager, a closed terminal, Ctrl-Z (a controller must not be suspended), and one for scripts.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP, signal.SIGUSR1)
ASKED = "asked to stop"
LOOPBACK = "127.0.0.1"
JOINED_S = 2.0
AGAIN_S = 1.0  # a second Ctrl-C within this time must not interrupt the saving of log and recording


class StopSource(NamedTuple):
    """Another source of stops: ``ready`` reads what has arrived, and returns False at its end, which stops too."""

    descriptor: int
    what: str
    ready: Callable[[], bool]


class StopSwitch:
    """``stopped`` latches; ``reason`` is that of the first press. ``sources`` names what is listened to."""

    def __init__(self) -> None:
        self.stopped = False
        self.reason = ""
        self.presses = 0
        self.end_requested = False
        """whether the program is to end as well: by a signal, or the key that ends the run"""
        self.sources: list[str] = []
        self.url: str | None = None
        self.token: str | None = None
        self._lost: list[str] = []
        self._signalled = -math.inf
        self.restore_terminal: Callable[[], None] = lambda: None
        """restores the terminal, for a program that ends without leaving the block of ``listen``"""
        self.reclaim_signals: Callable[[], object] = _nothing
        """installs the signal handlers again, which a driver's library may have replaced; in the main thread, 10 us"""
        self._sleeper: tuple[socket.socket, socket.socket] | None = None  # ``press`` writes, ``wait`` reads

    def press(self, reason: str) -> None:
        """From any thread or signal handler."""
        self.presses += 1
        if not self.stopped:
            self.reason = reason
            self.stopped = True  # last: a reader that sees it finds the reason
        if (sleeper := self._sleeper) is not None:
            with contextlib.suppress(OSError):  # full: the sleeper wakes anyway; closed: there is none
                sleeper[1].send(b"x")

    def wait(self, seconds: float) -> bool:
        """Sleeps, in one thread; -> True at once if somebody has pressed since the last call.

        No lock or condition: a signal handler cannot set those, and Python 3.10 times them by the wall clock.
        """
        if self._sleeper is None:
            time.sleep(seconds)
            return False
        reader = self._sleeper[0]
        if not select.select([reader], (), (), seconds)[0]:
            return False
        with contextlib.suppress(BlockingIOError):
            reader.recv(4096)
        return True

    def stop_reason(self) -> str | None:
        """Why the robot is to stop; None while nobody has pressed."""
        if not self.stopped:
            return None
        return self.reason if self._lost else f"{ASKED}: {self.reason}"

    def release(self, presses: int | None = None) -> None:
        """Clears the stop. Raises UserError if a source is lost.

        ``presses``: their number when the operator decided to release. One more since then stops again, and raises.
        """
        if self._lost:
            raise UserError(f"expected all of {', '.join(self.sources)} to listen to, lost {self._lost[0]}; start anew")
        presses = self.presses if presses is None else presses
        self.stopped = False
        if self.presses != presses:
            self.stopped = True
            raise UserError(
                "expected no stop during the request, found that somebody pressed stop; check the robot, then re-arm"
            )

    @contextmanager
    def listen(
        self,
        keyboard: int | None = 0,
        button: Path | int | None = None,
        port: int | None = None,
        token: str | None = None,
        handle_keys: Callable[[bytes], bool] | None = None,
        sources: Sequence[StopSource] = (),
    ) -> Iterator[StopSwitch]:
        """Listens until the end of the block, then restores everything. Call it in the main thread, which gets signals.

        ``keyboard``: a file descriptor; any key stops where it is a terminal. ``button``: a descriptor, or the path of
        a FIFO, device or socket; any byte stops, and its end. ``port`` on the loopback, 0 for any: POST /stop with
        ``Authorization: Bearer`` and the token, which is drawn if it is not given. ``handle_keys`` gets typed keys
        first, and returns True for those that do not stop. ``sources``: what else stops.

        Raises UserError for a button or port that cannot be opened.
        """
        with ExitStack() as stack:
            self._add_sleeper(stack)
            selector = stack.enter_context(selectors.DefaultSelector())
            if button is not None:
                self._add_button(stack, selector, button)
            if port is not None:
                self._add_http(stack, selector, port, token)
            if keyboard is not None:
                self._add_keyboard(stack, selector, keyboard, handle_keys)
            for source in sources:
                self._add(selector, source)
            self._add_signals(stack, selector)
            self._add_thread(stack, selector)
            yield self

    def _add_sleeper(self, stack: ExitStack) -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            stack.callback(end.close)
            end.setblocking(False)
        self._sleeper = ours, theirs
        stack.callback(setattr, self, "_sleeper", None)

    def _add_thread(self, stack: ExitStack, selector: selectors.BaseSelector) -> None:
        ours, theirs = socket.socketpair()
        stack.callback(ours.close)
        stack.callback(theirs.close)
        selector.register(theirs, selectors.EVENT_READ, None)
        thread = threading.Thread(target=self._watch, args=(selector,), name="stop switch", daemon=True)
        thread.start()
        stack.callback(thread.join, JOINED_S)  # it may hang: a driver may have closed its descriptors
        stack.callback(ours.send, b"x")

    def _watch(self, selector: selectors.BaseSelector) -> None:
        try:
            while True:
                for key, _ in selector.select():
                    if key.data is None:
                        return
                    if not key.data():  # an ended source would stay ready for ever
                        selector.unregister(key.fileobj)
        except Exception as error:
            self._lose(f"the thread that listens ({type(error).__name__}: {error})")

    def _add(self, selector: selectors.BaseSelector, source: StopSource) -> None:
        def ready() -> bool:
            goes_on = source.ready()
            if not goes_on:
                self._lose(source.what)
            return goes_on

        selector.register(source.descriptor, selectors.EVENT_READ, ready)
        self.sources.append(source.what)

    def _lose(self, what: str) -> None:
        self._lost.append(what)
        self.press(f"lost {what}")

    def _add_signals(self, stack: ExitStack, selector: selectors.BaseSelector) -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            stack.callback(end.close)
            end.setblocking(False)

        def arrived() -> bool:
            for number in ours.recv(64):
                if number in SIGNALS:  # all that have a handler come here
                    self._signal(number)
            return True

        selector.register(ours, selectors.EVENT_READ, arrived)

        def take() -> dict[signal.Signals, Any]:
            signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
            return {number: signal.signal(number, lambda got, _: self._signal(got)) for number in SIGNALS}

        before = signal.set_wakeup_fd(-1)
        stack.callback(signal.set_wakeup_fd, before)
        for number, old in take().items():
            stack.callback(signal.signal, number, signal.SIG_DFL if old is None else old)
        self.reclaim_signals = take
        stack.callback(setattr, self, "reclaim_signals", _nothing)
        stack.callback(self._outlast_another)
        self.sources.append(f"signals {', '.join(number.name for number in SIGNALS)}")

    def _outlast_another(self) -> None:
        """Listens a moment longer after a signal: a second one would end the program."""
        while (left := self._signalled + AGAIN_S - time.monotonic()) > 0:
            time.sleep(left)

    def _signal(self, number: int) -> None:
        if not self.end_requested:
            self._signalled = time.monotonic()
        self.press(f"signal {signal.Signals(number).name}")
        self.end_requested = True

    def _add_keyboard(
        self,
        stack: ExitStack,
        selector: selectors.BaseSelector,
        descriptor: int,
        handle_keys: Callable[[bytes], bool] | None,
    ) -> None:
        if not _foreground(descriptor):
            return
        import termios  # not everywhere
        import tty

        def restore() -> None:
            with contextlib.suppress(termios.error):  # it may have hung up
                termios.tcsetattr(descriptor, termios.TCSADRAIN, before)

        before = termios.tcgetattr(descriptor)
        tty.setcbreak(descriptor)  # a key counts at once, without Enter; Ctrl-C remains a signal
        self.restore_terminal = restore
        stack.callback(restore)
        selector.register(
            descriptor, selectors.EVENT_READ, self._reader(descriptor, "a key", "the terminal", handle_keys)
        )
        self.sources.append("any key")

    def _add_button(self, stack: ExitStack, selector: selectors.BaseSelector, button: Path | int) -> None:
        descriptor = button if isinstance(button, int) else _open(button)
        if not isinstance(button, int):
            stack.callback(os.close, descriptor)
        try:
            selector.register(descriptor, selectors.EVENT_READ, self._reader(descriptor, "the button", "the button"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"expected a button that can be waited for (a FIFO, device or socket), found {button}: {error}; "
                "give another --button"
            ) from None
        self.sources.append(f"button {button}")

    def _reader(
        self, descriptor: int, what: str, whole: str, handle_keys: Callable[[bytes], bool] | None = None
    ) -> Callable[[], bool]:
        def ready() -> bool:
            """Whether the source goes on."""
            try:
                read = os.read(descriptor, 4096)
            except BlockingIOError:
                return True
            except OSError:
                read = b""
            if not read:
                self._lose(whole)
                return False
            if handle_keys is None or not handle_keys(read):
                self.press(what)
            return True

        return ready

    def _add_http(self, stack: ExitStack, selector: selectors.BaseSelector, port: int, token: str | None) -> None:
        self.token = token or secrets.token_urlsafe(16)
        stop = StopPort(LOOPBACK, port)
        stack.callback(stop.close)
        stop.start(self.token)
        self.url = stop.url
        self._add(selector, self.source_of(stop))

    def source_of(self, stop: StopPort) -> StopSource:
        """A source for ``listen`` from another StopPort, such as the one of the operator's page."""

        def state() -> dict[str, Any]:
            return {"stopped": self.stopped, "reason": self.reason}

        return StopSource(stop.fileno(), f"POST {stop.url}", lambda: stop.ready(self.press, state))


@contextmanager
def ignore_first_interrupt() -> Iterator[None]:
    """The first Ctrl-C in this block does nothing, the second one interrupts: an operator who sees a fault stop the
    robot presses Ctrl-C, which must not cost the log and the recording. In the main thread."""
    pressed = list[int]()

    def handle(number: int, frame: Any) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def _nothing() -> None:
    """Outside the block of ``listen``."""


def _foreground(descriptor: int) -> bool:
    """Whether it is a terminal that this process may read: reading in the background would suspend the process."""
    if not os.isatty(descriptor):
        return False
    with contextlib.suppress(OSError):  # not the controlling terminal: no job control there
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    return True


def _open(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(
            f"expected a FIFO, device or socket as the button, found {path}: {error.strerror}; give another --button"
        ) from None
    if stat.S_ISREG(os.fstat(descriptor).st_mode) or stat.S_ISDIR(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(
            f"expected a FIFO, device or socket as the button, found the file or folder {path}, which reports "
            "no presses; for a GPIO, let gpiomon write into a FIFO (docs/robots.md)"
        )
    return descriptor
