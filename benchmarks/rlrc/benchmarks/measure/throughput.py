"""How many chunks a machine makes in a second when it does nothing else, by how many policies run at once.

Every one is a policy of its own in a thread of its own: the engines compute without Python's lock.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Any

from rlrc.benchmarks.results.stats import mean_interval
from rlrc.runtime.inference.policy import Policy

WARM = 3  # calls of each before the first round


def measure(
    policies: Sequence[Policy],
    observations: Sequence[dict[str, Any]],
    seconds: float,
    rounds: int,
    tick: Callable[[int], None] = lambda _: None,
) -> list[tuple[float, float]]:
    """Of every round, all policies at work for ``seconds``: (chunks a second, CPU-seconds a chunk).

    A call that began in time counts, and the time until the last one has ended.
    """

    def work(policy: Policy, until: float) -> int:
        following, number = cycle(observations), 0
        while time.perf_counter() < until or not number:
            policy.infer(next(following))
            number += 1
        return number

    taken = []
    with ThreadPoolExecutor(len(policies)) as pool:
        list(pool.map(lambda policy: [policy.infer(observations[0]) for _ in range(WARM)], policies))
        for _ in range(rounds):
            started, before = time.perf_counter(), _processor_seconds()
            number = sum(pool.map(work, policies, [started + seconds] * len(policies)))
            taken.append((number / (time.perf_counter() - started), (_processor_seconds() - before) / number))
            tick(1)
    return taken


def row(taken: Sequence[tuple[float, float]], horizon: int) -> dict[str, Any]:
    """Means over the rounds, with the 95 % interval of the first."""
    chunks = mean_interval([rate for rate, _ in taken])
    return {
        "chunks_per_s": round(chunks.value, 4),
        "interval": [round(chunks.low, 4), round(chunks.high, 4)],
        "actions_per_s": round(chunks.value * horizon, 3),
        "cpu_s_per_chunk": round(sum(seconds for _, seconds in taken) / len(taken), 6),
    }


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system
