"""What the page's process has received from the loop's: the newest steps, events, state and images."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from itertools import count
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from rlrc.runtime.page.feed import FeedEnds, FeedReader
from rlrc.runtime.wire.packets import receive

STEPS = 6000  # sent to a new browser: half a minute at 200 Hz
EVENTS = 200
PICTURE_S = 2.0  # limit of the wait for a newer image
VIEW_S = PICTURE_S + 2.0  # images are copied for so long after the last request


@dataclass
class Picture:
    """``number`` counts the images of a camera; ``jpeg`` caches the encoded image."""

    number: int
    pixels: NDArray[np.uint8]
    jpeg: bytes | None = None


class LoopMirror:
    """Belongs to one event loop. ``ended`` is set when the other process closes its end."""

    def __init__(self, ends: FeedEnds) -> None:
        self.reader = FeedReader(ends)
        self.steps: deque[Any] = deque(maxlen=STEPS)
        self.events: deque[Any] = deque(maxlen=EVENTS)
        self.counted = {"steps": 0, "events": 0}  # since the start
        self.state: dict[str, Any] = {}
        self.heard = time.monotonic()
        self.ended = asyncio.Event()
        self._pictures: dict[int, Picture] = {}  # by camera
        self._newer, self._viewed = asyncio.Condition(), 0.0
        self._ids, self._replies = count(), dict[int, asyncio.Future[dict[str, Any]]]()

    def receive(self) -> None:
        """Take all messages that have arrived."""
        while message := receive(self.reader.socket):
            self._take(msgpack.unpackb(message))
        if message is not None:
            asyncio.get_running_loop().remove_reader(self.reader.socket.fileno())
            self.ended.set()

    async def request(self, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send an operator's request and return the loop's reply. Raises OSError or asyncio.TimeoutError."""
        number = next(self._ids)
        reply = self._replies[number] = asyncio.get_running_loop().create_future()
        try:
            self.reader.socket.send(msgpack.packb({**message, "id": number}))
            return await asyncio.wait_for(reply, timeout_s)
        finally:
            self._replies.pop(number, None)

    async def picture(self, camera: int, after: int) -> Picture | None:
        """The camera's newest image, as soon as its number is above ``after``; None after ``PICTURE_S``."""
        self._viewed = time.monotonic()
        self.reader.set_watched(True)
        async with self._newer:
            try:
                await asyncio.wait_for(self._newer.wait_for(lambda: self._number(camera) > after), PICTURE_S)
            except asyncio.TimeoutError:
                return None
        return self._pictures[camera]

    async def track_viewers(self) -> None:
        """Have images copied only while browsers request them. Runs until it is cancelled."""
        while True:
            self.reader.set_watched(time.monotonic() - self._viewed < VIEW_S)
            await asyncio.sleep(0.2)

    def _take(self, message: dict[str, Any]) -> None:
        self.heard = time.monotonic()
        if "picture" in message:
            camera, pixels = message["picture"], self.reader.picture(message["slot"], message["shape"])
            self._pictures[camera] = Picture(self._number(camera) + 1, pixels)
            asyncio.ensure_future(self._wake())  # noqa: RUF006  it ends at once
        if "step" in message:
            self.steps.append(message["step"])
            self.counted["steps"] += 1
        for event in message.get("events", ()):
            self.events.append(event)
            self.counted["events"] += 1
        self.state.update(message.get("state", {}))
        if (reply := self._replies.pop(message.get("id", -1), None)) is not None and not reply.done():
            reply.set_result(message["answer"])

    async def _wake(self) -> None:
        async with self._newer:
            self._newer.notify_all()

    def _number(self, camera: int) -> int:
        return self._pictures[camera].number if camera in self._pictures else 0
