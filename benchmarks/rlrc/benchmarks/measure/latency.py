"""Duration of one call of ``policy.infer``, in total and by part.

Several policies are measured in one run, in alternating blocks (A B A B ...), so that other load on the machine affects
all alike. Every trial is kept.

The policy reports the time of images, graphs and the rest. The engine is wrapped here to tell prefill, decode and flow
steps apart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from rlrc.artifact import GOLDEN, Artifact
from rlrc.benchmarks.results.stats import percentiles
from rlrc.errors import UserError
from rlrc.runtime.inference.backends.engine import Engine
from rlrc.runtime.inference.verify import read_golden
from rlrc.runtime.inference.warmup import warm_up

if TYPE_CHECKING:
    from rlrc.runtime.inference.policy import Policy, Result

# In the order of a decision, with the names of rlrc.jetson.model.work. "decoder": the policy's own figure for all
# passes but the images', used where its engine cannot be wrapped.
PARTS = ("preprocess", "vision", "prefix", "prefill", "decode", "steps", "decoder", "head", "postprocess")
GRAPHS = {"vision": "vision", "prefix": "prefix", "step": "steps", "decoder": "prefill", "head": "head"}

BLOCK = 10  # successive trials of one policy
PATIENCE_S = 60.0  # limit of a warm-up, for policies that take seconds a call


@dataclass(frozen=True)
class Trials:
    """Milliseconds: one number a trial, in order, in ``total`` and every part; a round is ``block`` successive trials.

    ``parts``: the PARTS that the policy has, each the sum over its passes.
    """

    block: int
    total: list[float]
    parts: dict[str, list[float]]
    warmup_calls: int
    stable: bool

    def rounds(self) -> list[list[float]]:
        return [self.total[i : i + self.block] for i in range(0, len(self.total), self.block)]


def observations(artifact: Artifact) -> list[dict[str, Any]]:
    """The artifact's golden observations in the format that a robot sends."""
    spec = artifact.manifest.policy
    golden = read_golden(artifact.file(GOLDEN), spec)
    return [golden.observation(i, spec) for i in range(len(golden))]


def measure(
    policies: Mapping[str, Policy],
    observations: Mapping[str, Sequence[dict[str, Any]]],
    trials: int = 500,
    block: int = BLOCK,
    tick: Callable[[int], None] = lambda _: None,
) -> dict[str, Trials]:
    """Warm up every policy, for a minute at most, then time ``trials`` calls of each (rounded up to whole blocks).

    ``tick`` is called with the number of new trials.
    """
    if trials < 1 or block < 1:
        raise UserError(f"expected at least one trial and one trial a block, found {trials} and {block}; increase them")
    calls = {name: make_timer(policy, observations[name]) for name, policy in policies.items()}
    warm = {name: warm_up(lambda call=call: call()[0], PATIENCE_S)[:2] for name, call in calls.items()}  # type: ignore[misc]
    timed: dict[str, list[tuple[float, dict[str, float]]]] = {name: [] for name in policies}
    for _ in range(math.ceil(trials / block)):
        for name, call in calls.items():
            timed[name] += [call() for _ in range(block)]
            tick(block)
    return {
        name: Trials(block, [total for total, _ in pairs], by_part([parts for _, parts in pairs]), *warm[name])
        for name, pairs in timed.items()
    }


def by_part(trials: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Every part that occurs in a trial, in the order of PARTS; 0 in the trials without it."""
    present = [part for part in PARTS if any(part in parts for parts in trials)]
    return {part: [parts.get(part, 0.0) for parts in trials] for part in present}


class TimedEngine:
    """An engine whose passes are timed. ``parts``: milliseconds since the last ``take``, by part.

    With llama.cpp, the graphs on ONNX Runtime are timed too, and a head's pass does not count for the decoder.
    """

    def __init__(self, engine: Engine, parts: dict[str, float] | None = None) -> None:
        self._engine, self.parts = engine, {} if parts is None else parts
        onnx = getattr(engine, "onnx", None)
        if onnx is not None:
            engine.onnx = TimedEngine(onnx, self.parts)  # type: ignore[attr-defined]

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        before = sum(self.parts.values())
        started = time.perf_counter()
        outputs = self._engine.run(graph, inputs)
        elapsed = (time.perf_counter() - started) * 1e3 - (sum(self.parts.values()) - before)
        part = part_of(graph, inputs)
        if part is not None:
            self.parts[part] = self.parts.get(part, 0.0) + elapsed
        return outputs

    def versions(self) -> dict[str, str]:
        return self._engine.versions()

    def take(self) -> dict[str, float]:
        parts = dict(self.parts)
        self.parts.clear()
        return parts


def part_of(graph: str, inputs: Mapping[str, NDArray[Any]]) -> str | None:
    """The part that a pass belongs to; None for a pass that is not timed separately."""
    later = graph == "decoder" and "start" in inputs and inputs["start"][0]
    return "decode" if later else GRAPHS.get(graph)


def make_timer(policy: Policy, observations: Sequence[dict[str, Any]]) -> Callable[[], tuple[float, dict[str, float]]]:
    """A function that makes one call with the next observation: (milliseconds in total, milliseconds by part)."""
    following = cycle(observations)
    passes: TimedEngine | None = None
    if (engine := getattr(policy, "engine", None)) is not None:
        passes = engine if isinstance(engine, TimedEngine) else TimedEngine(engine)
        policy.engine = passes  # type: ignore[attr-defined]

    def call() -> tuple[float, dict[str, float]]:
        observation = next(following)
        start = time.perf_counter()
        result: Result = policy.infer(observation)
        total = (time.perf_counter() - start) * 1e3
        parts = {name.removesuffix("_ms"): float(ms) for name, ms in result["timing"].items()}  # type: ignore[arg-type]
        if passes is not None:
            # For images the policy's figure counts: it includes the transfer of their arrays.
            parts = {**passes.take(), **{name: ms for name, ms in parts.items() if name != "decoder"}}
        return total, parts

    return call


def row(trials: Trials) -> dict[str, Any]:
    """The measured part of a table row: percentiles and all trials, to 0.1 microseconds."""
    return {
        "latency_ms": _round(trials.total),
        "parts_ms": {part: _round(values) for part, values in trials.parts.items()},
        "warmup": {"calls": trials.warmup_calls, "stable": trials.stable},
        "block": trials.block,
        "trials_ms": [round(value, 4) for value in trials.total],
    }


def _round(milliseconds: Sequence[float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in percentiles(milliseconds).items()}
