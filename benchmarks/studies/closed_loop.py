"""Compare the success rate of a policy in torch with that of its exported graphs on the same scenes.

    python benchmarks/studies/closed_loop.py ARTIFACT OUT.json [NAME=EXPORTED ...] [--per-task 40]

``ARTIFACT`` runs in torch with its quantized weights, each ``EXPORTED`` in the runtime. Takes minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import tyro
from tyro.conf import Positional

from rlrc import artifact as artifacts
from rlrc.artifact import TOKENIZER
from rlrc.benchmarks.cli.output import progress, result_of
from rlrc.benchmarks.measure import success
from rlrc.benchmarks.results.results import check_out, dump, write
from rlrc.compressor.checkpoints.torch_policy import TorchPolicy
from rlrc.compressor.models.nn.linear import widen
from rlrc.compressor.stages import artifact_io
from rlrc.envs.environment import open_environment
from rlrc.runtime.inference import preprocess
from rlrc.runtime.inference.policy import LocalPolicy


def policies(artifact: Path, exported: tuple[str, ...]) -> dict[str, Any]:
    opened = artifacts.load(artifact)
    spec = opened.manifest.policy
    assert spec.prompt is not None
    tokenizer = preprocess.Tokenizer(opened.file(TOKENIZER), spec.prompt)
    opened_policies: dict[str, Any] = {
        "torch": TorchPolicy(spec, tokenizer, lambda: widen(artifact_io.load_policy(opened)))
    }
    for argument in exported:
        name, _, folder = argument.partition("=")
        opened_policies[name] = LocalPolicy.load(folder)
    return opened_policies


def main(
    artifact: Positional[Path],
    out: Positional[Path],
    exported: Positional[tuple[str, ...]],
    per_task: int = 40,
) -> None:
    check_out(out, force=True)
    torch.set_num_threads(1)
    players, scenes = policies(artifact, exported), success.scenes(per_task=per_task)
    played: dict[str, list[success.ScoredEpisode]] = {name: [] for name in players}
    with progress("episodes", len(players) * sum(scenes.episodes.values())) as advance:
        for task in scenes.episodes:
            env = open_environment(f"metaworld:{task}", players["torch"].spec)
            for seed in scenes.seeds(task):
                for name, policy in players.items():
                    played[name].append(success.play(policy, env, seed, scenes.horizon))
                    advance(1)
            env.close()
    rows = [
        {"name": name} | success.row(episodes, scenes, success.hard_tasks(scenes)) for name, episodes in played.items()
    ]
    compared = [success.compare(row, rows[0]) for row in rows[1:]]
    write(out, dump(result_of("success", rows, 1) | {"comparisons": compared}))
    for row in rows:
        print(f"{row['name']}: {row['success']:.3f} of {row['episodes']}, {row['interval']}")
    print(*compared, sep="\n")


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
