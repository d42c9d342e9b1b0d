"""One policy for all clients of a server: a queue of requests, shared inference, and the guard.

session = Session(spec, guarded)
await session.open(LocalPolicy.load, (path,))    # loaded, verified and warmed up: ``ready``
client = session.client()                        # one per robot: it draws the noise of its own episode
chunk = await client.infer(observation)          # as rlrc.runtime.inference.policy takes it
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import PolicySpec
from rlrc.errors import UserError
from rlrc.runtime.control.inference_process import Open
from rlrc.runtime.servers.guarded import GuardedChunks
from rlrc.runtime.servers.refusal import ClientGone, RequestRefused
from rlrc.runtime.servers.shared_inference import Chunk, SharedInference, example_observation
from rlrc.runtime.servers.stop_latch import StopLatch
from rlrc.runtime.wire.metrics import Metrics

WAITING = 8  # queued observations, including the one being inferred

# An observation, or a function that returns the newest one when its turn comes.
ObservationSource = Mapping[str, Any] | Callable[[], Mapping[str, Any]]

# The observation, the actions that left (None: none), seconds in the queue, seconds of inference.
OnInference = Callable[[Mapping[str, Any], "NDArray[np.float32] | None", float, "float | None"], None]


@dataclass(eq=False)
class _Request:
    """``connected``: whether the client is still connected; ``answer``: the chunk, or an exception."""

    observation: ObservationSource
    connected: Callable[[], bool]
    answer: asyncio.Future[Chunk]
    begun: bool = False


class Session:
    """Belongs to one event loop. ``guarded`` limits every chunk. The owner has to call ``close``."""

    def __init__(self, spec: PolicySpec, guarded: GuardedChunks | None = None, waiting: int = WAITING) -> None:
        self.spec, self.guarded, self.limit = spec, guarded, waiting
        self.metrics = Metrics()
        self.inference, self.latch = SharedInference(spec, self.metrics), StopLatch(guarded)
        self.answering = 0
        self.draining = False
        self.instruction: str | None = None
        """the operator's instruction; replaces the clients'"""
        self.show: OnInference | None = None
        self._requests: list[_Request] = []  # in order, including the one being inferred
        self._tasks: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()

    async def open(self, open_policy: Open, arguments: tuple[Any, ...]) -> None:
        """Run ``open_policy(*arguments)`` in a new process and warm it up. Raises UserError if that fails."""
        await self.inference.open(open_policy, arguments)

    @property
    def ready(self) -> bool:
        """Whether observations are accepted, regardless of a full queue or a stop."""
        return self.inference.opened.is_set() and not self.draining and self.inference.failure is None

    @property
    def waiting(self) -> int:
        """Queued observations of connected clients, including the one being inferred."""
        return sum(request.connected() for request in self._requests)

    def rearm(self, who: str) -> None:
        """Raises UserError, and stays stopped, while the cause of the stop persists."""
        if self.latch.reason is None:
            raise UserError("expected a stopped server, found it running; stop it first")
        if not self.ready:
            found = self.inference.failure or "none"
            raise UserError(f"expected a running policy, found {found}; restart the server")
        self.latch.rearm(who)

    def client(self) -> Client:
        return Client(self)

    @contextmanager
    def track(self, protocol: str) -> Iterator[None]:
        """Enclose all work for one observation: counts it in the metrics, and ``drain`` waits for its end.

        Raises RequestRefused instead of UserError. Other exceptions pass.
        """
        self.answering += 1
        outcome = "fault"
        try:
            yield
            outcome = "answered"
        except RequestRefused as error:
            outcome = error.kind
            raise
        except UserError as error:
            outcome = "observation"
            raise RequestRefused(outcome, str(error)) from None
        finally:
            self.answering -= 1
            self.metrics.count("rlrc_observations_total", protocol=protocol, outcome=outcome)

    async def infer(
        self, observation: ObservationSource, connected: Callable[[], bool] = lambda: True, within: float | None = None
    ) -> Chunk:
        """Queue the observation and infer it in its turn. Raises RequestRefused.

        ``connected``: whether the client is still connected, asked before its turn; ``within``: the client's deadline,
        seconds. A client that disconnects does not affect the others.
        """
        self._check_accepting(within)
        request = _Request(observation, connected, asyncio.get_running_loop().create_future())
        self._requests.append(request)  # before anything else runs
        task = asyncio.ensure_future(self._infer_in_turn(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await request.answer
        except asyncio.CancelledError:  # the client disconnected; an inference that has begun runs to its end
            request.connected = lambda: False
            raise

    async def bench(self, calls: int) -> list[float]:
        """Milliseconds of ``calls`` inferences, each in its turn among the clients' own. Raises RequestRefused."""
        milliseconds = []
        for _ in range(calls):
            if not self.ready:
                raise RequestRefused("not ready", "expected a ready server, found it not ready; retry later")
            async with self._turn:
                milliseconds.append((await self.inference.infer(example_observation(self.spec))).seconds * 1e3)
        return milliseconds

    async def drain(self, seconds: float) -> None:
        """Refuse new requests and wait until the accepted ones are answered. After ``seconds`` the rest fail."""
        self.draining = True
        deadline = time.monotonic() + seconds
        while self.answering and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if self.answering and self.inference.opened.is_set():
            self.inference.fail(f"inference that did not answer within the {seconds:g} s before the end")

    def close(self) -> None:
        self.inference.close()

    def _check_accepting(self, within: float | None) -> None:
        if self.inference.failure is not None:
            raise self.inference.refusal()
        if not self.ready:
            doing = "shutting down" if self.draining else "loading the policy"
            raise RequestRefused("not ready", f"expected a ready server, found it {doing}; retry later")
        self._drop_gone()
        if (ahead := len(self._requests)) >= self.limit:
            message = f"expected fewer than {self.limit} queued observations, found {ahead}; retry later"
            raise RequestRefused("busy", message)
        if within is not None and (seconds := ahead * self.inference.seconds) > within:
            raise RequestRefused(
                "busy",
                f"expected a deadline after the {ahead} queued observations (about {seconds:.2g} s), found one in "
                f"{within:.2g} s; extend it, or retry later",
            )

    def _drop_gone(self) -> None:
        """Remove requests of disconnected clients before their turn, to free their places and memory."""
        for request in list(self._requests):
            if not request.begun and not request.connected():
                self._requests.remove(request)
                _settle(request, ClientGone())

    async def _infer_in_turn(self, request: _Request) -> None:
        begun = time.perf_counter()
        async with self._turn:
            if request not in self._requests:
                return
            request.begun = True
            try:
                if not request.connected():
                    raise ClientGone
                queued = time.perf_counter() - begun
                self.metrics.observe("rlrc_queue_seconds", queued)
                observation = _resolve(request.observation)
                if self.instruction is not None and self.spec.prompt is not None:
                    observation = {**observation, "instruction": self.instruction}
                _settle(request, await self._infer_and_show(observation, queued))
            except Exception as error:
                _settle(request, error)
            finally:
                self._requests.remove(request)

    async def _infer_and_show(self, observation: Mapping[str, Any], queued: float) -> Chunk:
        actions = seconds = None
        try:
            chunk = await self.inference.infer(observation)
            seconds = chunk.seconds
            if self.guarded is not None:  # within the turn: the guard sees chunks in the order of inference
                chunk = chunk._replace(actions=_guard(self.guarded, chunk.actions, observation))
            if self.latch.halted is not None:
                message = f"expected an active server, found it stopped: {self.latch.halted}; re-arm it"
                raise RequestRefused("stopped", message)
            actions = chunk.actions
            return chunk
        finally:
            if self.show is not None:
                self.show(observation, actions, queued, seconds)


