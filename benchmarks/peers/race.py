"""Ours against what one would use instead: the same weights and inputs, in turns, round after round.

    python benchmarks/peers/race.py smolvla OUT.json [--lerobot PYTHON] [--threads 2] [--rounds 8] [--work FOLDER]
    python benchmarks/peers/race.py openvla OUT.json ...

``smolvla``: SmolVLA's official size against lerobot's own. ``openvla``: an OpenVLA with a decoder of 154 M parameters
(benchmarks/studies/decoder_speed.py) against transformers, stock ONNX Runtime and llama.cpp. The weights are random:
latency does not depend on them, and the result lists how far rounding moves the actions. Runtimes that cannot run are
skipped with the reason. Needs torch and the exporters' packages; PYTHON is that of an environment with lerobot, see
docs/peers.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from contestants import HERE, Contestant, Skip

from rlrc import artifact as artifacts
from rlrc.benchmarks.results import machine, results
from rlrc.benchmarks.results.stats import percentiles, ratio_interval

ANYTHING = 1e9  # what random weights' actions may differ by: it is told, not limited
WARM = 2
Say = Callable[[str], None]


def smolvla(folder: Path, threads: int, lerobot: str, say: Say) -> tuple[dict[str, Any], list[Contestant]]:
    import checkpoint

    if not (folder / "observation.npz").exists():
        say("random weights of the official size")
        checkpoint.write(folder)
    seen, official = str(folder / "observation.npz"), str(folder / "checkpoint")
    if not (folder / "int4").exists():
        say("read, without what nothing reads, and in 4 bits")
        checkpoint.compress(folder)
    # 4-bit weights in 8-bit kernels, which are faster here, and as they are, which take half the memory.
    ours = {"rlrc int4": ("int4", "int8"), "rlrc int4a8": ("int4", "int4a8"), "rlrc fp32": ("dense", "fp32")}
    told = {
        "name": "smolvla",
        "policy": "SmolVLA, 450 M parameters, two cameras, chunks of 50, 10 flow steps",
        "ours": "rlrc int4",
        "reference": "lerobot fp32",
        "note": "rlrc int4 has its weights on the 4-bit grid and runs them in 8-bit kernels; int4a8 holds the same in "
        "4 bits.",
        "wanted": 3.0,
    }
    peers = [
        Contestant("lerobot fp32", lerobot, "run_lerobot.py", [official, seen, str(threads), "float32"]),
        Contestant("lerobot bf16", lerobot, "run_lerobot.py", [official, seen, str(threads), "bfloat16"]),
        Contestant("lerobot compiled", lerobot, "run_lerobot.py", [official, seen, str(threads), "float32", "compile"]),
    ]
    return told, [*exported(folder, ours, seen, threads, say), *peers]


def openvla(folder: Path, threads: int, lerobot: str, say: Say) -> tuple[dict[str, Any], list[Contestant]]:
    sys.path.insert(0, str(HERE.parents[1] / "benchmarks/studies"))
    from decoder_speed import WORDS, make

    if not (folder / "int4").exists():
        say("random weights")
        make(folder)
    random = np.random.default_rng(1)
    sentence = np.array(" ".join(f"w{i}" for i in range(WORDS)))
    np.savez(
        folder / "observation.npz",
        **{"image.top": random.integers(0, 256, (256, 256, 3), np.uint8), "instruction": sentence},
    )
    seen, dense = str(folder / "observation.npz"), str(folder / "dense")
    ours = {
        "rlrc int4": ("int4", "int8+int4"),
        "llama.cpp f16": ("dense", "fp16", "gguf"),
        "rlrc fp32": ("dense", "fp32"),
    }
    told = {
        "name": "openvla",
        "policy": "OpenVLA with a decoder of 154 M parameters, 280 positions, 7 tokens",
        "ours": "rlrc int4",
        "reference": "transformers fp32",
        "note": "rlrc int4 reads the prompt with 8-bit weights and makes its tokens with 4-bit ones, all on the 4-bit "
        "grid.",
        "wanted": None,
    }
    mine = exported(folder, ours, seen, threads, say)
    fp32 = str(folder / "rlrc-fp32")
    peers = [Contestant("onnxruntime fp32", sys.executable, "run_stock.py", [dense, fp32, seen, str(threads)])]
    for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
        for compiled in ([], ["compile"]):
            name = f"transformers {short}{', compiled' if compiled else ''}"
            arguments = [dense, seen, str(threads), dtype, *compiled]
            peers.append(Contestant(name, sys.executable, "run_transformers.py", arguments))
    return told, [*mine, *peers]


def exported(folder: Path, ours: dict[str, Any], seen: str, threads: int, say: Say) -> list[Contestant]:
    """Of each, its weights, precision and target."""
    from rlrc.exporters.export import export

    found = []
    for name, (weights, precision, *target) in ours.items():
        out = folder / name.replace(" ", "-")
        if not out.exists():
            say(f"rlrc export --precision {precision}")
            parent = artifacts.load(folder / weights, verify=())
            export(parent, out, target or ["onnx"], precision, ANYTHING)
        found.append(Contestant(name, sys.executable, "run_rlrc.py", [str(out), seen, str(threads)]))
    return found


RACES = {"smolvla": smolvla, "openvla": openvla}


def race(entered: list[Contestant], threads: int, rounds: int, say: Say) -> tuple[dict[str, str], list[float]]:
    """-> who was left out, and why; the load average before every round."""
    left_out: dict[str, str] = {}
    running: list[Contestant] = []
    for one in entered:
        try:
            say(f"{one.name}: start and {WARM} chunks that are not counted")
            one.start(threads)
            for _ in range(WARM):
                one.act()
            running.append(one)
        except Skip as reason:
            left_out[one.name] = str(reason)
            one.close()
    load = []
    for i in range(rounds):
        load.append(round(os.getloadavg()[0], 2))
        say(f"round {i + 1} of {rounds}, load {load[-1]}")
        for one in running:
            one.act()  # while it waited, the system may have taken memory back that it reads again now
            one.trial()
    return left_out, load


def row(one: Contestant, reference: np.ndarray | None) -> dict[str, Any]:
    actions = np.array(one.ask("actions")["actions"])
    measured: dict[str, Any] = {
        "name": one.name,
        **one.told,
        "latency_ms": {name: round(value, 2) for name, value in percentiles(one.trials).items()},
        "cpu_ms": {name: round(value, 2) for name, value in percentiles(one.processor).items()},
        "trials_ms": [round(value, 2) for value in one.trials],
        "block": 1,
        "peak_rss": one.ask("memory")["peak_rss"],
    }
    if reference is not None:
        difference = np.abs(actions - reference)
        measured["action_difference"] = float(f"{difference.max():.4g}")
        measured["action_difference_mean"] = float(f"{difference.mean():.4g}")
        measured["action_range"] = [float(f"{value:.4g}") for value in (reference.min(), reference.max())]
    return measured


def result(told: dict[str, Any], entered: list[Contestant], left_out: dict[str, str]) -> dict[str, Any]:
    ran = [one for one in entered if one.name not in left_out]
    references = [one for one in ran if one.name == told["reference"]]
    reference = np.array(references[0].ask("actions")["actions"]) if references else None
    rows = [row(one, reference) for one in ran]
    rows += [{"name": name, "skipped": reason} for name, reason in left_out.items()]
    hero = next((one for one in ran if one.name == told["ours"]), None)
    others = [one for one in ran if one is not hero]
    ratios = {one.name: ratio(one.trials, hero.trials) for one in others if hero is not None}
    spent = {one.name: ratio(one.processor, hero.processor) for one in others if hero is not None}
    note = told["note"]
    if reference is not None:
        low, high = reference.min(), reference.max()
        note += (
            f" Differences are of one chunk against {told['reference']}, whose actions reach from {low:.2f} to "
            f"{high:.2f}; weights are random, so nothing in them is redundant, and rounding shows more than in a "
            "trained policy."
        )
    return {**told, "note": note, "rows": rows, "ratios": ratios, "cpu_ratios": spent}


def ratio(theirs: list[float], ours: list[float]) -> list[float]:
    """Of medians, with the 95 % interval over rounds."""
    estimate = ratio_interval([[x] for x in theirs], [[x] for x in ours])
    return [round(value, 3) for value in (estimate.value, estimate.low, estimate.high)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("race", choices=RACES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lerobot", default=os.environ.get("RLRC_LEROBOT_PYTHON", "python3.12"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", default="", help="comma-separated names of contestants")
    parser.add_argument("--work", type=Path, help="folder for weights and artifacts, kept; else a temporary one")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("expected two rounds at least: one has no interval")

    def say(text: str) -> None:
        print(f"{arguments.race}: {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        told, entered = RACES[arguments.race](folder, arguments.threads, arguments.lerobot, say)
        if arguments.only:
            entered = [one for one in entered if one.name in arguments.only.split(",")]
        try:
            left_out, load = race(entered, arguments.threads, arguments.rounds, say)
            found = result(told, entered, left_out)
        finally:
            for one in entered:
                one.close()
    only = f" --only '{arguments.only}'" if arguments.only else ""
    command = (
        f"python benchmarks/peers/race.py {arguments.race} {arguments.out.name} --threads {arguments.threads} "
        f"--rounds {arguments.rounds}{only}"
    )
    head = {"kind": results.PEERS, "command": command, "machine": machine.describe(arguments.threads), "load": load}
    results.write(arguments.out, results.dump(head | found))
    for one in found["rows"]:
        told_of = f"skipped: {one['skipped']}" if "skipped" in one else f"{one['latency_ms']['p50']:.1f} ms"
        ratio = found["ratios"].get(one["name"])
        print(f"{one['name']}: {told_of}" + (f", {ratio[0]:.2f}x ({ratio[1]:.2f} to {ratio[2]:.2f})" if ratio else ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
