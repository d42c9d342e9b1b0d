"""Compare rlrc with other runtimes on the same weights and inputs, in turn, round after round.

    python benchmarks/peers/race.py smolvla OUT.json [--lerobot PYTHON] [--threads 2] [--rounds 8] [--work FOLDER]
    python benchmarks/peers/race.py openvla OUT.json ...

``smolvla``: SmolVLA of the official size against lerobot. ``openvla``: an OpenVLA with a decoder of 154 M parameters
(benchmarks/studies/decoder_speed.py) against transformers, stock ONNX Runtime and llama.cpp. The weights are random:
latency does not depend on them, and the result reports how much rounding changes the actions. Runtimes that cannot run
are skipped with the reason. Needs torch and the exporters' packages; PYTHON is the interpreter of an environment with
lerobot, see docs/peers.md.
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

TOLERANCE = 1e9  # errors of random weights are reported, not limited
WARM = 2
Report = Callable[[str], None]


def smolvla(folder: Path, threads: int, lerobot: str, report: Report) -> tuple[dict[str, Any], list[Contestant]]:
    import checkpoint

    if not (folder / "observation.npz").exists():
        report("writing random weights of the official size")
        checkpoint.write(folder)
    observation, weights = str(folder / "observation.npz"), str(folder / "checkpoint")
    if not (folder / "int4").exists():
        report("converting the checkpoint, dense and in 4 bits")
        checkpoint.compress(folder)
    # 4-bit weights in 8-bit kernels (faster here) and in 4-bit kernels (half the memory).
    ours = {"rlrc int4": ("int4", "int8"), "rlrc int4a8": ("int4", "int4a8"), "rlrc fp32": ("dense", "fp32")}
    metadata = {
        "name": "smolvla",
        "policy": "SmolVLA, 450 M parameters, two cameras, chunks of 50, 10 flow steps",
        "ours": "rlrc int4",
        "reference": "lerobot fp32",
        "note": "rlrc int4 rounds weights to the 4-bit grid and runs them in 8-bit kernels; int4a8 stores the same "
        "weights in 4 bits.",
        "wanted": 3.0,
    }
    arguments = [weights, observation, str(threads)]
    peers = [
        Contestant("lerobot fp32", lerobot, "run_lerobot.py", [*arguments, "float32"]),
        Contestant("lerobot bf16", lerobot, "run_lerobot.py", [*arguments, "bfloat16"]),
        Contestant("lerobot compiled", lerobot, "run_lerobot.py", [*arguments, "float32", "compile"]),
    ]
    return metadata, [*export_contestants(folder, ours, observation, threads, report), *peers]


def openvla(folder: Path, threads: int, lerobot: str, report: Report) -> tuple[dict[str, Any], list[Contestant]]:
    sys.path.insert(0, str(HERE.parents[1] / "benchmarks/studies"))
    from decoder_speed import WORDS, make

    if not (folder / "int4").exists():
        report("writing random weights")
        make(folder)
    random = np.random.default_rng(1)
    sentence = np.array(" ".join(f"w{i}" for i in range(WORDS)))
    observation, dense = str(folder / "observation.npz"), str(folder / "dense")
    picture = random.integers(0, 256, (256, 256, 3), np.uint8)
    np.savez(observation, **{"image.top": picture, "instruction": sentence})  # type: ignore[arg-type]
    ours = {
        "rlrc int4": ("int4", "int8+int4"),
        "llama.cpp f16": ("dense", "fp16", "gguf"),
        "rlrc fp32": ("dense", "fp32"),
    }
    metadata = {
        "name": "openvla",
        "policy": "OpenVLA with a decoder of 154 M parameters, 280 positions, 7 tokens",
        "ours": "rlrc int4",
        "reference": "transformers fp32",
        "note": "rlrc int4 uses 8-bit weights for the prompt and 4-bit weights for the tokens, all on the 4-bit grid.",
        "wanted": None,
    }
    exported = export_contestants(folder, ours, observation, threads, report)
    fp32 = str(folder / "rlrc-fp32")
    peers = [Contestant("onnxruntime fp32", sys.executable, "run_stock.py", [dense, fp32, observation, str(threads)])]
    for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16")):
        for compiled in ([], ["compile"]):
            name = f"transformers {short}{', compiled' if compiled else ''}"
            arguments = [dense, observation, str(threads), dtype, *compiled]
            peers.append(Contestant(name, sys.executable, "run_transformers.py", arguments))
    return metadata, [*exported, *peers]


def export_contestants(
    folder: Path, ours: dict[str, Any], observation: str, threads: int, report: Report
) -> list[Contestant]:
    """``ours``: name -> (weights, precision, optional target)."""
    from rlrc.exporters.export import export

    entered = []
    for name, (weights, precision, *target) in ours.items():
        out = folder / name.replace(" ", "-")
        if not out.exists():
            report(f"rlrc export --precision {precision}")
            parent = artifacts.load(folder / weights, verify=())
            export(parent, out, target or ["onnx"], precision, TOLERANCE)
        entered.append(Contestant(name, sys.executable, "run_rlrc.py", [str(out), observation, str(threads)]))
    return entered


RACES = {"smolvla": smolvla, "openvla": openvla}


def race(entered: list[Contestant], threads: int, rounds: int, report: Report) -> tuple[dict[str, str], list[float]]:
    """Return the skipped contestants with the reasons, and the load average before every round."""
    skipped: dict[str, str] = {}
    running: list[Contestant] = []
    for one in entered:
        try:
            report(f"{one.name}: start and {WARM} warm-up chunks")
            one.start(threads)
            for _ in range(WARM):
                one.act()
            running.append(one)
        except Skip as reason:
            skipped[one.name] = str(reason)
            one.close()
    load = []
    for i in range(rounds):
        load.append(round(os.getloadavg()[0], 2))
        report(f"round {i + 1} of {rounds}, load {load[-1]}")
        for one in running:
            one.act()  # reads back memory that the system may have reclaimed while the contestant waited
            one.trial()
    return skipped, load


def row(one: Contestant, reference: np.ndarray | None) -> dict[str, Any]:
    actions = np.array(one.ask("actions")["actions"])
    measured: dict[str, Any] = {
        "name": one.name,
        **one.metadata,
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


def result(metadata: dict[str, Any], entered: list[Contestant], skipped: dict[str, str]) -> dict[str, Any]:
    ran = [one for one in entered if one.name not in skipped]
    references = [one for one in ran if one.name == metadata["reference"]]
    reference = np.array(references[0].ask("actions")["actions"]) if references else None
    rows = [row(one, reference) for one in ran]
    rows += [{"name": name, "skipped": reason} for name, reason in skipped.items()]
    hero = next((one for one in ran if one.name == metadata["ours"]), None)
    others = [one for one in ran if one is not hero]
    ratios = {one.name: ratio(one.trials, hero.trials) for one in others if hero is not None}
    cpu_ratios = {one.name: ratio(one.processor, hero.processor) for one in others if hero is not None}
    note = metadata["note"]
    if reference is not None:
        low, high = reference.min(), reference.max()
        note += (
            f" Differences are those of one chunk from {metadata['reference']}, whose actions range from {low:.2f} to "
            f"{high:.2f}. Random weights have no redundancy, so rounding has more effect than in a trained policy."
        )
    return {**metadata, "note": note, "rows": rows, "ratios": ratios, "cpu_ratios": cpu_ratios}


def ratio(times: list[float], baseline: list[float]) -> list[float]:
    """Ratio of medians with the 95 % interval over rounds."""
    estimate = ratio_interval([[x] for x in times], [[x] for x in baseline])
    return [round(value, 3) for value in (estimate.value, estimate.low, estimate.high)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("race", choices=RACES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lerobot", default=os.environ.get("RLRC_LEROBOT_PYTHON", "python3.12"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", default="", help="comma-separated names of contestants")
    parser.add_argument("--work", type=Path, help="folder that keeps weights and artifacts (default: a temporary one)")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"expected at least 2 rounds, found {arguments.rounds}; an interval needs two")

    def report(text: str) -> None:
        print(f"{arguments.race}: {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        metadata, entered = RACES[arguments.race](folder, arguments.threads, arguments.lerobot, report)
        if arguments.only:
            entered = [one for one in entered if one.name in arguments.only.split(",")]
        try:
            skipped, load = race(entered, arguments.threads, arguments.rounds, report)
            measured = result(metadata, entered, skipped)
        finally:
            for one in entered:
                one.close()
    only = f" --only '{arguments.only}'" if arguments.only else ""
    command = (
        f"python benchmarks/peers/race.py {arguments.race} {arguments.out.name} --threads {arguments.threads} "
        f"--rounds {arguments.rounds}{only}"
    )
    head = {"kind": results.PEERS, "command": command, "machine": machine.describe(arguments.threads), "load": load}
    results.write(arguments.out, results.dump(head | measured))
    for one in measured["rows"]:
        text = f"skipped: {one['skipped']}" if "skipped" in one else f"{one['latency_ms']['p50']:.1f} ms"
        ratio = measured["ratios"].get(one["name"])
        print(f"{one['name']}: {text}" + (f", {ratio[0]:.2f}x ({ratio[1]:.2f} to {ratio[2]:.2f})" if ratio else ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