class Client:
    """One client's episode. A flow policy's noise is drawn here, so that clients do not affect each other."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.reset()

    def reset(self) -> None:
        """Restart the noise generator, as rlrc.runtime.inference.policy.LocalPolicy does."""
        self._noise = np.random.default_rng(0)

    async def infer(
        self, observation: ObservationSource, connected: Callable[[], bool] = lambda: True, within: float | None = None
    ) -> Chunk:
        """As ``Session.infer``. Raises RequestRefused."""
        spec = self._session.spec
        if spec.flow is None or (not callable(observation) and "noise" in observation):
            return await self._session.infer(observation, connected, within)
        noise = self._noise.standard_normal((spec.action.horizon, spec.flow.width), np.float32)

        def with_noise() -> Mapping[str, Any]:
            return {"noise": noise, **_resolve(observation)}

        return await self._session.infer(with_noise, connected, within)


def _guard(guarded: GuardedChunks, actions: NDArray[np.float32], observation: Mapping[str, Any]) -> NDArray[np.float32]:
    try:
        return guarded.apply(actions, observation.get("state"))
    except UserError as error:
        raise RequestRefused("guard", str(error)) from None


def _resolve(observation: ObservationSource) -> Mapping[str, Any]:
    return observation() if callable(observation) else observation


def _settle(request: _Request, answer: Chunk | Exception) -> None:
    """Complete the request and release its observation."""
    request.observation = {}
    if request.answer.done():  # cancelled
        return
    if isinstance(answer, Exception):
        request.answer.set_exception(answer)
        request.answer.exception()  # asyncio logs exceptions that are never retrieved
    else:
        request.answer.set_result(answer)
