"""Replays the golden observations of artifacts through the runtime of this machine, and keeps the answers.

    python scripts/replay.py OUT ARTIFACT ... [--backend gguf] [--against OTHER] [--most N]

OUT gets NAME.npz with the answers of each artifact and replay.json with its record against the reference's answers, as
`rlrc verify` measures it. OTHER is such a folder, of another machine: the differences to its answers are told too.
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


class Watched:
    """An engine whose logits are kept: tokens agree, or they do not, but these tell how near they came."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.logits = engine, list[NDArray[np.float32]]()

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs = self.engine.run(graph, inputs)
        if "logits" in outputs:
            self.logits.append(outputs["logits"].ravel())
        return outputs

    def versions(self) -> dict[str, str]:
        return self.engine.versions()


def replayed(path: Path, out: Path, backend: str | None, against: Path | None, most: int) -> dict[str, Any]:
    """One artifact's row. ``most`` observations at most, evenly spread."""
    artifact = artifacts.load(path, verify=("graphs", "tokenizer", GOLDEN))
    policy = LocalPolicy(artifact, backend=backend)
    policy.engine = watched = Watched(policy.engine)
    whole = verify.read_golden(artifact.file(GOLDEN), policy.spec)
    golden = chosen(whole, most)
    limits = verify.recorded_tolerances(find_record(artifact, policy.backend))
    answers = verify.replay(policy, golden)
    record = verify.compare(policy, answers, golden, limits)
    arrays: dict[str, NDArray[Any]] = {"actions": answers.actions}
    if answers.tokens is not None:
        arrays |= {"tokens": answers.tokens, "logits": np.stack(watched.logits)}
    write_npz(out / f"{path.name}.npz", **arrays)
    row = {
        "name": path.name,
        "precision": next(g.precision for g in artifact.manifest.graphs if g.backend == policy.backend),
        "observations": len(golden),
        "of": len(whole),
        "record": asdict(record),
        "failure": verify.failure_reason(record),
    }
    if against is None:
        return row
    other = read_npz(against / f"{path.name}.npz")
    theirs = replace(golden, actions=other["actions"].astype(np.float32))
    if golden.logits is not None:
        theirs = replace(theirs, tokens=other["tokens"], logits=other["logits"].reshape(golden.logits.shape))
    between = verify.compare(policy, answers, theirs, limits)
    difference = np.abs(answers.actions - other["actions"])
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


def chosen(golden: Golden, most: int) -> Golden:
    return golden if len(golden) <= most else golden.rows(np.linspace(0, len(golden) - 1, most).astype(int))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--backend")
    parser.add_argument("--against", type=Path)
    parser.add_argument("--most", type=int, default=10**9)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for path in given.artifacts:
        rows.append(replayed(path, given.out, given.backend, given.against, given.most))
        told = rows[-1].get("difference", {}).get("actions")
        print(
            f"{path.name}: {rows[-1]['observations']} observations, {rows[-1]['failure'] or 'within its limits'}"
            f"{'' if told is None else f', differs by up to {told:.3g} in action units'}",
            flush=True,
        )
    result = {"machine": platform.machine(), "python": platform.python_version(), "rows": rows}
    (given.out / "replay.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
