"""One policy process behind an event loop. Its clients wait without blocking health checks and refusals."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import PolicySpec
from rlrc.runtime.control.inference_process import InferenceProcess, Open
from rlrc.runtime.servers.refusal import RequestRefused
from rlrc.runtime.wire.metrics import Metrics
from rlrc.runtime.wire.ports import LARGEST
from rlrc.worker import WorkerDied

TIMEOUT_S = 60.0  # an inference that takes longer has failed


class Chunk(NamedTuple):
    """``actions``: float32 (horizon, dim), un-normalised; ``seconds``: inference time without queueing."""

    actions: NDArray[np.float32]
    seconds: float


class SharedInference:
    """Infers one observation at a time; the caller serializes calls.

    A policy that dies or hangs is not restarted: ``failed`` is set and ``failure`` says why. The server then exits, and
    its supervisor restarts it.
    """

    def __init__(self, spec: PolicySpec, metrics: Metrics) -> None:
        self.opened, self.failed = asyncio.Event(), asyncio.Event()
        self.failure: str | None = None
        self.seconds = 0.0
        """duration of the last inference"""
        self._spec, self._metrics = spec, metrics
        self._arrived = asyncio.Event()  # something may have come from the process
        self._process: InferenceProcess | None = None

    @property
    def warmth(self) -> str:
        return "" if self._process is None else str(self._process.warmth)

    async def open(self, open_policy: Open, arguments: tuple[Any, ...]) -> None:
        """Run ``open_policy(*arguments)`` in a new process and warm it up. Raises UserError if that fails."""
        example = example_observation(self._spec)
        self._process = await asyncio.to_thread(InferenceProcess, open_policy, arguments, example, LARGEST)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._process.sentinel, self.fail, "inference ended")
        loop.add_reader(self._process.fileno(), self._arrived.set)
        self.opened.set()

    async def infer(self, observation: Mapping[str, Any]) -> Chunk:
        """Raises RequestRefused."""
        assert self._process is not None
        answer = None
        timeout = f"inference that has not answered for {TIMEOUT_S:g} s"
        timer = asyncio.get_running_loop().call_later(TIMEOUT_S, self.fail, timeout)
        try:
            if self.failure is None:  # it may have failed while the request was queued
                self._process.ask(observation, 0)
            while self.failure is None and (answer := self._process.poll()) is None:
                self._arrived.clear()
                await self._arrived.wait()
        except WorkerDied as error:
            self.fail(str(error))
        finally:
            timer.cancel()
        if answer is None or self.failure is not None:
            raise self.refusal()
        if answer.actions is None:
            raise RequestRefused("policy", answer.error or "the policy gave no action")
        self.seconds = answer.seconds
        self._metrics.observe("rlrc_inference_seconds", answer.seconds)
        return Chunk(answer.actions, answer.seconds)

    def refusal(self) -> RequestRefused:
        """The reply to every request once the policy has failed."""
        return RequestRefused("failed", f"expected a running policy, found: {self.failure}; restart the server")

    def fail(self, failure: str) -> None:
        self._remove_readers()
        self.failure = self.failure or failure
        self.failed.set()
        self._arrived.set()

    def close(self) -> None:
        if self._process is not None:
            self._remove_readers()
            self._process.close()

    def _remove_readers(self) -> None:
        assert self._process is not None
        for descriptor in (self._process.sentinel, self._process.fileno()):
            asyncio.get_running_loop().remove_reader(descriptor)


def example_observation(spec: PolicySpec) -> dict[str, Any]:
    """A warm-up observation: black images, the state at the normalisation's centre, and a short instruction."""
    observation: dict[str, Any] = {
        f"image.{camera.name}": np.zeros((camera.height, camera.width, 3), np.uint8) for camera in spec.cameras
    }
    if spec.state is not None:
        observation["state"] = np.array(spec.state.norm.center, np.float32)
    if spec.prompt is not None:
        observation["instruction"] = "warm up"
    return observation
