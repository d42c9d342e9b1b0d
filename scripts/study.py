"""The rows of the recovery study, and what they say together. See scripts/study.mk.

    python scripts/study.py row NAME EXPORTED SUCCESS.json OUT.json
    python scripts/study.py summary ROWS/ LATENCY.json RECOVERY.json RECOVERY.md RECOVERY.svg

A row is one policy: how it was pruned, recovered and quantized, what it weighs, and every evaluation episode's outcome.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlrc import artifact
from rlrc.artifact import HistoryEntry, Manifest
from rlrc.benchmarks.results import dump, write

Row = dict[str, Any]
DENSE = 2  # stages of the dense policy: new, sft


def pruning(history: Sequence[HistoryEntry]) -> Row | None:
    """How the policy was cut: what went of the intermediate blocks that were cut most, of the decoder, of the whole."""
    cuts = [entry for entry in history if entry.stage == "prune"]
    if not cuts:
        return None
    config, removed = cuts[-1].config, cuts[-1].after["removed"]
    return {
        "kind": config.get("kind", "width"),
        "score": config["score"],
        "ratio_layer": max(layer["parameters"] for layer in removed["layers"]),
        "ratio_decoder": removed["decoder"],
        "ratio_total": removed["whole"],
    }


def recovery(history: Sequence[HistoryEntry]) -> list[Row]:
    """Every stage that trains, with what the rows differ by."""
    told = {
        "sft": ("steps", "demonstrations", "dagger_rounds", "seed"),
        "distill": ("steps", "demonstrations", "dagger_rounds", "hidden", "seed"),
        "rl": ("iterations", "episodes", "warmup", "behaviour_cloning", "demonstrations", "seed"),
    }
    trained = [entry for entry in history[DENSE:] if entry.stage in told]
    return [{"stage": entry.stage} | {key: entry.config[key] for key in told[entry.stage]} for entry in trained]


def shape(manifest: Manifest) -> str:
    """The same for policies whose graphs take the same time: geometry and precision."""
    described = artifact.to_json(manifest)
    precision = sorted({graph["precision"] for graph in described["graphs"]})
    text = json.dumps([described["towers"], precision], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def row(name: str, exported: Path, success: Path, out: Path) -> None:
    manifest = artifact.load(exported, verify=()).manifest
    (measured,) = json.loads(success.read_text())["rows"]
    arm, _, seed = name.rpartition("-")
    numbered = seed.isdigit()
    values = {
        "name": arm if numbered else name,
        "seed": int(seed) if numbered else None,
        "prune": pruning(manifest.history),
        "recovery": recovery(manifest.history),
        "quantization": measured["precision"],
        "parameters": measured["parameters"],
        "bytes": measured["bytes"],
        "shape": shape(manifest),
        "success": measured["success"],
        "episodes": measured["episodes"],
        "interval": measured["interval"],
        "hard": measured["hard"]["success"],
        "per_task": {task: played["success"] for task, played in measured["per_task"].items()},
        "cpu_minutes": round(sum(entry.cpu_minutes for entry in manifest.history[DENSE:]), 2),
        "command": f"make -f scripts/study.mk {out}",
        "outcomes": measured["outcomes"],
    }
    write(out, dump(values))


if __name__ == "__main__":
    command, *arguments = sys.argv[1:] or [""]
    if command == "row" and len(arguments) == 4:
        row(arguments[0], *map(Path, arguments[1:]))
    else:
        sys.exit(f"expected what the module's first lines say, found {' '.join(sys.argv[1:]) or 'nothing'}")
