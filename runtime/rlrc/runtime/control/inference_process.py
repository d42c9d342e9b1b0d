"""Inference in parallel with the control loop, in a process of its own.

The loop asks for a chunk with an observation and the step that the chunk is for, and polls for the answer. When to ask
again, and what to do with a late chunk, is decided by rlrc.runtime.control.planner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rlrc.errors import UserError
from rlrc.runtime.inference.continuation import Continuation
from rlrc.runtime.inference.decode import NoAction
from rlrc.runtime.inference.policy import LocalPolicy
from rlrc.runtime.inference.warmup import warm_up
from rlrc.worker import Channel, WorkerProcess

OPENING_S, WARMING_S = 120.0, 300.0  # longest waits before the loop starts
PATIENCE_S = 1.0  # for latency to become stable; by then clock frequencies have risen
Open = Callable[..., Any]


@dataclass(frozen=True)
class Answer:
    """A chunk (horizon, dim) whose first action is for the step ``start``; ``asked`` in clock seconds.

    ``seconds``: the duration of inference itself, without the time until the poll.
    ``error``: why the policy gave no actions.
    """

    start: int
    asked: float
    seconds: float
    actions: NDArray[np.float32] | None
    error: str | None = None


@dataclass(frozen=True)
class Warmth:
    """Warming up: milliseconds of the first call, number of calls, median of the last ones, whether it was stable."""

    first_ms: float
    calls: int
    median_ms: float
    stable: bool

    def __str__(self) -> str:
        changing = "" if self.stable else f", still changing after {PATIENCE_S:g} s of warming up"
        after = f"after {self.calls} calls (the first took {self.first_ms:.1f} ms)"
        return f"{self.median_ms:.1f} ms an action {after}{changing}"


class InferenceClient(Protocol):
    """What the control loop needs of an InferenceProcess."""

    @property
    def busy(self) -> bool: ...
    @property
    def requested_at(self) -> float | None: ...
    def ask(self, observation: Mapping[str, Any], start: int, continuation: Continuation | None = None) -> None: ...
    def poll(self) -> Answer | None: ...


class InferenceProcess:
    """The worker opens the policy with ``open_policy(*arguments)``. ``observation`` is an example of what will be sent;
    later ones may be ``more`` bytes larger.

    Raises UserError if the policy cannot be opened or does not accept the observation.
    """

    def __init__(
        self, open_policy: Open, arguments: tuple[Any, ...], observation: Mapping[str, Any], more: int = 2**16
    ) -> None:
        size = sum(np.asarray(value).nbytes for value in _arrays(observation).values())
        self._worker = WorkerProcess(_serve, (open_policy, arguments), "inference", size + more, 2**20)
        try:
            self._worker.wait(OPENING_S)
            self._worker.ask({"do": "warm", "instruction": observation.get("instruction")}, _arrays(observation))
            self.warmth = Warmth(**self._worker.wait(WARMING_S)[0])
        except BaseException:
            self._worker.kill()
            raise
        self._pending: tuple[int, float] | None = None

    @property
    def pid(self) -> int:
        return self._worker.pid

    @property
    def sentinel(self) -> int:
        """Readable once the process has ended."""
        return self._worker.sentinel

    def fileno(self) -> int:
        """Readable when ``poll`` has an answer."""
        return self._worker.fileno()

    @property
    def busy(self) -> bool:
        return self._worker.busy

    @property
    def requested_at(self) -> float | None:
        """When the outstanding request was made; None without one."""
        return None if self._pending is None else self._pending[1]

    def ask(self, observation: Mapping[str, Any], start: int, continuation: Continuation | None = None) -> None:
        """``start``: the step that the chunk's first action is for. Raises WorkerDied."""
        arrays, values = _arrays(observation), {"do": "infer", "instruction": observation.get("instruction")}
        if continuation is not None:
            arrays["previous"], values["frozen"] = continuation.previous, continuation.frozen
        self._pending = (start, time.monotonic())
        self._worker.ask(values, arrays)

    def poll(self) -> Answer | None:
        """The answer to the last request, if it has arrived. Raises WorkerDied."""
        answer = self._worker.poll()
        if answer is None or self._pending is None:
            return None
        (start, requested_at), self._pending = self._pending, None
        values, arrays = answer
        return Answer(start, requested_at, values.get("seconds", np.nan), arrays.get("actions"), values.get("error"))

    def reset(self) -> None:
        """Forgets the episode so far, outside of the loop. Waits for an outstanding chunk and drops it."""
        if self._worker.busy:
            self._worker.wait(WARMING_S)
        self._pending = None
        self._worker.ask({"do": "reset"})
        self._worker.wait(WARMING_S)

    def close(self) -> None:
        self._worker.kill()


def _arrays(observation: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    return {name: np.asarray(value) for name, value in observation.items() if name != "instruction"}


def _serve(channel: Channel, open_policy: Open, arguments: tuple[Any, ...]) -> None:
    policy: LocalPolicy = open_policy(*arguments)
    policy.reset()
    channel.reply({})
    while True:
        values, arrays = channel.receive()
        try:
            channel.reply(*_answer(policy, values, arrays))
        except (UserError, NoAction) as error:
            channel.reply({"error": str(error)})


def _answer(
    policy: LocalPolicy, values: Mapping[str, Any], arrays: dict[str, NDArray[Any]]
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    if values["do"] == "reset":
        policy.reset()
        return {}, {}
    previous = arrays.pop("previous", None)
    observation: dict[str, Any] = dict(arrays)
    if values["instruction"] is not None:
        observation["instruction"] = values["instruction"]
    if values["do"] == "warm":
        return _warm_up(policy, observation), {}
    begun = time.perf_counter()
    continuation = None if previous is None else Continuation(previous, values["frozen"])
    result = policy.infer(observation) if continuation is None else policy.infer(observation, continuation)
    return {"seconds": time.perf_counter() - begun}, {"actions": result["actions"]}


def _warm_up(policy: LocalPolicy, observation: Mapping[str, Any]) -> dict[str, Any]:
    def call() -> float:
        begun = time.perf_counter()
        policy.infer(observation)
        return (time.perf_counter() - begun) * 1e3

    first = call()
    calls, stable, median = warm_up(call, PATIENCE_S)
    policy.reset()
    return {"first_ms": first, "calls": calls, "median_ms": median, "stable": stable}
