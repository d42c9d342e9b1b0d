"""Going on after a stop: never by itself. Somebody wishes it, and the loop tries whether the cause is over.

    standstill = Standstill(switch)                   # anybody may wish, from any thread, once the robot is at rest
    standstill.ask(Wish("rearm", "the page", told))   # ``told`` hears what came of it

A robot that is stopped stays held, step by step, and the loop goes on looking at it. On a wish it asks the policy about
what it sees now, and plays the answer through a copy of the guard. If a sensor, the state, inference, the policy's
action or a limit would stop the robot again, or somebody has pressed stop once more, it stays stopped and the wish is
refused with that reason. Else the guard begins anew, at rest where the robot is measured.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import PolicySpec
from rlrc.errors import UserError
from rlrc.robots.robot import Sensed
from rlrc.runtime.control.inference_process import Answer
from rlrc.runtime.control.stop_switch import StopSwitch
from rlrc.runtime.inference import preprocess
from rlrc.runtime.safety.guard import Guard
from rlrc.worker import WorkerDied

KEY_GRACE_S = 1.0  # what is typed so soon after a stop was meant to stop
TRIED_S = 5.0  # longest wait for the policy's answer
BENCH_CALLS = 50
REARM_KEY, END_KEY = b"R", b"q"
Told = Callable[[Mapping[str, Any]], None]


class Thinking(Protocol):
    """What is needed of rlrc.runtime.control.inference_process.InferenceProcess."""

    @property
    def busy(self) -> bool: ...
    def ask(self, observation: Any, start: int, continuation: Any = None) -> None: ...
    def poll(self) -> Answer | None: ...


@dataclass(frozen=True, eq=False)
class OperatorRequest:
    """``rearm``: to go on; ``bench``: to know how long inference takes, which has nothing else to do now.

    ``who`` stands in the log. ``told``: called once, with {"error": why not}, or with what was done.
    """

    kind: Literal["rearm", "bench"]
    who: str
    told: Told


class RearmController:
    """``since``: when the robot came to rest by a stop, None while it is not."""

    def __init__(
        self,
        switch: StopSwitch,
        say: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.since: float | None = None
        self.switch, self._say, self._clock = switch, say, clock
        self._wish: tuple[OperatorRequest, int, float] | None = (
            None  # with the presses that it knows of, and when it came
        )
        self._tried: OperatorRequest | None = None  # whose question is outstanding
        self._milliseconds: list[float] = []

    # From any thread

    def ask(self, wish: OperatorRequest) -> None:
        presses, other = self.switch.presses, self._wish
        if self.since is None:
            wish.told({"error": "expected a robot that is stopped and at rest, found it not; stop it first"})
        elif other is not None:
            wish.told({"error": f"expected one wish at a time, found that of {other[0].who}; wait for it"})
        else:
            self._wish = wish, presses, self._clock()

    def typed(self, keys: bytes) -> bool:
        """What a terminal sent: whether it has been dealt with, and is no stop."""
        if self.since is None or self._clock() - self.since < KEY_GRACE_S or keys not in (REARM_KEY, END_KEY):
            return False
        if keys == END_KEY:
            self.switch.ended = True
        else:
            self.ask(OperatorRequest("rearm", "a key", lambda _: None))
        return True

    # The loop's, step by step

    def rest(self, reason: str | None) -> bool:
        """The robot is stopped and at rest. -> whether to stay so, rather than to end."""
        if self.since is None:
            self.since = self._clock()
            keys = " (R re-arms, q ends, with the keys of this terminal)" if "any key" in self.switch.sources else ""
            self._tell(f"stopped: {reason}; held until it is re-armed{keys}")
        return not self.switch.ended

    def step(
        self,
        sensed: Sensed | None,
        measured: NDArray[Any] | None,
        fault: str | None,
        guard: Guard,
        thinking: Thinking,
        spec: PolicySpec,
    ) -> NDArray[np.float32] | None:
        """-> the chunk (horizon, dim) to go on with, once the guard has been re-armed. None: not yet.

        ``fault``: what is wrong with the robot or its sensors at this step.
        """
        try:
            answer = thinking.poll()  # one that is too late for its step is dropped here
            if self._wish is None:
                return None
            wish, presses, came = self._wish
            if fault is not None or sensed is None or measured is None:
                raise UserError(fault or "no state")
            if thinking.busy:
                if self._clock() - came > TRIED_S + BENCH_CALLS * (wish.kind == "bench"):
                    raise UserError(f"inference has not answered for {TRIED_S:g} s")
                return None
            if answer is None or self._tried is not wish:
                self._question(wish, sensed, thinking, spec)
                return None
            if answer.actions is None:
                raise UserError(f"no action: {answer.error}")
            if wish.kind == "bench":
                self._benched(answer.seconds, wish, sensed, thinking, spec)
                return None
            check(guard, answer.actions, measured)
            self.switch.release(presses)
            guard.rearm(wish.who, measured)
        except (UserError, WorkerDied) as error:
            self._refuse(str(error))
            return None
        except Exception as error:  # whatever it is, the robot stays stopped
            self._refuse(f"{type(error).__name__}: {error}")
            return None
        self.since = None
        self._done({})
        self._tell(f"re-armed by {wish.who}")
        return answer.actions

    def _question(self, wish: OperatorRequest, sensed: Sensed, thinking: Thinking, spec: PolicySpec) -> None:
        if self._tried is not wish:
            self._tried, self._milliseconds = wish, []
        preprocess.check(sensed.observation, spec)
        thinking.ask(sensed.observation, 0)

    def _benched(
        self, seconds: float, wish: OperatorRequest, sensed: Sensed, thinking: Thinking, spec: PolicySpec
    ) -> None:
        self._milliseconds.append(seconds * 1e3)
        if len(self._milliseconds) < BENCH_CALLS:
            self._question(wish, sensed, thinking, spec)
        else:
            self._done(spread(self._milliseconds))

    def _refuse(self, why: str) -> None:
        if self._wish is None:
            return
        wish = self._wish[0]
        self._done({"error": why})
        if wish.kind == "rearm":
            self._tell(f"not re-armed: {why}")

    def _done(self, told: Mapping[str, Any]) -> None:
        assert self._wish is not None
        wish, self._wish, self._tried = self._wish[0], None, None
        wish.told(told)

    def _tell(self, line: str) -> None:
        """Beside the loop: a terminal may let nobody write."""
        threading.Thread(target=self._say, args=(line,), daemon=True).start()


def check(guard: Guard, actions: NDArray[Any], measured: NDArray[Any]) -> None:
    """Raises UserError if a guard that goes on from here would be stopped by the first of these actions."""
    trial = copy.deepcopy(guard)
    trial.rearm("a trial", measured)
    trial.step(actions[0], measured, trial.period)
    if trial.reason is not None:
        raise UserError(f"the policy's next action would stop it again: {trial.reason}")


def spread(milliseconds: list[float]) -> dict[str, float]:
    p50, p99, most = np.percentile(milliseconds, (50, 99, 100)).tolist()
    return {"calls": len(milliseconds), "p50_ms": p50, "p99_ms": p99, "max_ms": most}
