"""The decisions of an iteration's episodes as tensors, and the minibatches that several processes draw from theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlrc.compressor.rl.actors import EncodedObservation
from rlrc.compressor.rl.rollout import ActionSampler, RolloutEpisode


@dataclass
class RolloutBuffer:
    """Decisions of all episodes end to end. ``sampled``: see Actor; rewards and ``last`` (N,)."""

    observations: EncodedObservation
    sampled: Tensor
    rewards: Tensor
    last: Tensor

    def __len__(self) -> int:
        return len(self.sampled)

    @staticmethod
    def of(episodes: list[RolloutEpisode], sampler: ActionSampler) -> RolloutBuffer:
        """The reward is 1 at the last decision of a successful episode, and 0 elsewhere."""
        lengths = [len(episode.sampled) for episode in episodes]
        ends = np.cumsum(lengths) - 1
        rewards, last = torch.zeros(sum(lengths)), torch.zeros(sum(lengths), dtype=torch.bool)
        rewards[ends] = torch.tensor([float(episode.success) for episode in episodes])
        last[ends] = True
        tasks = [episode.task for episode, length in zip(episodes, lengths, strict=True) for _ in range(length)]
        state = np.concatenate([np.stack(episode.state) for episode in episodes])
        image_tokens = np.concatenate([np.stack(episode.image_tokens) for episode in episodes])
        sampled = np.concatenate([np.stack(episode.sampled) for episode in episodes])
        observations = sampler.restore_observations(tasks, state, image_tokens)
        return RolloutBuffer(observations, torch.from_numpy(sampled), rewards, last)


def minibatches(counts: Sequence[int], rank: int, size: int, order: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Rows of this process's decisions, in this order, and a weight: the same number of minibatches in every process.

    ``counts``: decisions of every process. The weighted means of the processes average to the mean over all decisions
    of a step. A process without further decisions repeats its first one with weight zero.
    """
    for start in range(0, max(counts), size):
        lengths = [min(max(count - start, 0), size) for count in counts]
        yield order[start : start + size] if lengths[rank] else order[:1], lengths[rank] * len(counts) / sum(lengths)
