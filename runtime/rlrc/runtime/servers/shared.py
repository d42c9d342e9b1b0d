"""Memory that a client on the same machine writes its pictures into, so that they need not go through the connection.

The server makes it, of a size that nobody can change (sealed: a client that cut it would kill whoever reads), and names
it in its metadata as a file of its own process, which only processes of the same user can open. The client writes an
observation's arrays there and sends where they lie. One connection, one memory: in openpi's protocol the next
observation only comes when the last one has been answered.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re

import numpy as np
from numpy.typing import NDArray

from rlrc.errors import UserError
from rlrc.runtime.wire.ports import LARGEST

HEADER = "X-Shared-Memory"  # of a request that asks for it
METADATA = "shared_memory"  # and the answer: where it is
PLACE = re.compile(r"/proc/\d+/fd/\d+")
ALIGNMENT = 64
SMALL = 1024  # bytes of an array that goes with the message


class Offered:
    """The server's end. ``memory`` uint8 (bytes,), read only; its pages are taken when they are written."""

    def __init__(self, size: int = LARGEST) -> None:
        self._descriptor = os.memfd_create("rlrc", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._descriptor, size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, seals)
        self.memory = np.frombuffer(mmap.mmap(self._descriptor, size, prot=mmap.PROT_READ), np.uint8)
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        """It stays mapped for who still has an array in it."""
        os.close(self._descriptor)


class Written:
    """The client's end. Raises UserError if it cannot be opened: on another machine, or as another user."""

    def __init__(self, path: object) -> None:
        expected = "expected shared memory of a server on this machine and of this user, found"
        if not (isinstance(path, str) and PLACE.fullmatch(path)):
            raise UserError(f"{expected} {str(path)[:40]!r}; connect without it")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:  # OSError for any other file
                    raise UserError(f"{expected} one that may be cut off; connect without it")
                self._memory: NDArray[np.uint8] = np.frombuffer(mmap.mmap(descriptor, 0), np.uint8)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(f"{expected} {path}: {error.strerror}; connect without it") from None
        self._next = 0

    def clear(self) -> None:
        """The last message has been answered."""
        self._next = 0

    def place(self, array: NDArray) -> int | None:
        """Copies an array into it, and says where it starts; None: it is small, or does not fit."""
        start = self._next
        if array.nbytes < SMALL or start + array.nbytes > len(self._memory):
            return None
        self._memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
        self._next = start + -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        return start
