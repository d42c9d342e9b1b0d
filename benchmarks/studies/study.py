"""The rows of the recovery study and their summary; run by study.mk.

    python benchmarks/studies/study.py row NAME EXPORTED SUCCESS.json OUT.json
    python benchmarks/studies/study.py shapes ROWS/ GRAPHS/    one NAME=FOLDER per kind of graph, for rlrc bench latency
    python benchmarks/studies/study.py summary ROWS/ LATENCY.json RECOVERY.json RECOVERY.md RECOVERY.svg

A row describes one policy: pruning, recovery, quantization, size, and the outcome of every evaluation episode. The
summary adds the latency of each kind of graph and writes the tables between the marks of the page.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

from rlrc import artifact
from rlrc.artifact import HistoryEntry, Manifest
from rlrc.benchmarks.results.results import dump, write
from rlrc.benchmarks.results.stats import mcnemar, paired_difference_limit, wilson

Row = dict[str, Any]
DENSE = 2  # stages of the dense policy: new, sft
ORDER = [
    "dense", "dense+int4", "dense+int8", "cut50", "cut75", "pruned", "random", "depth", "cut50+sft", "cut75+sft",
    "random+sft", "depth+sft", "distill", "sft", "sft+sft", "sft+more", "sft+ppo", "sft+ppo+int4", "sft+ppo+int8",
    "sft+ppo+awq", "sft+ppo+gptq", "dense+sft",
]  # fmt: skip  # of the arms in the table; all others follow
COMPARED = (
    ("sft", "dense"),
    ("sft+ppo", "sft"),
    ("sft+ppo", "sft+sft"),
    ("sft+ppo", "sft+more"),
    ("sft+ppo", "dense+sft"),
    ("sft+ppo", "dense"),
    ("cut50", "dense"),
    ("random+sft", "sft"),
    ("depth+sft", "sft"),
    ("distill", "sft"),
    ("sft+ppo+int4", "sft+ppo"),
    ("sft+ppo+int8", "sft+ppo"),
    ("sft+ppo+awq", "sft+ppo+int4"),
    ("sft+ppo+gptq", "sft+ppo+int4"),
    ("dense+int4", "dense"),
    ("few-sft+ppo+int4", "few-sft+ppo"),
    ("few-sft+ppo+int8", "few-sft+ppo"),
    ("few-sft", "pruned"),
    ("few-sft", "few-random+sft"),
    ("few-sft+ppo", "few-sft"),
    ("few-sft+ppo", "few-long"),
    ("few-sft+ppo", "few-dense+sft"),
    ("few-sft+ppo", "few-sft+ppo-cold"),
    ("few-sft+ppo", "few-sft+ppo-free"),
    ("few-distill", "few-sft"),
    ("few-depth+sft", "few-sft"),
)


def pruning(history: Sequence[HistoryEntry]) -> Row | None:
    """Kind of pruning and the share of parameters removed: of the most pruned block, the decoder, the whole policy."""
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
    """Every training stage, with the settings that differ between rows."""
    settings = {
        "sft": ("steps", "demonstrations", "dagger_rounds", "seed"),
        "distill": ("steps", "demonstrations", "dagger_rounds", "hidden", "seed"),
        "rl": ("iterations", "episodes", "warmup", "behaviour_cloning", "demonstrations", "seed"),
    }
    trained = [entry for entry in history[DENSE:] if entry.stage in settings]
    return [{"stage": entry.stage} | {key: entry.config[key] for key in settings[entry.stage]} for entry in trained]


def curve(exported: Path, spent: float, minutes: float) -> list[Row]:
    """Sampled success after each PPO iteration. PPO took the last ``minutes`` of the ``spent`` CPU-minutes."""
    files = sorted(exported.glob("curves/*-rl.jsonl"))
    points = [json.loads(line) for line in files[-1].read_text().splitlines()] if files else []
    return [
        {
            "cpu_minutes": round(spent - minutes + point["cpu_seconds"] / 60, 2),
            "sampled_success": round(point["success"], 4),
        }
        for point in points
        if point["stage"] == "rl"
    ]


def shape(manifest: Manifest) -> str:
    """A hash of geometry and precision: policies with the same hash have the same latency."""
    description = artifact.to_json(manifest)
    precision = sorted({graph["precision"] for graph in description["graphs"]})
    text = json.dumps([description["towers"], precision], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def row(name: str, exported: Path, success: Path, out: Path) -> None:
    manifest = artifact.load(exported, verify=()).manifest
    (measured,) = json.loads(success.read_text())["rows"]
    arm, _, seed = name.rpartition("-")
    numbered = seed.isdigit()
    spent = sum(entry.cpu_minutes for entry in manifest.history[DENSE:])
    ppo_minutes = sum(entry.cpu_minutes for entry in manifest.history if entry.stage == "rl")
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
        "cpu_minutes": round(spent, 2),
        "curve": curve(exported, spent, ppo_minutes),
        "command": f"make -f benchmarks/studies/study.mk {out}",
        "outcomes": measured["outcomes"],
    }
    write(out, dump(values))


def arms(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of every arm, one per seed."""
    by_arm: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["seed"] or 0):
        by_arm.setdefault(row["name"], []).append(row)
    return by_arm


