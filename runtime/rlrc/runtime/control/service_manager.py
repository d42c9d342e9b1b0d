"""Notifies a service manager that the program is ready, and that the loop still runs.

systemd's protocol (man 3 sd_notify, man 3 sd_watchdog_enabled): lines in a datagram to the socket $NOTIFY_SOCKET. If no
``beat`` comes for $WATCHDOG_USEC, systemd ends the program and restarts it. Without a service manager, nothing is sent.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, MutableMapping

from rlrc.errors import UserError


class Supervisor:
    """``address`` of the socket, None: no service manager. ``seconds`` within which it expects a beat."""

    def __init__(
        self, address: str | None = None, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.seconds, self._clock, self._beaten = seconds, clock, -float("inf")
        self._address = f"\0{address[1:]}" if address is not None and address.startswith("@") else address

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> Supervisor:
        """Reads and removes the variables: child processes must not inherit them. Raises UserError for invalid ones."""
        address, microseconds = environment.pop("NOTIFY_SOCKET", None), environment.pop("WATCHDOG_USEC", None)
        expected_pid = environment.pop("WATCHDOG_PID", None)
        if address is None or not address.startswith(("/", "@")):
            return cls()
        if microseconds is None or expected_pid not in (None, str(os.getpid())):
            return cls(address)
        if not microseconds.isdecimal() or not int(microseconds):
            raise UserError(f"expected microseconds in WATCHDOG_USEC, found {microseconds!r}; set WatchdogSec")
        return cls(address, int(microseconds) / 1e6)

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={_line(status)}")
        self.beat()

    def beat(self) -> None:
        """Call this at every step. Sends four times within the expected time."""
        if self.seconds is None or self._clock() - self._beaten < self.seconds / 4:
            return
        if self._send("WATCHDOG=1"):
            self._beaten = self._clock()

    def stopping(self, status: str) -> None:
        self._send(f"STOPPING=1\nSTATUS={_line(status)}")

    def _send(self, text: str) -> bool:
        """Whether it was sent. A failure must not stop the robot."""
        if self._address is None:
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)  # the loop must not wait
            try:
                sender.sendto(text.encode(), self._address)
            except OSError:
                return False
        return True


def _line(text: str) -> str:
    return " ".join(text.split())
