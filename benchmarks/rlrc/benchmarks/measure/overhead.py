"""What the stop-watch of `rlrc bench latency` costs: the same calls of a policy that does nothing.

Two costs. What is added to every figure: the time between the readings of the clock that no policy took. What a call
costs beside that: choosing an observation, collecting the parts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.benchmarks.measure import latency
from rlrc.benchmarks.results.stats import percentiles

LIMIT_US = 50.0  # a thousandth of a control period at 20 Hz
PASSES = 11  # of an engine: a flow policy's pictures, prefix, and steps, or the seven tokens of an autoregressive one


class Nothing:
    """A policy of one picture, a prefix and the steps of a flow, whose graphs do nothing."""

    def __init__(self) -> None:
        self.engine: Any = _Engine()
        self._timing = {"preprocess_ms": 0.0, "vision_ms": 0.0, "decoder_ms": 0.0, "postprocess_ms": 0.0}

    def infer(self, observation: Mapping[str, Any]) -> Any:
        self.engine.run("prefix", observation)
        for _ in range(PASSES - 1):
            self.engine.run("step", observation)
        return {"timing": self._timing}

    def reset(self) -> None:
        pass


class _Engine:
    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {}

    def versions(self) -> dict[str, str]:
        return {}


def measure(calls: int) -> dict[str, Any]:
    """Microseconds: ``added`` to what is measured, and ``whole``, all that a call of the harness takes."""
    call = latency.timed(Nothing(), [{}])
    for _ in range(calls // 10 + 1):
        call()
    added, whole = np.empty(calls), np.empty(calls)
    for i in range(calls):
        started = time.perf_counter()
        milliseconds, _ = call()
        whole[i] = (time.perf_counter() - started) * 1e6
        added[i] = milliseconds * 1e3
    which = {"added_us": added, "whole_us": whole}
    return {name: {key: round(value, 3) for key, value in percentiles(list(of)).items()} for name, of in which.items()}
