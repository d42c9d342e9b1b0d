"""Episodes in a simulator without a guard: observe, infer a chunk, play it, again.

Step n of an episode is due at ``start + n / hz`` and its action must be sent before step n + 1 is due. Inference is
synchronous: when a chunk is used up, the next action waits for inference. A late action is still sent (the environment
waits) and counted as a deadline miss; the schedule starts anew from it, so that no burst of actions follows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rlrc.errors import UserError
from rlrc.runtime.control.chunks import check_execute
from rlrc.runtime.inference.policy import Policy

if TYPE_CHECKING:
    from rlrc.envs.environment import Environment


@dataclass(frozen=True)
class PlayedEpisode:
    """``inference_ms`` has one duration per chunk; ``seconds``: from the first observation to the end."""

    seed: int
    success: bool
    steps: int
    deadline_misses: int
    seconds: float
    inference_ms: tuple[float, ...]


@dataclass(frozen=True)
class Rate:
    """``hz`` steps a second, 0 for as fast as possible; ``clock`` returns seconds."""

    hz: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        if not (math.isfinite(self.hz) and self.hz >= 0):
            raise UserError(
                f"expected a control rate of 0 (as fast as possible) or more Hz, found {self.hz}; give another --hz"
            )

    @property
    def period(self) -> float:
        return 1 / self.hz if self.hz else math.inf


def play_episode(policy: Policy, env: Environment, seed: int, rate: Rate, execute: int | None = None) -> PlayedEpisode:
    """One episode, of at most ``env.horizon`` steps; the environment is observed once a chunk.

    ``execute`` steps of every chunk are played before the next inference, all of them if None.

    Raises UserError for an ``execute`` longer than the chunk, and the exceptions of policy and environment.
    """
    policy.reset()
    observation, _ = env.reset(seed=seed)
    chunk: list[NDArray[np.float32]] = []
    inference_ms: list[float] = []
    steps = misses = 0
    success = over = False
    start = due = rate.clock()
    while not over:
        if not chunk:
            if steps:
                observation = env.observe()
            begun = rate.clock()
            actions = policy.infer(observation)["actions"]
            inference_ms.append((rate.clock() - begun) * 1e3)
            check_execute(execute, len(actions))
            chunk = list(actions[:execute])
        now = rate.clock()
        if now - due >= rate.period:
            misses, due = misses + 1, now
        success = env.advance(chunk.pop(0))
        steps += 1
        over = success or env.over or steps >= env.horizon
        due += rate.period
        if rate.hz and not over and (early := due - rate.clock()) > 0:
            rate.sleep(early)
    return PlayedEpisode(seed, success, steps, misses, rate.clock() - start, tuple(inference_ms))


def play_episodes(
    policy: Policy, env: Environment, seeds: Sequence[int], rate: Rate, execute: int | None = None
) -> Iterator[PlayedEpisode]:
    for seed in seeds:
        yield play_episode(policy, env, seed, rate, execute)


def summary(played: Sequence[PlayedEpisode]) -> dict[str, float | int]:
    """Success, deadline misses, achieved rate, and percentiles of inference in milliseconds."""
    durations = [duration for episode in played for duration in episode.inference_ms]
    p50, p90, p99 = np.percentile(durations, (50, 90, 99)).tolist()
    steps, seconds = sum(episode.steps for episode in played), sum(episode.seconds for episode in played)
    return {
        "episodes": len(played),
        "successes": sum(episode.success for episode in played),
        "steps": steps,
        "deadline_misses": sum(episode.deadline_misses for episode in played),
        "achieved_hz": steps / seconds if seconds else math.inf,
        "inferences": len(durations),
        "inference_ms_p50": p50,
        "inference_ms_p90": p90,
        "inference_ms_p99": p99,
        "inference_ms_max": max(durations),
    }
