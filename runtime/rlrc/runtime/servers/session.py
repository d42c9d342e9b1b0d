"""One policy for all clients of a server: in a process of its own, asked in turn, guarded if there is a profile.

    session = Session(spec, guarded)
    await session.open(LocalPolicy.load, (path,))    # loaded, verified, warmed: ``ready``
    client = session.client()                        # one for each robot: it has the noise of its own episode
    chunk = await client.infer(observation)          # as rlrc.runtime.inference.policy takes them

Nothing in here waits for the policy but by the event loop, so health and refusals are answered meanwhile. A policy that
dies or hangs is not started again: ``failed`` tells, the server ends, and whoever supervises it starts it anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import PolicySpec
from rlrc.errors import UserError
from rlrc.runtime.control.inference_process import InferenceProcess, Open
from rlrc.runtime.servers.guarded import GuardedChunks
from rlrc.runtime.wire.metrics import Metrics
from rlrc.runtime.wire.ports import LARGEST
from rlrc.worker import WorkerDied

WAITING = 8  # observations that may wait for the policy, the one it works on included
HANGS_S = 60.0  # longest inference

# What a client sent, or what gives it when its turn comes, and so the newest there is by then.
Given = Mapping[str, Any] | Callable[[], Mapping[str, Any]]

# An observation that was looked at, what left (None: nothing), the seconds in the queue and of inference.
Show = Callable[[Mapping[str, Any], "NDArray[np.float32] | None", float, "float | None"], None]

log = logging.getLogger(__name__)


class Refused(Exception):
    """What the client is told instead of actions: one line. ``kind`` is for the counters."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Gone(Refused):
    """The client left before its turn came: nothing is computed for it, and no answer can be sent."""

    def __init__(self) -> None:
        super().__init__("gone", "expected a client that waits for its answer, found it gone")


class Chunk(NamedTuple):
    """``actions`` float32 (horizon, dim), un-normalised; ``seconds``: what inference took, without the queue."""

    actions: NDArray[np.float32]
    seconds: float


@dataclass(eq=False)
class _Request:
    """``waits``: whether the client is still there; ``answer``: the chunk, or why there is none."""

    observation: Given
    waits: Callable[[], bool]
    answer: asyncio.Future[Chunk]
    begun: bool = False