def outcomes(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """Outcomes of the episodes of all seeds as 0 or 1, in the same order for every arm."""
    return "".join(row["outcomes"][task] for row in rows for task in tasks)


def table(by_arm: dict[str, list[Row]]) -> list[str]:
    lines = [
        "| arm | parameters | MB | p50 ms | success (95 %) | episodes | seeds | hard tasks, seeds | CPU-minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in by_arm.items():
        played = outcomes(rows, sorted(rows[0]["outcomes"]))
        low, high = wilson(played.count("1"), len(played))
        latency = rows[0]["latency_ms"]
        cells = [
            name,
            f"{rows[0]['parameters'] / 1e6:.2f} M",
            f"{rows[0]['bytes'] / 1e6:.2f}",
            "" if latency is None else f"{latency['p50']:.2f}",
            f"{played.count('1') / len(played):.3f} ({low:.3f} to {high:.3f})",
            str(len(played)),
            " ".join(f"{row['success']:.3f}" for row in rows) if len(rows) > 1 else "",
            " ".join(f"{row['hard']:.3f}" for row in rows),
            f"{sum(row['cpu_minutes'] for row in rows) / len(rows):.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def comparison(arm: str, baseline: str, by_arm: dict[str, list[Row]]) -> str | None:
    """Compare scene by scene over common seeds; a baseline without seeds is compared with every seed of the arm."""
    rows, baselines = by_arm.get(arm, []), by_arm.get(baseline, [])
    if len(baselines) == 1 and baselines[0]["seed"] is None:
        baselines = [baselines[0] | {"seed": row["seed"]} for row in rows]
    by_seed = {row["seed"]: row for row in baselines}
    matches = [(row, by_seed[row["seed"]]) for row in rows if row["seed"] in by_seed]
    if not matches:
        return None
    tasks = sorted(matches[0][0]["outcomes"])
    pairs = list(zip(*(outcomes(side, tasks) for side in zip(*matches, strict=True)), strict=True))
    only, only0 = pairs.count(("1", "0")), pairs.count(("0", "1"))
    limit, p = paired_difference_limit(only, only0, len(pairs)), mcnemar(only, only0)
    difference = (only - only0) / len(pairs)
    return f"| {arm} - {baseline} | {len(matches)} | {difference:+.3f} | {limit:+.3f} | {p:.2g} |"


def comparisons(by_arm: dict[str, list[Row]]) -> list[str]:
    head = ["| difference | seeds | of success | lower 95 % limit | McNemar p |", "|---|---|---|---|---|"]
    return head + [line for pair in COMPARED if (line := comparison(*pair, by_arm)) is not None]


def replace_section(page: str, name: str, lines: Sequence[str]) -> str:
    """Replace the text between <!-- name --> and <!-- end --> by these lines."""
    before, _, rest = page.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not end:
        sys.exit(f"expected <!-- {name} --> and <!-- end --> in the page, found at most one; restore them")
    return "\n".join([f"{before}<!-- {name} -->", *lines, f"{end}{after}"])


def draw(by_arm: dict[str, list[Row]], file: Path) -> None:
    """Success against CPU-minutes of recovery: a point per seed, lines for PPO's samples, a panel per regime."""
    matplotlib.use("agg")
    figure, sides = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axes, title in zip(sides, ("Main recipe: experts can be asked", "One demonstration per task"), strict=True):
        scarce = axes is sides[1]
        for name, rows in by_arm.items():
            if not rows[0]["recovery"] or name.startswith("few-") != scarce:
                continue
            dots = axes.scatter(
                [row["cpu_minutes"] for row in rows], [row["success"] for row in rows], label=name, s=18
            )
            for row in rows:
                times, sampled = ([point[key] for point in row["curve"]] for key in ("cpu_minutes", "sampled_success"))
                axes.plot(times, sampled, color=dots.get_facecolor()[0], alpha=0.3, linewidth=1)
        for name in ("dense", "pruned"):
            if name in by_arm:
                level = by_arm[name][0]["success"]
                axes.axhline(level, color="0.6", linewidth=0.8, linestyle=":")
                axes.text(0.01, level, name, transform=axes.get_yaxis_transform(), color="0.4", fontsize=7)
        axes.set(xlabel="CPU-minutes of recovery", title=title)
        axes.legend(fontsize=7)
    sides[0].set_ylabel("success, argmax, evaluation scenes")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def summary(folder: Path, latency: Path, out: Path, page: Path, picture: Path) -> None:
    rows = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    order = {name: i for i, name in enumerate(ORDER)}
    rows.sort(key=lambda row: (order.get(row["name"], len(order)), row["name"], row["seed"] or 0))
    measured = {row["name"]: row["latency_ms"] for row in json.loads(latency.read_text())["rows"]}
    for row in rows:
        milliseconds = measured.get(row["shape"])
        row["latency_ms"] = milliseconds and {key: milliseconds[key] for key in ("p50", "p99")}
    write(out, dump(rows))
    by_arm = arms(rows)
    text = replace_section(page.read_text(), "arms", table(by_arm))
    page.write_text(replace_section(text, "differences", comparisons(by_arm)))
    draw(by_arm, picture)
    print("\n".join([*table(by_arm), "", *comparisons(by_arm)]))


def shapes(folder: Path, graphs: Path) -> None:
    """Print one SHAPE=FOLDER per shape; the shape names the row of the latency result."""
    options: dict[str, str] = {}
    for file in sorted(folder.glob("*.json")):
        row, exported = json.loads(file.read_text()), graphs / file.stem
        if exported.is_dir():
            options.setdefault(row["shape"], f"{row['shape']}={exported}")
    print(" ".join(options.values()))


if __name__ == "__main__":
    command, *arguments = sys.argv[1:] or [""]
    if command == "row" and len(arguments) == 4:
        row(arguments[0], *map(Path, arguments[1:]))
    elif command == "shapes" and len(arguments) == 2:
        shapes(*map(Path, arguments))
    elif command == "summary" and len(arguments) == 5:
        summary(*map(Path, arguments))
    else:
        sys.exit(f"expected row, shapes or summary with its arguments, found {sys.argv[1:]}; see the module docstring")
