"""Going on after a stop. This never happens by itself: the operator requests it, and the loop checks that it is safe.

    rearming = RearmController(switch, guard, planner)
    rearming.request(OperatorRequest("rearm", "the page", reply))   # from any thread; ``reply`` gets the outcome

A stopped robot is held, step by step, and the loop goes on sensing. On a request it asks the policy about the newest
state, and plays the answer through a copy of the guard. If a sensor, the state, inference, the policy's action or a
limit would stop the robot again, or somebody has pressed stop once more, the robot stays stopped, and the request is
refused with that reason. Otherwise the guard begins anew, at rest where the robot is measured.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlrc.errors import UserError
from rlrc.robots.robot import Sensed
from rlrc.runtime.control.planner import Planner
from rlrc.runtime.control.stop_switch import StopSwitch
from rlrc.runtime.safety.guard import Guard
from rlrc.worker import WorkerDied

KEY_GRACE_S = 1.0  # a key that is pressed so soon after a stop was meant to stop
TRIED_S = 5.0  # longest wait for the policy's answer
BENCH_CALLS = 50
REARM_KEY, END_KEY = b"R", b"q"
Reply = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, eq=False)
class OperatorRequest:
    """``rearm``: go on. ``bench``: measure how long inference takes while the robot is held.

    ``origin`` is logged. ``reply`` is called once, with {"error": why not} or the result.
    """

    kind: Literal["rearm", "bench"]
    origin: str
    reply: Reply


@dataclass(frozen=True)
class _Pending:
    """A request, when it arrived, and how often the stop had been pressed then."""

    request: OperatorRequest
    presses: int
    arrived: float


class RearmController:
    """``since``: when the robot came to rest by a stop, None while it is not. ``report`` prints a line."""

    def __init__(
        self,
        switch: StopSwitch,
        guard: Guard,
        planner: Planner,
        report: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.since: float | None = None
        self.switch, self._guard, self._planner, self._report, self._clock = switch, guard, planner, report, clock
        self._pending: _Pending | None = None
        self._asked_for: OperatorRequest | None = None  # the request that the outstanding inference is for
        self._milliseconds: list[float] = []

    # From any thread

    def request(self, request: OperatorRequest) -> None:
        presses, other = self.switch.presses, self._pending
        if self.since is None:
            request.reply({"error": "expected a robot that is stopped and at rest, found it not; stop it first"})
        elif other is not None:
            found = other.request.origin
            request.reply({"error": f"expected one request at a time, found that of {found}; wait for it"})
        else:
            self._pending = _Pending(request, presses, self._clock())

    def handle_keys(self, keys: bytes) -> bool:
        """What a terminal sent: whether it was handled here, and so is no stop."""
        if self.since is None or self._clock() - self.since < KEY_GRACE_S or keys not in (REARM_KEY, END_KEY):
            return False
        if keys == END_KEY:
            self.switch.end_requested = True
        else:
            self.request(OperatorRequest("rearm", "a key", lambda _: None))
        return True

    # From the loop, step by step

    def rest(self, reason: str | None) -> bool:
        """The robot is stopped and at rest. -> whether to hold it, rather than to end the run."""
        if self.since is None:
            self.since = self._clock()
            keys = " (R re-arms, q ends, with the keys of this terminal)" if "any key" in self.switch.sources else ""
            self._print(f"stopped: {reason}; held until it is re-armed{keys}")
        return not self.switch.end_requested

    def step(
        self, sensed: Sensed | None, measured: NDArray[Any] | None, fault: str | None
    ) -> NDArray[np.float32] | None:
        """-> the chunk (horizon, dim) to go on with, once the guard has been re-armed. None: not yet.

        ``fault``: what is wrong with the robot or its sensors at this step.
        """
        try:
            answer = self._planner.inference.poll()  # one that is too late for its step is dropped here
            pending = self._pending
            if pending is None:
                return None
            request = pending.request
            if fault is not None or sensed is None or measured is None:
                raise UserError(fault or "no state")
            if self._planner.inference.busy:
                if self._clock() - pending.arrived > TRIED_S + BENCH_CALLS * (request.kind == "bench"):
                    raise UserError(f"inference has not answered for {TRIED_S:g} s")
                return None
            if answer is None or self._asked_for is not request:
                self._ask(request, sensed)
                return None
            if answer.actions is None:
                raise UserError(f"no action: {answer.error}")
            if request.kind == "bench":
                self._continue_bench(answer.seconds, request, sensed)
                return None
            check_first_action(self._guard, answer.actions, measured)
            self.switch.release(pending.presses)
            self._guard.rearm(request.origin, measured)
        except (UserError, WorkerDied) as error:
            self._refuse(str(error))
            return None
        except Exception as error:  # on any other error too the robot stays stopped
            self._refuse(f"{type(error).__name__}: {error}")
            return None
        self.since = None
        self._finish({})
        self._print(f"re-armed by {request.origin}")
        return answer.actions

    def _ask(self, request: OperatorRequest, sensed: Sensed) -> None:
        if self._asked_for is not request:
            self._asked_for, self._milliseconds = request, []
        self._planner.ask(sensed)

    def _continue_bench(self, seconds: float, request: OperatorRequest, sensed: Sensed) -> None:
        self._milliseconds.append(seconds * 1e3)
        if len(self._milliseconds) < BENCH_CALLS:
            self._ask(request, sensed)
        else:
            self._finish(spread(self._milliseconds))

    def _refuse(self, why: str) -> None:
        if self._pending is None:
            return
        request = self._pending.request
        self._finish({"error": why})
        if request.kind == "rearm":
            self._print(f"not re-armed: {why}")

    def _finish(self, result: Mapping[str, Any]) -> None:
        assert self._pending is not None
        request, self._pending, self._asked_for = self._pending.request, None, None
        request.reply(result)

    def _print(self, line: str) -> None:
        """In another thread: a terminal may block its writers."""
        threading.Thread(target=self._report, args=(line,), daemon=True).start()


def check_first_action(guard: Guard, actions: NDArray[Any], measured: NDArray[Any]) -> None:
    """Raises UserError if a guard that goes on from here would be stopped by the first of these actions."""
    trial = copy.deepcopy(guard)
    trial.rearm("a trial", measured)
    trial.step(actions[0], measured, trial.period)
    if trial.reason is not None:
        raise UserError(f"the policy's next action would stop it again: {trial.reason}")


def spread(milliseconds: list[float]) -> dict[str, float]:
    p50, p99, most = np.percentile(milliseconds, (50, 99, 100)).tolist()
    return {"calls": len(milliseconds), "p50_ms": p50, "p99_ms": p99, "max_ms": most}
