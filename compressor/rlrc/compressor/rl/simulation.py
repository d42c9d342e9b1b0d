"""What a stage uses of the simulator: success on validation scenes, and demonstrations of scripted experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlrc.artifact import TOKENIZER, Artifact, HistoryEntry
from rlrc.compressor.models import device
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.rl.dagger import Dagger
from rlrc.compressor.rl.demonstrations import DemonstrationConfig, ObservedBatches, SampleBatches, demonstrations
from rlrc.compressor.rl.observations import Observer
from rlrc.compressor.rl.rollout import Request, Rollouts, SamplingMode
from rlrc.compressor.training import distributed
from rlrc.compressor.training.batches import Batch, TrainingData
from rlrc.compressor.training.config import SFTConfig
from rlrc.compressor.training.run_state import RunState
from rlrc.envs.metaworld import TASKS
from rlrc.envs.seeds import VALIDATION
from rlrc.progress import status


@contextmanager
def simulate(artifact: Artifact, folder: Path, workers: int, episodes: int) -> Iterator[Simulation]:
    """Start rollout workers for the artifact's policy; ``folder`` is that of the run, ``episodes``: see Simulation."""
    tokenizer = None if artifact.manifest.policy.prompt is None else artifact.file(TOKENIZER)
    with Rollouts(artifact.manifest, tokenizer, folder, workers) as rollouts:
        yield Simulation(rollouts, episodes)


@dataclass(frozen=True)
class Simulation:
    rollouts: Rollouts
    episodes: int
    """validation episodes of each task; 0: no evaluation"""

    def evaluate(self, policy: PolicyModule) -> dict[str, Any]:
        """Success of the deterministic policy on validation scenes: all tasks, hard tasks (no closing), each task.

        It plays on the device of this process, and is on the CPU afterwards.
        """
        if self.episodes == 0:
            return {}
        requests = [Request(task, VALIDATION.start + i) for i in range(self.episodes) for task in TASKS]
        with status(f"playing {len(requests)} validation episodes"):
            results = self.rollouts.run(requests, policy.to(device.current()), SamplingMode())
        policy.cpu()
        per_task = {task: float(np.mean([r.success for r in results if r.task == task])) for task in TASKS}
        return {
            "success": round(float(np.mean(list(per_task.values()))), 4),
            "success_hard": round(float(np.mean([rate for name, rate in per_task.items() if TASKS[name].hard])), 4),
            "episodes": len(results),
            "per_task": {name: round(rate, 4) for name, rate in per_task.items()},
        }

    def success_of(self, history: Sequence[HistoryEntry]) -> dict[str, Any]:
        """The success that the last stage of a history measured, if it used the same scenes; else empty."""
        after = history[-1].after if history else {}
        if after.get("episodes") != self.episodes * len(TASKS):
            return {}
        return {name: after[name] for name in ("success", "success_hard", "episodes", "per_task")}

    def batches(self, policy: PolicyModule, config: DemonstrationConfig, seed: int) -> SampleBatches:
        text = "playing demonstrations, unless they are in the cache"
        with status(text, distributed.rank() == 0), distributed.main_process_first():
            samples = demonstrations(config, self.rollouts)
        return ObservedBatches(samples, Observer(policy.spec, self.rollouts.load_tokenizer()), seed)

    def training_data(self, policy: PolicyModule, config: SFTConfig, run: RunState) -> tuple[TrainingData, Dagger]:
        """Demonstrations, held-out ones from other scenes, and the DAgger rounds."""
        batches = self.batches(policy, DemonstrationConfig(config.demonstrations, config.first_seed), config.seed)
        held_out = list[Batch]()
        if number := config.scenes() - config.demonstrations:
            scenes = DemonstrationConfig(number, config.first_seed + config.demonstrations)
            held_out = self.batches(policy, scenes, config.seed).all(config.batch)
        return TrainingData(batches, held_out), Dagger(config, self.rollouts, batches, run)
