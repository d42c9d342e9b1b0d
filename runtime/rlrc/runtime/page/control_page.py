"""The page of `rlrc run`: shows every step of the loop, and passes requests to the stop switch and re-arming."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rlrc.runtime.control.rearming import OperatorRequest, RearmController
from rlrc.runtime.control.step import Step
from rlrc.runtime.control.stop_switch import StopSource, StopSwitch
from rlrc.runtime.page.feed import TEXT
from rlrc.runtime.page.metadata import EventFilter
from rlrc.runtime.page.process import Page

if TYPE_CHECKING:
    from rlrc.robots.instruction import InstructionOverride
    from rlrc.runtime.safety.guard import Guard

STATE_S = 0.5  # interval of the state while nothing changes


class ControlPage:
    """``show`` is for the loop's thread, ``source`` for the stop switch's thread."""

    def __init__(
        self,
        page: Page,
        guard: Guard,
        switch: StopSwitch,
        rearming: RearmController | None,
        override: InstructionOverride | None,
    ) -> None:
        self._page, self._guard, self._switch = page, guard, switch
        self._rearming, self._override = rearming, override
        self._events, self._state, self._sent_at = EventFilter(), dict[str, Any](), 0.0

    @property
    def source(self) -> StopSource:
        return StopSource(self._page.feed.fileno(), f"the page {self._page.url}", self._ready)

    def show(self, step: Step) -> None:
        """Show a step; called by rlrc.runtime.control.control_loop."""
        sensed, verdict, now = step.sensed, step.verdict, step.sent
        command = None if verdict.command is None else verdict.command.tolist()
        measured = None if sensed is None or sensed.measured is None else sensed.measured.tolist()
        infer = None if math.isnan(step.inference_ms) else round(step.inference_ms, 3)
        lag = round((step.sent - step.due) * 1e3, 3)
        row = (round(now, 4), lag, infer, verdict.held, step.skipped, command, measured)
        message: dict[str, Any] = {"step": row}
        reason, words = self._guard.reason, None if sensed is None else sensed.observation.get("instruction")
        state = {
            "stopped": reason and reason[:TEXT],
            "resting": self._rearming is not None and self._rearming.since is not None,
            "instruction": words and words[:TEXT],
        }
        if state != self._state or now - self._sent_at > STATE_S:
            self._state, self._sent_at = state, now
            message["state"] = state
        self._page.feed.show(message, self._events.format(verdict.events, now))
        if sensed is not None:
            self._page.feed.picture(sensed.observation)

    def _ready(self) -> bool:
        """Whether the page's process is alive."""
        requests = self._page.feed.receive()
        for request in requests or ():
            self._take(request["do"], request["id"], request.get("words"))
        return requests is not None

    def _take(self, what: str, number: int, words: str | None) -> None:
        def reply(answer: Any) -> None:
            self._page.feed.send({"id": number, "answer": dict(answer)})

        if what == "stop":
            self._switch.press("the page")
            reply({"stopped": True, "reason": self._switch.reason})
        elif what == "instruction":
            reply(self._instruct(words))
        elif self._rearming is None:
            reply({"error": "expected rlrc run --rearm, found a run that ends with a stop; start it with --rearm"})
        elif what == "bench":
            self._rearming.request(OperatorRequest("bench", "the page", reply))
        else:
            self._rearming.request(OperatorRequest("rearm", f"the page ({words})" if words else "the page", reply))

    def _instruct(self, words: str | None) -> dict[str, str]:
        if self._override is None:
            return {"error": "expected a policy with an instruction, found one for a single task"}
        self._override.instruction = words or None
        return {}
