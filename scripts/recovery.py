"""Sums up scripts/recovery.sh: arms (sft, sft+ppo, ...) over seeds, paired differences, training curves, a picture.

    python scripts/recovery.py FOLDER SUCCESS.json OUT.json PICTURE.svg

FOLDER holds the artifacts ARM-SEED whose success SUCCESS.json has (from ``rlrc bench success``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

from rlrc import artifact
from rlrc.benchmarks.results import dump, recovery_minutes, write
from rlrc.benchmarks.stats import mcnemar, paired_difference_limit, wilson

Row = dict[str, Any]
COLOURS = {"sft": "tab:gray", "sft-long": "tab:orange", "sft+ppo": "tab:blue"}


def outcomes(rows: list[Row]) -> str:
    """Every episode of all seeds as 0 or 1, in the same order for every arm."""
    return "".join(row["outcomes"][task] for row in rows for task in sorted(row["outcomes"]))


def arm(name: str, rows: list[Row]) -> Row:
    played = outcomes(rows)
    successes = played.count("1")
    tasks = {task: [row["per_task"][task]["success"] for row in rows] for task in rows[0]["per_task"]}
    return {
        "name": name,
        "success": round(successes / len(played), 4),
        "episodes": len(played),
        "interval": [round(limit, 4) for limit in wilson(successes, len(played))],
        "seeds": [round(row["success"], 4) for row in rows],
        "hard": [round(row["hard"]["success"], 4) for row in rows],
        "cpu_minutes": [round(row["cpu_minutes"], 2) for row in rows],
        "per_task": {task: round(sum(rates) / len(rates), 4) for task, rates in tasks.items()},
    }


def comparison(arm: str, baseline: str, arms: dict[str, list[Row]]) -> Row:
    pairs = list(zip(outcomes(arms[arm]), outcomes(arms[baseline]), strict=True))
    only, only0 = pairs.count(("1", "0")), pairs.count(("0", "1"))
    return {
        "name": arm,
        "baseline": baseline,
        "difference": round((only - only0) / len(pairs), 4),
        "lower_limit": round(paired_difference_limit(only, only0, len(pairs)), 4),
        "mcnemar_p": mcnemar(only, only0),
    }


def curve(folder: Path) -> list[Row]:
    """Sampled success by PPO's iterations, with the CPU-minutes since the pruning."""
    manifest = artifact.load(folder, verify=()).manifest
    before = recovery_minutes(manifest) - manifest.history[-1].cpu_minutes
    (file,) = folder.glob("curves/*-rl.jsonl")
    points = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        {"cpu_minutes": round(before + point["cpu_seconds"] / 60, 2), "sampled_success": round(point["success"], 4)}
        for point in points
        if point["stage"] == "rl"
    ]


def draw(arms: list[Row], curves: dict[str, list[Row]], file: Path) -> None:
    matplotlib.use("agg")
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for points in curves.values():
        minutes = [point["cpu_minutes"] for point in points]
        axes.plot(minutes, [point["sampled_success"] for point in points], color="tab:blue", alpha=0.3, linewidth=1)
    for entry in arms:
        axes.scatter(entry["cpu_minutes"], entry["seeds"], color=COLOURS[entry["name"]], label=entry["name"], zorder=3)
    axes.set(xlabel="CPU-minutes of recovery", ylabel="success", title="One demonstration a task, three seeds")
    axes.legend(title="argmax, evaluation scenes\n(lines: sampled, while PPO trains)", loc="upper left")
    figure.tight_layout()
    figure.savefig(file)


def main(folder: Path, success: Path, out: Path, picture: Path) -> None:
    result = json.loads(success.read_text())
    arms: dict[str, list[Row]] = {}
    for row in result["rows"]:
        name, _, _ = row["name"].rpartition("-")
        arms.setdefault(name, []).append(row)
    summary = [arm(name, rows) for name, rows in arms.items()]
    curves = {row["name"]: curve(folder / row["name"]) for row in arms["sft+ppo"]}
    comparisons = [comparison("sft+ppo", baseline, arms) for baseline in arms if baseline != "sft+ppo"]
    values = {"kind": "recovery", "command": "bash scripts/recovery.sh", "machine": result["machine"]}
    write(out, dump(values | {"arms": summary, "comparisons": comparisons, "curves": curves}))
    draw(summary, curves, picture)
    for entry in summary:
        low, high = entry["interval"]
        minutes = sum(entry["cpu_minutes"]) / len(entry["cpu_minutes"])
        print(
            f"{entry['name']:<10}{entry['success']:.3f} ({low:.3f} to {high:.3f}) of {entry['episodes']} episodes, "
            f"seeds {entry['seeds']}, hard {entry['hard']}, {minutes:.1f} CPU-minutes"
        )
    for entry in comparisons:
        print(
            f"{entry['name']} - {entry['baseline']}: {entry['difference']:+.3f}, lower 95 % limit "
            f"{entry['lower_limit']:+.3f}, McNemar p {entry['mcnemar_p']:.2g}"
        )


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(f"expected FOLDER SUCCESS.json OUT.json PICTURE.svg, found {len(sys.argv) - 1} arguments")
    main(*map(Path, sys.argv[1:]))
