"""DAgger (Ross et al., 2011, arXiv 1011.0686): the policy plays, the scripted expert labels every decision.

In most episodes the expert takes over at a random decision, so that late stages of a task occur as well. Only for the
reference family, which has a simulator with experts.
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
from rlrc.compressor.training.config import SFTConfig
from rlrc.compressor.training.run_state import RunState
from rlrc.compressor.training.sft import Progress
from rlrc.envs.metaworld import TASKS
from rlrc.envs.seeds import DEMONSTRATION, scene

# The upper half of the demonstration seeds; plain demonstrations start in the lower half.
SCENES = DEMONSTRATION[len(DEMONSTRATION) // 2 :]


@dataclass
class Failures:
    """Failure rate of each task, without the expert, in the last round that contains it."""

    rates: dict[str, float] = field(default_factory=dict)

    def update(self, requests: list[Request], episodes: list[RolloutEpisode]) -> dict[str, float]:
        """-> values for the training curve: episodes without the expert, success of every task, and their mean.

        Tasks that fail more are drawn more often, so a mean over episodes would be biased; a mean over tasks is not.
        """
        unaided = [episode for request, episode in zip(requests, episodes, strict=True) if request.handover is None]
        for task in sorted({episode.task for episode in unaided}):
            self.rates[task] = 1 - float(np.mean([episode.success for episode in unaided if episode.task == task]))
        success = {f"success {task}": 1 - rate for task, rate in self.rates.items()}
        return {"episodes": len(unaided), "success": float(np.mean(list(success.values()))), **success}


def requests(config: SFTConfig, number: int, failures: dict[str, float]) -> list[Request]:
    """Episodes of round ``number``: tasks that fail more get more; the expert takes over in 60 % of them."""
    rng = np.random.default_rng((config.seed, number))
    weight = np.array([0.15 + failures.get(task, 1.0) for task in TASKS])
    tasks = rng.choice(list(TASKS), config.dagger_episodes, p=weight / weight.sum())
    first = number * config.dagger_episodes + config.seed * 100_000
    handover = [int(decision) if rng.random() < 0.6 else None for decision in rng.integers(2, 30, len(tasks))]
    return [Request(str(task), scene(SCENES, first + i), handover[i]) for i, task in enumerate(tasks)]


class Dagger:
    """A BeforeStep hook: plays the rounds of a training run and adds their samples to the training set.

    Of several processes only the first plays; all read its samples.
    """

    name = "dagger"

    def __init__(self, config: SFTConfig, rollouts: Rollouts, batches: SampleBatches, run: RunState) -> None:
        self.config, self.rollouts, self.batches, self.run = config, rollouts, batches, run
        self.schedule, self.failures, self.done = config.rounds(), Failures(), 0

    def __call__(
        self, step: int, policy: PolicyModule, weights: Callable[[], dict[str, Tensor]], progress: Progress
    ) -> dict[str, float] | None:
        """Play the round scheduled before this step, if any and not yet played: see BeforeStep."""
        number = self.schedule.get(step)
        if number is None or number < self.done:
            return None
        episodes = f"{self.config.dagger_episodes} episodes"
        progress(step, f"DAgger round {number + 1} of {self.config.dagger_rounds}: {episodes}")
        return self.play(policy, number, weights())

    def play(self, policy: PolicyModule, number: int, weights: dict[str, Tensor] | None = None) -> dict[str, float]:
        """Play round ``number``. -> a row of the training curve. ``weights``: see Rollouts.run."""
        assert isinstance(policy, TinyPolicy)
        row = dict[str, float]()
        with distributed.main_process_first():
            if distributed.rank() == 0:
                requested = requests(self.config, number, self.failures.rates)
                episodes = self.rollouts.run(requested, policy, SamplingMode(label=True, keep="pictures"), weights)
                Samples.of(episodes).save(self._file(number))
                row = self.failures.update(requested, episodes)
        fresh = Samples.load(self._file(number))
        self.batches.samples = Samples.join([self.batches.samples, fresh])
        self.done = number + 1
        return {"fresh": len(fresh), **row}

    def state(self) -> dict[str, Any]:
        return {"failures": dict(self.failures.rates), "rounds": self.done}

    def restore(self, saved: dict[str, Any]) -> None:
        """Also read the samples of the rounds before the saved state again."""
        self.failures, self.done = Failures(saved["failures"]), saved["rounds"]
        rounds = [Samples.load(self._file(number)) for number in range(self.done)]
        self.batches.samples = Samples.join([self.batches.samples, *rounds])

    def _file(self, number: int) -> Path:
        return self.run.folder / f"dagger-{number}.npz"
