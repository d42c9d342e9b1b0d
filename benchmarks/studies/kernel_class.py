"""Measure errors and latency of artifacts on the kernels that the engine selects; started by kernel_classes.py.

    python benchmarks/studies/kernel_class.py OUT.json ARTIFACT... [--threads N] [--rounds N] [--most N]

Needs the runtime only. With 0 rounds, latency is not measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc import artifact as artifacts
from rlrc.artifact import GOLDEN
from rlrc.runtime.inference import verify
from rlrc.runtime.inference.backends.engine import Engine
from rlrc.runtime.inference.policy import LocalPolicy


class FirstLogits:
    """An engine that keeps the first logits, which do not depend on tokens generated before."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.logits = engine, np.zeros(0, np.float32)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs = self.engine.run(graph, inputs)
        if "logits" in outputs and not len(self.logits):
            self.logits = outputs["logits"].ravel()
        return outputs

    def versions(self) -> dict[str, str]:
        return self.engine.versions()


def errors(policy: LocalPolicy, golden: verify.Golden) -> dict[str, Any]:
    """``logits_error``: RMS over the logits' deviation; ``error_of_range``: largest action error over the range."""
    assert golden.logits is not None
    engine, outputs, logits = policy.engine, [], []
    for index in range(len(golden)):
        policy.engine = first = FirstLogits(engine)
        outputs.append(verify.replay(policy, golden.rows([index])))
        logits.append(first.logits)
    policy.engine = engine
    actual = np.stack(logits)
    expected = golden.logits.reshape(len(golden), -1)[:, : actual.shape[1]]
    answers = verify.ReplayOutputs(
        np.concatenate([each.actions for each in outputs]),
        np.concatenate([each.tokens for each in outputs if each.tokens is not None]),
    )
    record = verify.compare(policy, answers, golden, verify.Tolerances(1.0))
    assert answers.tokens is not None
    return {
        "observations": len(golden),
        "logits_error": float(np.sqrt(np.square(actual - expected).mean() / expected.var())),
        "tokens": record.tokens,
        "token_flips": record.token_flips,
        "error_of_range": max(record.range_error),
        "answers": answers.tokens.ravel().tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--most", type=int, default=10**9, help="maximum number of observations, evenly spaced")
    arguments = parser.parse_args()
    policies, rows, observed = {}, {}, {}
    for path in arguments.artifacts:
        artifact = artifacts.load(path, verify=())
        policies[path.name] = policy = LocalPolicy(artifact, arguments.threads)
        golden = verify.read_golden(artifact.file(GOLDEN), policy.spec)
        indices = np.linspace(0, len(golden) - 1, min(arguments.most, len(golden))).astype(int)
        rows[path.name] = errors(policy, golden.rows(indices))
        observed[path.name] = golden.observation(0, policy.spec)
        print(f"{path.name}: {rows[path.name]['token_flips']} of {rows[path.name]['tokens']} tokens differ", flush=True)
    trials: dict[str, list[float]] = {name: [] for name in policies}
    for _ in range(arguments.rounds):
        for name, policy in policies.items():
            started = perf_counter()
            policy.infer(observed[name])
            trials[name].append((perf_counter() - started) * 1e3)
    for name, row in rows.items():
        times = trials[name][1:]  # the first warms up
        row["latency_ms"] = (
            {"p0": round(min(times), 3), "p50": round(float(np.median(times)), 3)} if len(times) else None
        )
    versions = next(iter(policies.values())).engine.versions()
    arguments.out.write_text(json.dumps({"versions": versions, "rows": rows}))


if __name__ == "__main__":
    main()
