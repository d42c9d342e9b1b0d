"""How long one call of ``policy.infer`` takes, in total and by part.

Several policies are measured in one run, in alternating blocks (A B A B ...): on a machine that others use, what
disturbs one disturbs the other. Every trial is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from rlrc.artifact import Artifact
from rlrc.benchmarks.stats import percentiles
from rlrc.errors import UserError
from rlrc.runtime.verify import GOLDEN, read_golden
from rlrc.runtime.warmup import warm_up

if TYPE_CHECKING:
    from rlrc.runtime.policy import Policy, Result

PARTS = ("preprocess", "vision", "decoder", "postprocess")


@dataclass(frozen=True)
class Trials:
    """Milliseconds. ``total`` and every part: one number a trial, in order; a round is ``block`` successive trials."""

    block: int
    total: list[float]
    parts: dict[str, list[float]]
    warmup_calls: int
    stable: bool

    def rounds(self) -> list[list[float]]:
        return [self.total[i : i + self.block] for i in range(0, len(self.total), self.block)]


def observations(artifact: Artifact) -> list[dict[str, Any]]:
    """The artifact's golden observations, as a robot would send them."""
    spec = artifact.manifest.policy
    golden = read_golden(artifact.file(GOLDEN), spec)
    return [golden.observation(i, spec) for i in range(len(golden))]


def measure(
    policies: Mapping[str, Policy],
    observations: Mapping[str, Sequence[dict[str, Any]]],
    trials: int = 500,
    block: int = 10,
    tick: Callable[[int], None] = lambda _: None,
) -> dict[str, Trials]:
    """Warm up every policy, then time ``trials`` calls of each (rounded up to whole blocks). ``tick`` gets how many
    more are done."""
    if trials < 1 or block < 1:
        raise UserError(f"expected at least one trial and one trial a block, found {trials} and {block}; raise them")
    calls = {name: _timed(policy, observations[name]) for name, policy in policies.items()}
    warm = {name: warm_up(lambda call=call: call()[0])[:2] for name, call in calls.items()}  # type: ignore[misc]
    timed: dict[str, list[tuple[float, dict[str, float]]]] = {name: [] for name in policies}
    for _ in range(math.ceil(trials / block)):
        for name, call in calls.items():
            timed[name] += [call() for _ in range(block)]
            tick(block)
    return {
        name: Trials(
            block,
            [total for total, _ in timed[name]],
            {part: [parts[f"{part}_ms"] for _, parts in timed[name]] for part in PARTS},
            *warm[name],
        )
        for name in policies
    }


def _timed(policy: Policy, observations: Sequence[dict[str, Any]]) -> Callable[[], tuple[float, dict[str, float]]]:
    """A function that makes one call with the next observation: (milliseconds in total, milliseconds by part)."""
    following = cycle(observations)

    def call() -> tuple[float, dict[str, float]]:
        observation = next(following)
        start = time.perf_counter()
        result: Result = policy.infer(observation)
        return (time.perf_counter() - start) * 1e3, dict(result["timing"])  # type: ignore[arg-type]

    return call


def row(trials: Trials) -> dict[str, Any]:
    """The measured part of a table row: percentiles, and the trials themselves, to 0.1 microseconds."""
    return {
        "latency_ms": _rounded(trials.total),
        "parts_ms": {part: _rounded(values) for part, values in trials.parts.items()},
        "warmup": {"calls": trials.warmup_calls, "stable": trials.stable},
        "block": trials.block,
        "trials_ms": [round(value, 4) for value in trials.total],
    }


def _rounded(milliseconds: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in percentiles(milliseconds).items()}
