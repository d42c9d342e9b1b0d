"""Replay the golden observations of artifacts on this machine and record the outputs.

    python scripts/replay.py OUT ARTIFACT ... [--backend gguf] [--against OTHER] [--most N]

Writes to OUT: NAME.npz with the outputs of each artifact, and replay.json with the errors as `rlrc verify` measures
them. OTHER is such a folder from another machine; the differences from its outputs are recorded as well.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc import artifact as artifacts
from rlrc.artifact import GOLDEN
from rlrc.npz import read_npz, write_npz
from rlrc.runtime.inference import verify
from rlrc.runtime.inference.backends.engine import Engine
from rlrc.runtime.inference.policy import LocalPolicy, find_record
from rlrc.runtime.inference.verify import Golden


class LogitRecorder:
    """An engine that keeps the logits, which measure differences that leave the tokens unchanged."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.logits = engine, list[NDArray[np.float32]]()

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs = self.engine.run(graph, inputs)
        if "logits" in outputs:
            self.logits.append(outputs["logits"].ravel())
        return outputs

    def versions(self) -> dict[str, str]:
        return self.engine.versions()


def replay_artifact(path: Path, out: Path, backend: str | None, against: Path | None, most: int) -> dict[str, Any]:
    """Replay at most ``most`` evenly spaced observations of one artifact. Returns its row."""
    artifact = artifacts.load(path, verify=("graphs", "tokenizer", GOLDEN))
    policy = LocalPolicy(artifact, backend=backend)
    policy.engine = recorder = LogitRecorder(policy.engine)
    full = verify.read_golden(artifact.file(GOLDEN), policy.spec)
    golden = select_rows(full, most)
    limits = verify.recorded_tolerances(find_record(artifact, policy.backend))
    outputs = verify.replay(policy, golden)
    record = verify.compare(policy, outputs, golden, limits)
    arrays: dict[str, NDArray[Any]] = {"actions": outputs.actions}
    if outputs.tokens is not None:
        arrays |= {"tokens": outputs.tokens, "logits": np.stack(recorder.logits)}
    write_npz(out / f"{path.name}.npz", **arrays)
    row = {
        "name": path.name,
        "precision": next(g.precision for g in artifact.manifest.graphs if g.backend == policy.backend),
        "observations": len(golden),
        "of": len(full),
        "record": asdict(record),
        "failure": verify.failure_reason(record),
    }
    if against is None:
        return row
    other = read_npz(against / f"{path.name}.npz")
    baseline = replace(golden, actions=other["actions"].astype(np.float32))
    if golden.logits is not None:
        baseline = replace(baseline, tokens=other["tokens"], logits=other["logits"].reshape(golden.logits.shape))
    between = verify.compare(policy, outputs, baseline, limits)
    difference = np.abs(outputs.actions - other["actions"])
    logits = None
    if "logits" in arrays:
        logits = float(np.abs(arrays["logits"] - other["logits"]).max() / np.ptp(other["logits"]))
    return row | {
        "difference": {
            "actions": float(difference.max()),
            "actions_of_range": float((difference / verify.action_range(policy.spec.action)).max()),
            "tokens": between.token_flips if "tokens" in arrays else None,
            "logits_of_range": logits,
            "failure": verify.failure_reason(between),
        }
    }


def select_rows(golden: Golden, most: int) -> Golden:
    return golden if len(golden) <= most else golden.rows(np.linspace(0, len(golden) - 1, most).astype(int))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--backend")
    parser.add_argument("--against", type=Path)
    parser.add_argument("--most", type=int, default=10**9)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for path in args.artifacts:
        row = replay_artifact(path, args.out, args.backend, args.against, args.most)
        rows.append(row)
        largest = row.get("difference", {}).get("actions")
        print(
            f"{path.name}: {row['observations']} observations, {row['failure'] or 'within its limits'}"
            f"{'' if largest is None else f', differs by up to {largest:.3g} in action units'}",
            flush=True,
        )
    result = {"machine": platform.machine(), "python": platform.python_version(), "rows": rows}
    (args.out / "replay.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
