"""The connection between a control loop and the operator's page: a socket for messages, shared memory for images.

Nothing here blocks. If the page is too slow, messages are dropped; their events go with a later message. Images are
copied only while a browser shows them, at a limited rate, and only the newest is kept.
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

SLOT = 2**20  # bytes of an image; larger ones are subsampled
PICTURE_S = 0.1  # minimal interval of a camera's images
EVENTS = 100  # the newest ones that are waiting for the page
TEXT = 300  # characters of an event, or of a reason


class FeedEnds(NamedTuple):
    """The arguments of the page's process."""

    socket: socket.socket
    memory: Any
    cameras: tuple[str, ...]


class Feed:
    """The loop's end. ``show`` and ``picture`` are for one thread, ``send`` and ``receive`` for any."""

    def __init__(self, cameras: Sequence[str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        memory = multiprocessing.get_context("spawn").RawArray(ctypes.c_uint8, 1 + 2 * SLOT * max(len(cameras), 1))
        self.ends = FeedEnds(theirs, memory, tuple(cameras))
        self._places = {name: index for index, name in enumerate(cameras)}
        self._watched, self._slots = _split_memory(self.ends)
        self._due = dict.fromkeys(cameras, 0.0)
        self._turns = dict.fromkeys(cameras, 0)
        self._events: deque[Any] = deque(maxlen=EVENTS)
        self.lost = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Mapping[str, Any]) -> bool:
        """Returns whether the message was sent."""
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
        """Copy one of the due images ``image.<camera>``, uint8 (H, W, 3)."""
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
        """Operators' requests that have arrived; None: the page's process has ended."""
        requests: list[dict[str, Any]] = []
        while message := receive(self._socket):
            requests.append(msgpack.unpackb(message))
        return requests if message is None else None

    def close(self) -> None:
        self._socket.close()

    def _put(self, name: str, picture: NDArray[np.uint8]) -> None:
        if picture.nbytes > SLOT:
            stride = int(np.ceil(np.sqrt(picture.nbytes / SLOT)))
            picture = picture[::stride, ::stride]
        turn = self._turns[name] = 1 - self._turns[name]  # the page may be reading the other slot
        place = 2 * self._places[name] + turn
        self._slots[place][: picture.size].reshape(picture.shape)[...] = picture
        self.send({"picture": self._places[name], "slot": place, "shape": list(picture.shape)})


class FeedReader:
    """The page's end."""

    def __init__(self, ends: FeedEnds) -> None:
        self.socket, self.cameras = ends.socket, ends.cameras
        self._watched, self._slots = _split_memory(ends)

    def set_watched(self, watched: bool) -> None:
        self._watched[0] = watched

    def picture(self, slot: int, shape: Sequence[int]) -> NDArray[np.uint8]:
        """A copy of a slot's image (H, W, 3)."""
        picture: NDArray[np.uint8] = self._slots[slot][: int(np.prod(shape))].reshape(shape).copy()
        return picture


def _split_memory(ends: FeedEnds) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Returns the flag "watched" (1,) and the slots, two per camera."""
    memory = np.frombuffer(ends.memory, np.uint8)
    return memory[:1], memory[1:].reshape(-1, SLOT)


@dataclass(frozen=True)
class Address:
    """Ports of the page and of its stop, and their access, which rlrc.runtime.wire.ports.access has checked."""

    host: str = "127.0.0.1"
    port: int = 0
    token: str | None = None
    certificate: Path | None = None
    key: Path | None = None
    stop: int = 0
