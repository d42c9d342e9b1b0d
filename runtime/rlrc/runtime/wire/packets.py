"""Messages between two processes by a Unix socket of type SOCK_SEQPACKET.

Unlike a pipe it keeps the ends of messages, and unlike a datagram socket it reports that the other process has ended.
"""

from __future__ import annotations

import socket

LARGEST = 2**16  # bytes of a message


def receive(wire: socket.socket) -> bytes | None:
    """The next message; None if there is none yet, b"" once the other process has ended. ``wire`` is non-blocking."""
    try:
        return wire.recv(LARGEST)
    except BlockingIOError:
        return None
    except OSError:
        return b""
