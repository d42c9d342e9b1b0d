"""DAgger (Ross et al., 2011, arXiv 1011.0686): the policy plays, the scripted expert labels every decision.

The expert answers in any state; at a random decision it takes over, so that late stages of a task are seen as well.
Only for the reference family, whose simulator and experts are here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.tiny import TinyPolicy
from rlrc.compressor.rl.demonstrations import SampleBatches, Samples
from rlrc.compressor.rl.rollout import Request, RolloutEpisode, Rollouts, SamplingMode
from rlrc.compressor.training import distributed
from rlrc.compressor.training.run_state import RunState
from rlrc.compressor.training.sft import Progress, SFTConfig
from rlrc.envs.metaworld import TASKS
from rlrc.envs.seeds import DEMONSTRATION, scene

# DAgger's scenes lie in the upper half of the demonstration seeds, apart from those of plain demonstrations.
SCENES = DEMONSTRATION[len(DEMONSTRATION) // 2 :]


@dataclass
class Failures:
    """How often each task failed in the last round it was played in, by the policy unaided."""

    rates: dict[str, float] = field(default_factory=dict)

    def update(self, requests: list[Request], episodes: list[RolloutEpisode]) -> dict[str, float]:
        """-> what the round's curve tells: episodes without help, success of every task and their mean.

        Tasks are drawn by their failures: a mean over episodes would understate the policy, one over tasks not.
        """
        unaided = [episode for request, episode in zip(requests, episodes, strict=True) if request.handover is None]
        for task in sorted({episode.task for episode in unaided}):
            self.rates[task] = 1 - float(np.mean([episode.success for episode in unaided if episode.task == task]))
        success = {f"success {task}": 1 - rate for task, rate in self.rates.items()}
        return {"episodes": len(unaided), "success": float(np.mean(list(success.values()))), **success}


def requests(config: SFTConfig, number: int, failures: dict[str, float]) -> list[Request]:
    """Episodes of round ``number``: more for tasks that fail; in most the expert takes over at a random decision."""
    rng = np.random.default_rng((config.seed, number))
    weight = np.array([0.15 + failures.get(task, 1.0) for task in TASKS])
    tasks = rng.choice(list(TASKS), config.dagger_episodes, p=weight / weight.sum())
    first = number * config.dagger_episodes + config.seed * 100_000
    handover = [int(decision) if rng.random() < 0.6 else None for decision in rng.integers(2, 30, len(tasks))]
    return [Request(str(task), scene(SCENES, first + i), handover[i]) for i, task in enumerate(tasks)]


class Dagger:
    """The rounds of a training run: plays them and adds their samples to the training set.

    Of several processes the first one plays, and all of them learn.
    """

    name = "dagger"

    def __init__(self, config: SFTConfig, rollouts: Rollouts, batches: SampleBatches, run: RunState) -> None:
        self.config, self.rollouts, self.batches, self.run = config, rollouts, batches, run
        self.schedule, self.failures, self.done = config.rounds(), Failures(), 0

    def __call__(
        self, step: int, policy: PolicyModule, weights: Callable[[], dict[str, Tensor]], progress: Progress
    ) -> dict[str, float] | None:
        """The round before this step, if there is one that has not been played: see BeforeStep."""
        number = self.schedule.get(step)
        if number is None or number < self.done:
            return None
        episodes = f"{self.config.dagger_episodes} episodes"
        progress(step, f"DAgger round {number + 1} of {self.config.dagger_rounds}: {episodes}")
        return self.play(policy, number, weights())

    def play(self, policy: PolicyModule, number: int, weights: dict[str, Tensor] | None = None) -> dict[str, float]:
        """Round ``number``; its scenes are drawn by the failures so far. -> a row of the training curve.

        ``weights``: see Rollouts.run.
        """
        assert isinstance(policy, TinyPolicy)
        told = dict[str, float]()
        with distributed.first():
            if distributed.rank() == 0:
                asked = requests(self.config, number, self.failures.rates)
                episodes = self.rollouts.run(asked, policy, SamplingMode(label=True, keep="pictures"), weights)
                Samples.of(episodes).save(self._file(number))
                told = self.failures.update(asked, episodes)
        fresh = Samples.load(self._file(number))
        self.batches.samples = Samples.join([self.batches.samples, fresh])
        self.done = number + 1
        return {"fresh": len(fresh), **told}

    def state(self) -> dict[str, Any]:
        return {"failures": dict(self.failures.rates), "rounds": self.done}

    def restore(self, saved: dict[str, Any]) -> None:
        """Reads the samples of the rounds before the saved state again."""
        self.failures, self.done = Failures(saved["failures"]), saved["rounds"]
        rounds = [Samples.load(self._file(number)) for number in range(self.done)]
        self.batches.samples = Samples.join([self.batches.samples, *rounds])

    def _file(self, number: int) -> Path:
        return self.run.folder / f"dagger-{number}.npz"
