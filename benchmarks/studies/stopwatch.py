"""Check the harness of `rlrc bench latency` on this machine. Exit code 1 if a check fails.

    python benchmarks/studies/stopwatch.py ARTIFACT [--trials 300] [--threads 1] [--calls 20000]

Detection: the harness must find no difference between two copies of an artifact, and must find a 10 % slow-down.
Cost: for a policy that computes nothing, 90 % of the calls must take less than 50 microseconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from rlrc import artifact as artifacts
from rlrc.benchmarks.measure import latency
from rlrc.benchmarks.results.stats import Estimate, percentiles, ratio_interval
from rlrc.runtime.inference.policy import LocalPolicy, Policy

MARGIN = 0.03  # ratios closer to 1 count as no difference: two runs of one policy differ by as much
SLOWDOWN = 0.1
LIMIT_US = 50.0  # a thousandth of a control period at 20 Hz
PASSES = 11  # graph calls per inference of a flow policy: prefix and 10 steps


@dataclass(frozen=True)
class Detection:
    """``ratio`` of medians with its 95 % interval; ``found`` and ``needed`` are results of ``classify``."""

    name: str
    ratio: float
    interval: tuple[float, float]
    found: str
    needed: str
    passed: bool


class SlowedPolicy:
    """A policy that takes longer by the fraction ``slowdown``."""

    def __init__(self, policy: Policy, slowdown: float) -> None:
        self.policy, self.slowdown = policy, slowdown

    def infer(self, observation: Mapping[str, Any]) -> Any:
        started = perf_counter()
        result = self.policy.infer(observation)
        now = perf_counter()
        end = now + self.slowdown * (now - started)
        while perf_counter() < end:
            pass
        return result

    def reset(self) -> None:
        self.policy.reset()


class IdlePolicy:
    """A policy that computes nothing, with as many graph calls as a flow policy."""

    def __init__(self) -> None:
        self.engine: Any = _IdleEngine()
        self._timing = {"preprocess_ms": 0.0, "vision_ms": 0.0, "decoder_ms": 0.0, "postprocess_ms": 0.0}

    def infer(self, observation: Mapping[str, Any]) -> Any:
        self.engine.run("prefix", observation)
        for _ in range(PASSES - 1):
            self.engine.run("step", observation)
        return {"timing": self._timing}

    def reset(self) -> None:
        pass


class _IdleEngine:
    def run(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def versions(self) -> dict[str, str]:
        return {}


def classify(ratio: Estimate) -> str:
    """Return "slower", "faster" or "no difference"."""
    if ratio.low > 1 + MARGIN:
        return "slower"
    return "faster" if ratio.high < 1 - MARGIN else "no difference"


def check_detection(
    open_policy: Callable[[], Policy],
    observations: Sequence[dict[str, Any]],
    trials: int,
    tick: Callable[[int], None] = lambda _: None,
) -> list[Detection]:
    """Run both detections in one interleaved run. Each call of ``open_policy`` opens the same policy again."""
    policies: dict[str, Any] = {
        "one": open_policy(),
        "same": open_policy(),
        "slowed": SlowedPolicy(open_policy(), SLOWDOWN),
    }
    trials_of = latency.measure(policies, dict.fromkeys(policies, observations), trials, tick=tick)
    checks = []
    for name, title, needed in (
        ("same", "the same artifact twice", "no difference"),
        ("slowed", f"the artifact slowed by {SLOWDOWN:.0%}", "slower"),
    ):
        ratio = ratio_interval(trials_of[name].rounds(), trials_of["one"].rounds())
        found = classify(ratio)
        passed = found == needed and (name != "same" or abs(ratio.value - 1) < MARGIN)
        checks.append(Detection(title, ratio.value, (ratio.low, ratio.high), found, needed, passed))
    return checks


def measure_cost(calls: int) -> dict[str, dict[str, float]]:
    """Percentiles in microseconds of the time added to every latency (``added_us``) and of a call (``whole_us``)."""
    call = latency.make_timer(IdlePolicy(), [{}])
    for _ in range(calls // 10 + 1):
        call()
    added, whole = np.empty(calls), np.empty(calls)
    for i in range(calls):
        started = perf_counter()
        milliseconds, _ = call()
        whole[i] = (perf_counter() - started) * 1e6
        added[i] = milliseconds * 1e3
    return {"added_us": percentiles(added.tolist()), "whole_us": percentiles(whole.tolist())}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--trials", type=int, default=300, help="inferences per policy after the warm-up")
    parser.add_argument("--threads", type=int, default=1, help="threads of the engine")
    parser.add_argument("--calls", type=int, default=20_000, help="calls of the harness")
    args = parser.parse_args(arguments)
    artifact = artifacts.load(args.artifact)
    checks = check_detection(lambda: LocalPolicy(artifact, args.threads), latency.observations(artifact), args.trials)
    for check in checks:
        low, high = check.interval
        verdict = "PASS" if check.passed else "FAIL"
        print(f"{verdict}: {check.name}: {check.ratio:.3f} ({low:.3f} to {high:.3f}), {check.found}")
    cost = measure_cost(args.calls)
    cheap = cost["whole_us"]["p90"] < LIMIT_US
    for name, title in (("added_us", "added to every latency"), ("whole_us", "call of the harness")):
        print(f"{title}: " + ", ".join(f"{key} {value:.2f}" for key, value in cost[name].items()) + " microseconds")
    print(f"{'PASS' if cheap else 'FAIL'}: the harness costs {cost['whole_us']['p90']:.1f} microseconds at p90")
    return 0 if cheap and all(check.passed for check in checks) else 1


if __name__ == "__main__":
    raise SystemExit(main())
