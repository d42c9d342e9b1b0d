"""Training samples of scripted experts: a picture, a state, a task, and the chunk of actions the expert plays."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rlrc.artifact import PolicySpec
from rlrc.compressor.models.policy import Inputs
from rlrc.compressor.rl.observations import Observer
from rlrc.compressor.rl.rollout import Request, RolloutEpisode, Rollouts, SamplingMode
from rlrc.compressor.training.batches import Batch
from rlrc.envs.metaworld import TASKS
from rlrc.envs.seeds import DEMONSTRATION
from rlrc.folders import replace_file
from rlrc.libraries import cache_folder
from rlrc.runtime.inference.pictures import to_pixels
from rlrc.runtime.inference.preprocess import normalise
from rlrc.runtime.inference.prompts import Tokenizer

VERSION = 2  # of the experts and of the recording: part of the cache's key
NOISE = (0.0, 0.15, 0.3, 0.45)  # standard deviations of the action noise, one episode each, in turn


@dataclass(frozen=True)
class DemonstrationConfig:
    """Episodes driven by the expert: noise on the executed actions, none on the labels."""

    episodes_per_task: int = 60
    """episodes of each of the 13 tasks"""
    first_seed: int = DEMONSTRATION.start
    """seed of the first scene; the others follow"""


@dataclass
class Samples:
    """Pictures uint8 (N, H, W, 3), raw states float32 (N, S), task indices (N,), raw chunks float32 (N, K, D)."""

    pictures: npt.NDArray[np.uint8]
    state: npt.NDArray[np.float32]
    task: npt.NDArray[np.int64]
    chunk: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.pictures)

    @staticmethod
    def join(parts: Sequence[Samples]) -> Samples:
        fields = [field.name for field in dataclasses.fields(Samples)]
        return Samples(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in fields})

    @staticmethod
    def of(episodes: Sequence[RolloutEpisode]) -> Samples:
        """The labelled decisions of episodes. Decisions without a label are skipped."""
        names = list(TASKS)
        labelled = [episode for episode in episodes if episode.chunk]
        # Labels may start late (only while the expert drives), but continue to the end.
        return Samples(
            np.concatenate([np.stack(episode.pictures[-len(episode.chunk) :]) for episode in labelled]),
            np.concatenate([np.stack(episode.state[-len(episode.chunk) :]) for episode in labelled]),
            np.concatenate([np.full(len(episode.chunk), names.index(episode.task)) for episode in labelled]),
            np.concatenate([np.stack(episode.chunk) for episode in labelled]),
        )

    def save(self, file: Path) -> None:
        with replace_file(file) as partial, partial.open("wb") as stream:
            np.savez(stream, **dataclasses.asdict(self))

    @staticmethod
    def load(file: Path) -> Samples:
        with np.load(file) as arrays:
            return Samples(**arrays)


def demonstrations(config: DemonstrationConfig, rollouts: Rollouts) -> Samples:
    """Expert demonstrations of all tasks, from the cache if it holds the same ones."""
    key = {
        **dataclasses.asdict(config),
        "version": VERSION,
        "noise": NOISE,
        "tasks": list(TASKS),
        "size": rollouts.manifest.policy.cameras[0].height,
        "horizon": rollouts.manifest.policy.action.horizon,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    file = cache_folder() / "demonstrations" / f"{digest}.npz"
    if file.exists():
        return Samples.load(file)
    requests = [
        Request(task, config.first_seed + i, handover=0, noise=NOISE[i % len(NOISE)])
        for i in range(config.episodes_per_task)
        for task in TASKS
    ]
    samples = Samples.of(rollouts.run(requests, None, SamplingMode(keep="pictures")))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".json").write_text(json.dumps(key, indent=1))
    samples.save(file)
    return samples


def ids_of_tasks(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Prompts of all tasks (tasks, L)."""
    return np.stack([tokenizer(task.instruction) for task in TASKS.values()])


class SampleBatches:
    """Random batches of samples (see Batches). ``ids`` (tasks, L): the prompts of all tasks."""

    def __init__(self, samples: Samples, spec: PolicySpec, ids: npt.NDArray[np.int64], seed: int) -> None:
        self.samples, self.spec, self.ids = samples, spec, torch.from_numpy(ids)
        self.rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self.samples)

    def draw(self, size: int) -> Batch:
        rows = self.rng.integers(0, len(self.samples), size)
        return replace(self.rows(rows), rows=torch.from_numpy(rows))

    def all(self, size: int) -> list[Batch]:
        """Every sample once, in batches of this size."""
        return [self.rows(np.arange(i, min(i + size, len(self)))) for i in range(0, len(self), size)]

    def rows(self, rows: npt.NDArray[np.int64]) -> Batch:
        assert self.spec.state is not None
        samples, (camera,) = self.samples, self.spec.cameras
        inputs = Inputs(
            [torch.from_numpy(to_pixels(samples.pictures[rows], camera))],
            self.ids[samples.task[rows]],
            torch.from_numpy(normalise(samples.state[rows], self.spec.state.norm)),
        )
        return Batch(inputs, torch.from_numpy(normalise(samples.chunk[rows], self.spec.action.norm)))

    def state(self) -> Any:
        return self.rng.bit_generator.state

    def restore(self, state: Any) -> None:
        self.rng.bit_generator.state = state


class ObservedBatches(SampleBatches):
    """SampleBatches for any family that Meta-World's observations fit."""

    def __init__(self, samples: Samples, observer: Observer, seed: int) -> None:
        self.samples, self.spec, self.observer = samples, observer.spec, observer
        self.rng = np.random.default_rng(seed)

    def rows(self, rows: npt.NDArray[np.int64]) -> Batch:
        samples, names = self.samples, list(TASKS)
        tasks = [names[i] for i in samples.task[rows]]
        inputs = self.observer(tasks, samples.pictures[rows], samples.state[rows])
        return Batch(inputs, torch.from_numpy(normalise(samples.chunk[rows], self.spec.action.norm)))