class Session:
    """``guarded``: what every chunk goes through. Of one event loop; ``close`` at the end."""

    def __init__(self, spec: PolicySpec, guarded: GuardedChunks | None = None, waiting: int = WAITING) -> None:
        self.spec, self.guarded, self.limit = spec, guarded, waiting
        self.metrics = Metrics()
        self.answering = 0
        self.draining = False
        self.opened, self.failed = asyncio.Event(), asyncio.Event()
        self.failure: str | None = None
        self.instruction: str | None = None
        """the operator's words, which go before the clients'"""
        self.show: Show | None = None
        self.lost: str | None = None
        """a way to stop that is gone: then nothing re-arms any more"""
        self._halted: str | None = None
        self._halts = 0
        self._requests: list[_Request] = []  # in their turn, the one that the policy works on included
        self._tasks: set[asyncio.Task[None]] = set()
        self._seconds = 0.0  # of the last inference
        self._turn, self._came = asyncio.Lock(), asyncio.Event()  # whose turn it is, and that there is news for it
        self._inference: InferenceProcess | None = None

    async def open(self, open_policy: Open, arguments: tuple[Any, ...]) -> None:
        """``open_policy(*arguments)`` in the other process. Raises UserError if it cannot be opened or warmed up."""
        self._inference = await asyncio.to_thread(InferenceProcess, open_policy, arguments, example(self.spec), LARGEST)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._inference.sentinel, self._fail, "inference ended")
        loop.add_reader(self._inference.fileno(), self._came.set)
        self.opened.set()

    @property
    def warmth(self) -> str:
        return "" if self._inference is None else str(self._inference.warmth)

    @property
    def ready(self) -> bool:
        """Whether an observation would be taken now, but for the queue and a guard that has stopped."""
        return self.opened.is_set() and not self.draining and self.failure is None

    @property
    def waiting(self) -> int:
        """Observations that wait for the policy, the one it works on included; of clients that are still there."""
        return sum(request.waits() for request in self._requests)

    @property
    def stopped(self) -> str | None:
        """Why no chunk leaves, by the guard or by somebody who wanted that; None: they do."""
        return self._halted or (None if self.guarded is None else self.guarded.guard.reason)

    def halt(self, reason: str) -> None:
        """From any thread: no chunk leaves from now on. ``stop`` has to follow, in the event loop."""
        self._halts += 1
        if self.stopped is None:
            log.warning("stopped: %s", reason)
        self._halted = self._halted or reason

    def stop(self, reason: str) -> None:
        """Latches: observations are looked at, but no chunk leaves. What a client has already, it may still execute."""
        self.halt(reason)
        if self.guarded is not None and not self.guarded.guard.stopped:
            self.guarded.guard.stop(reason)

    def rearm(self, who: str) -> None:
        """Raises UserError, and stays stopped, while what has stopped it persists."""
        if self.stopped is None:
            raise UserError("expected a server that is stopped, found it not; stop it first")
        if not self.ready:
            raise UserError(f"expected a policy that runs, found {self.failure or 'none'}; start the server again")
        if self.lost is not None:
            raise UserError(f"expected every way to stop to work, found {self.lost} lost; start the server again")
        stopped, halts = self.stopped, self._halts
        if self.guarded is not None:
            self.guarded.rearm(who)
        self._halted = None
        if self._halts != halts:  # from another thread
            self.stop(stopped)
            raise UserError("expected no stop during re-arming, found one; look again, then re-arm")
        log.warning("re-armed by %s (was stopped: %s)", who, stopped)

    def client(self) -> Client:
        return Client(self)

    @contextmanager
    def answer(self, protocol: str) -> Iterator[None]:
        """Around all that is done for one observation: counts it, and ``drain`` waits for its end.

        Whatever goes wrong in it comes out as Refused, what nobody expected without its details.
        """
        self.answering += 1
        outcome = "fault"
        try:
            yield
            outcome = "answered"
        except Refused as error:
            outcome = error.kind
            raise
        except UserError as error:
            outcome = "observation"
            raise Refused(outcome, str(error)) from None
        finally:
            self.answering -= 1
            self.metrics.count("rlrc_observations_total", protocol=protocol, outcome=outcome)

    async def infer(
        self, observation: Given, waits: Callable[[], bool] = lambda: True, within: float | None = None
    ) -> Chunk:
        """Raises Refused. ``waits``: whether the client is still there, asked before anything is computed for it;
        ``within``: seconds for which it will wait, if it said so.

        A client that goes away meanwhile changes nothing for the others.
        """
        if self.failure is not None:
            raise Refused("failed", f"expected a policy that runs, found: {self.failure}; start the server again")
        if not self.ready:
            doing = "ending" if self.draining else "loading the policy"
            raise Refused("not ready", f"expected a server that is ready, found it {doing}; try again later")
        self._drop_gone()
        if (ahead := len(self._requests)) >= self.limit:
            raise Refused("busy", f"expected fewer than {self.limit} observations that wait, found {ahead}; send later")
        if within is not None and ahead * self._seconds > within:
            raise Refused(
                "busy",
                f"expected time for the {ahead} observations that wait, about {ahead * self._seconds:.2g} s, found a "
                f"deadline in {within:.2g} s; give a later one, or send later",
            )
        request = _Request(observation, waits, asyncio.get_running_loop().create_future())
        self._requests.append(request)  # before anything else runs
        task = asyncio.ensure_future(self._in_turn(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await request.answer
        except asyncio.CancelledError:  # the client is gone; an inference that has begun goes on to its end
            request.waits = lambda: False
            raise

    def _drop_gone(self) -> None:
        """Before their turn, so that they take no place and no memory."""
        for request in list(self._requests):
            if not request.begun and not request.waits():
                self._requests.remove(request)
                _end(request, Gone())

    async def drain(self, seconds: float) -> None:
        """Takes nothing more, and waits until what was taken is answered; what is not by then fails."""
        self.draining = True
        deadline = time.monotonic() + seconds
        while self.answering and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if self.answering and self._inference is not None:
            self._fail(f"inference that did not answer within the {seconds:g} s before the end")

    def close(self) -> None:
        if self._inference is not None:
            self._unlisten()
            self._inference.close()

    def _unlisten(self) -> None:
        assert self._inference is not None
        for descriptor in (self._inference.sentinel, self._inference.fileno()):
            asyncio.get_running_loop().remove_reader(descriptor)

    async def _in_turn(self, request: _Request) -> None:
        begun = time.perf_counter()
        async with self._turn:
            if request not in self._requests:
                return
            request.begun = True
            try:
                if not request.waits():
                    raise Gone
                queued = time.perf_counter() - begun
                self.metrics.observe("rlrc_queue_seconds", queued)
                observation = _given(request.observation)
                if self.instruction is not None and self.spec.prompt is not None:
                    observation = {**observation, "instruction": self.instruction}
                _end(request, await self._shown(observation, queued))
            except Exception as error:
                _end(request, error)
            finally:
                self._requests.remove(request)

    async def _shown(self, observation: Mapping[str, Any], queued: float) -> Chunk:
        actions = seconds = None
        try:
            chunk = await self._ask(observation)
            seconds = chunk.seconds
            if self.guarded is not None:
                # In turn, too: the guard sees the chunks in the order in which they were computed.
                chunk = chunk._replace(actions=self._guard(chunk.actions, observation))
            if self._halted is not None:
                raise Refused("stopped", f"expected a server that is not stopped, found: {self._halted}; re-arm it")
            actions = chunk.actions
            return chunk
        finally:
            if self.show is not None:
                self.show(observation, actions, queued, seconds)

    async def bench(self, calls: int) -> list[float]:
        """Milliseconds of so many inferences, each in its turn between the clients' own. Raises Refused."""
        milliseconds = []
        for _ in range(calls):
            if not self.ready:
                raise Refused("not ready", "expected a server that is ready, found it not; try again later")
            async with self._turn:
                milliseconds.append((await self._ask(example(self.spec))).seconds * 1e3)
        return milliseconds

    def _guard(self, actions: NDArray[np.float32], observation: Mapping[str, Any]) -> NDArray[np.float32]:
        assert self.guarded is not None
        try:
            return self.guarded.through(actions, observation.get("state"))
        except UserError as error:
            raise Refused("guard", str(error)) from None

    async def _ask(self, observation: Mapping[str, Any]) -> Chunk:
        assert self._inference is not None
        inference, loop, came = self._inference, asyncio.get_running_loop(), self._came
        answer = None
        hangs = loop.call_later(HANGS_S, self._fail, f"inference that has not answered for {HANGS_S:g} s")
        try:
            if self.failure is None:  # while it waited for its turn
                inference.ask(observation, 0)
            while self.failure is None and (answer := inference.poll()) is None:
                came.clear()
                await came.wait()
        except WorkerDied as error:
            self._fail(str(error))
        finally:
            hangs.cancel()
        if self.failure is not None or answer is None:
            raise Refused("failed", f"expected a policy that runs, found: {self.failure}; start the server again")
        if answer.actions is None:
            raise Refused("policy", answer.error or "the policy gave no action")
        self._seconds = answer.seconds
        self.metrics.observe("rlrc_inference_seconds", answer.seconds)
        return Chunk(answer.actions, answer.seconds)

    def _fail(self, failure: str) -> None:
        self._unlisten()
        self.failure = self.failure or failure
        self.failed.set()
        self._came.set()


def _given(observation: Given) -> Mapping[str, Any]:
    return observation() if callable(observation) else observation


def _end(request: _Request, answer: Chunk | Exception) -> None:
    """Lets go of the observation, too."""
    request.observation = {}
    if request.answer.done():  # it was cancelled
        return
    if isinstance(answer, Exception):
        request.answer.set_exception(answer)
        request.answer.exception()  # asyncio complains about one that is never looked at
    else:
        request.answer.set_result(answer)


class Client:
    """One client's episode. A flow policy's noise is drawn here: other clients do not change what this one gets."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.reset()

    def reset(self) -> None:
        """Starts the generator of the noise anew, as rlrc.runtime.inference.policy.LocalPolicy does."""
        self._noise = np.random.default_rng(0)

    async def infer(
        self, observation: Given, waits: Callable[[], bool] = lambda: True, within: float | None = None
    ) -> Chunk:
        """As ``Session.infer``. Raises Refused."""
        spec = self._session.spec
        if spec.flow is None or (not callable(observation) and "noise" in observation):
            return await self._session.infer(observation, waits, within)
        noise = self._noise.standard_normal((spec.action.horizon, spec.flow.width), np.float32)

        def with_noise() -> Mapping[str, Any]:
            return {"noise": noise, **_given(observation)}

        return await self._session.infer(with_noise, waits, within)


def example(spec: PolicySpec) -> dict[str, Any]:
    """An observation to warm up with: black pictures, the state that counts as zero, some words."""
    observation: dict[str, Any] = {
        f"image.{camera.name}": np.zeros((camera.height, camera.width, 3), np.uint8) for camera in spec.cameras
    }
    if spec.state is not None:
        observation["state"] = np.array(spec.state.norm.center, np.float32)
    if spec.prompt is not None:
        observation["instruction"] = "warm up"
    return observation
