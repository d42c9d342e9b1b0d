"""The page of `rlrc serve`: shows every inference, and passes requests to the session."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.errors import UserError
from rlrc.runtime.control.rearming import spread
from rlrc.runtime.page.feed import TEXT
from rlrc.runtime.page.metadata import EventFilter
from rlrc.runtime.page.process import Page
from rlrc.runtime.servers.refusal import RequestRefused
from rlrc.runtime.servers.session import Session
from rlrc.runtime.servers.status import explain_unready

STATE_S = 0.5
BENCH_CALLS = 50


class SessionPage:
    """Belongs to the session's event loop. Cancel ``run`` to end it."""

    def __init__(self, page: Page, session: Session) -> None:
        self._page, self._session = page, session
        self._events, self._shown = EventFilter(), 0
        self._benching: asyncio.Task[None] | None = None
        self.ended = asyncio.Event()
        session.show = self.show

    async def run(self) -> None:
        """Send the state twice a second, and take requests as they arrive."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._page.feed.fileno(), self._ready)
        self._page.stop.watch(partial(self._press, loop), self._stop_state, partial(self._lose, loop))
        try:
            while not self.ended.is_set():
                self._send_state({})
                await asyncio.sleep(STATE_S)
        finally:
            loop.remove_reader(self._page.feed.fileno())
            self._session.show = None

    def show(
        self, observation: Mapping[str, Any], actions: NDArray[Any] | None, queue_s: float, inference_s: float | None
    ) -> None:
        """``actions``: the chunk that left (horizon, dim); None: it was refused."""
        state = observation.get("state")
        command = None if actions is None else np.asarray(actions[0], float).tolist()
        measured = None if state is None else np.asarray(state, float).tolist()
        total = (queue_s + (inference_s or 0.0)) * 1e3
        infer = None if inference_s is None else round(inference_s * 1e3, 3)
        self._send_state(
            {"step": (round(time.monotonic(), 4), round(total, 3), infer, actions is None, 0, command, measured)}
        )
        self._page.feed.picture(observation)

    # In the stop port's thread: a busy event loop does not delay a stop.

    def _press(self, loop: asyncio.AbstractEventLoop, reason: str) -> None:
        self._session.latch.halt(reason)
        loop.call_soon_threadsafe(self._stop, reason)

    def _stop_state(self) -> dict[str, Any]:
        reason = self._session.latch.reason
        return {"stopped": reason is not None, "reason": reason or ""}

    def _lose(self, loop: asyncio.AbstractEventLoop) -> None:
        self._session.latch.lost = f"POST {self._page.stop.url}"
        self._press(loop, f"lost {self._session.latch.lost}")

    # In the event loop

    def _stop(self, reason: str) -> None:
        self._session.latch.stop(reason)
        if self._session.guarded is None:
            self._page.feed.show({}, [(time.monotonic(), "stop", f"stop: {reason}")])

    def _send_state(self, message: dict[str, Any]) -> None:
        session = self._session
        message["state"] = {
            "stopped": session.latch.reason and session.latch.reason[:TEXT],
            "resting": session.latch.reason is not None,
            "instruction": session.instruction,
            "unready": explain_unready(session),
            "waiting": session.waiting,
        }
        self._page.feed.show(message, self._new_events())

    def _new_events(self) -> list[tuple[float, str, str]]:
        """The guard's new events, without its start at every chunk."""
        if self._session.guarded is None:
            return []
        guard = self._session.guarded.guard
        total = sum(guard.counts.values())
        new, self._shown = min(total - self._shown, len(guard.events)), total
        events = [guard.events[i] for i in range(len(guard.events) - new, len(guard.events))]
        return self._events.format([event for event in events if event.act != "start"], time.monotonic())

    def _ready(self) -> None:
        requests = self._page.feed.receive()
        if requests is None:
            asyncio.get_running_loop().remove_reader(self._page.feed.fileno())
            return self.ended.set()
        for request in requests:
            self._take(request["do"], request["id"], request.get("words"))

    def _take(self, what: str, number: int, words: str | None) -> None:
        if what == "bench":
            self._benching = asyncio.ensure_future(self._bench(number))
            return
        answer: dict[str, Any] = {}
        who = f"the page ({words})" if words else "the page"
        if what == "stop":
            self._stop("the page")
            answer = self._stop_state()
        elif what == "instruction" and self._session.spec.prompt is None:
            answer = {"error": "expected a policy with an instruction, found one for a single task"}
        elif what == "instruction":
            self._session.instruction = words or None
        else:
            try:
                self._session.rearm(who)
            except UserError as error:
                answer = {"error": str(error)}
        if self._session.guarded is None and what == "rearm" and "error" not in answer:
            self._page.feed.show({}, [(time.monotonic(), what, f"{what}: {who}")])
        self._page.feed.send({"id": number, "answer": answer})

    async def _bench(self, number: int) -> None:
        try:
            answer: dict[str, Any] = spread(await self._session.bench(BENCH_CALLS))
        except RequestRefused as error:
            answer = {"error": str(error)}
        self._page.feed.send({"id": number, "answer": answer})
