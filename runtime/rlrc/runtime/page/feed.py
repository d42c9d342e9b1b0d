"""From a control loop to the operator's page, and back: a socket for messages, shared memory for pictures.

Nothing in here waits. A message that the page is too slow for is left out, but for events, which go with a later one. A
picture is copied only while somebody looks, so often at most, and only its newest state is there.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
from numpy.typing import NDArray

from rlrc.runtime.wire.packets import receive

SLOT = 2**20  # bytes of a picture; a larger one is thinned out
PICTURE_S = 0.1  # shortest time between two pictures of a camera
EVENTS = 100  # that wait for the page, the last ones
TEXT = 300  # characters of an event, or of a reason


class Ends(NamedTuple):
    """What the page's process gets."""

    socket: socket.socket
    memory: Any
    cameras: tuple[str, ...]


class Feed:
    """The end of the loop. ``show`` and ``picture`` are for one thread, ``send`` and ``receive`` for any."""

    def __init__(self, cameras: Sequence[str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        memory = multiprocessing.get_context("spawn").RawArray(ctypes.c_uint8, 1 + 2 * SLOT * max(len(cameras), 1))
        self.ends = Ends(theirs, memory, tuple(cameras))
        self._places = {name: index for index, name in enumerate(cameras)}
        self._watched, self._slots = _parts(self.ends)
        self._due = dict.fromkeys(cameras, 0.0)
        self._turns = dict.fromkeys(cameras, 0)
        self._events: deque[Any] = deque(maxlen=EVENTS)
        self.lost = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Mapping[str, Any]) -> bool:
        """Whether it is under way."""
        try:
            self._socket.send(msgpack.packb(message))
        except OSError:  # full, or the page has ended
            return False
        return True

    def show(self, message: dict[str, Any], events: Sequence[Any] = ()) -> None:
        self._events.extend(events)
        if self._events:
            message["events"] = list(self._events)
        if self.send(message):
            self._events.clear()
        else:
            self.lost += 1

    def picture(self, observation: Mapping[str, Any]) -> None:
        """One of the pictures ``image.<camera>`` that are due, uint8 (H, W, 3)."""
        if not self._watched[0] or not self._due:
            return
        now = time.monotonic()
        name = min(self._due, key=self._due.__getitem__)
        if now < self._due[name]:
            return
        self._due[name] = now + PICTURE_S
        if (picture := observation.get(f"image.{name}")) is not None:
            self._put(name, picture)

    def receive(self) -> list[dict[str, Any]] | None:
        """What operators want, as far as it has come; None: the page has ended."""
        wanted: list[dict[str, Any]] = []
        while message := receive(self._socket):
            wanted.append(msgpack.unpackb(message))
        return wanted if message is None else None

    def close(self) -> None:
        self._socket.close()

    def _put(self, name: str, picture: NDArray[np.uint8]) -> None:
        if picture.nbytes > SLOT:
            stride = int(np.ceil(np.sqrt(picture.nbytes / SLOT)))
            picture = picture[::stride, ::stride]
        turn = self._turns[name] = 1 - self._turns[name]  # the other one may be being read
        place = 2 * self._places[name] + turn
        self._slots[place][: picture.size].reshape(picture.shape)[...] = picture
        self.send({"picture": self._places[name], "slot": place, "shape": list(picture.shape)})


class Mirror:
    """The end of the page's process."""

    def __init__(self, ends: Ends) -> None:
        self.socket, self.cameras = ends.socket, ends.cameras
        self._watched, self._slots = _parts(ends)

    def watch(self, watched: bool) -> None:
        self._watched[0] = watched

    def picture(self, slot: int, shape: Sequence[int]) -> NDArray[np.uint8]:
        """A copy of it (H, W, 3)."""
        return self._slots[slot][: int(np.prod(shape))].reshape(shape).copy()


def _parts(ends: Ends) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """-> whether somebody looks, (1,); the slots, two for every camera."""
    memory = np.frombuffer(ends.memory, np.uint8)
    return memory[:1], memory[1:].reshape(-1, SLOT)


@dataclass(frozen=True)
class Address:
    """Ports of the page and of its stop, and who may use them: rlrc.runtime.wire.ports.access has checked that."""

    host: str = "127.0.0.1"
    port: int = 0
    token: str | None = None
    certificate: Path | None = None
    key: Path | None = None
    stop: int = 0
