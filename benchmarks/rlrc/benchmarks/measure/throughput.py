"""Chunks a second of an otherwise idle machine, by the number of policies that run at once.

Each policy runs in its own thread: the engines compute without Python's lock.
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
    """(chunks a second, CPU-seconds a chunk) of every round, in which all policies run for ``seconds``.

    Calls that start within ``seconds`` count, and so does the time until the last one ends.
    """

    def work(policy: Policy, until: float) -> int:
        following, number = cycle(observations), 0
        while time.perf_counter() < until or not number:
            policy.infer(next(following))
            number += 1
        return number

    measured = []
    with ThreadPoolExecutor(len(policies)) as pool:
        list(pool.map(lambda policy: [policy.infer(observations[0]) for _ in range(WARM)], policies))
        for _ in range(rounds):
            started, before = time.perf_counter(), _processor_seconds()
            number = sum(pool.map(work, policies, [started + seconds] * len(policies)))
            measured.append((number / (time.perf_counter() - started), (_processor_seconds() - before) / number))
            tick(1)
    return measured


def row(measured: Sequence[tuple[float, float]], horizon: int) -> dict[str, Any]:
    """Means over the rounds, with the 95 % interval of the chunks a second."""
    chunks = mean_interval([rate for rate, _ in measured])
    return {
        "chunks_per_s": round(chunks.value, 4),
        "interval": [round(chunks.low, 4), round(chunks.high, 4)],
        "actions_per_s": round(chunks.value * horizon, 3),
        "cpu_s_per_chunk": round(sum(seconds for _, seconds in measured) / len(measured), 6),
    }


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system
