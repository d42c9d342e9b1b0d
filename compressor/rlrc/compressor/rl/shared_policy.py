"""One policy for the simulators of all worker processes: it answers their decisions in one batch, from its own process.

A policy on an accelerator is not copied to the workers, which only simulate. Each worker has a generator of its own, so
it samples what it would sample with a policy of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from rlrc.compressor.rl.actors import Actor
from rlrc.compressor.rl.draws import TORCH, WorkerDraws
from rlrc.processes import ask

Decisions = tuple[np.ndarray, np.ndarray, np.ndarray]
Sampler = Callable[[list[str], np.ndarray, np.ndarray], Decisions]  # see rollout.ActionSampler


@dataclass(frozen=True)
class Question:
    """A worker's observations: tasks, pictures (B, H, W, 3) and raw states (B, S).

    ``job``: task and seed of its first episode; the seed is that of its random numbers.
    """

    job: tuple[str, int]
    tasks: list[str]
    images: np.ndarray
    state: np.ndarray


class AskingSampler:
    """In a worker: what the process that started it decides. ``job``: see Question."""

    def __init__(self, job: tuple[str, int]) -> None:
        self.job = job

    def __call__(self, tasks: list[str], images: np.ndarray, state: np.ndarray) -> Decisions:
        found: Decisions = ask(Question(self.job, tasks, images, state))
        return found


@dataclass
class SharedPolicy:
    """Answers questions together. ``actor`` is the one of the sampler."""

    sampler: Sampler
    actor: Actor
    generators: dict[tuple[str, int], torch.Generator] = field(default_factory=dict)  # by job

    def __call__(self, questions: Sequence[Question]) -> list[Decisions]:
        for question in questions:
            if question.job not in self.generators:
                self.generators[question.job] = torch.Generator().manual_seed(question.job[1])
        counts = [len(question.tasks) for question in questions]
        own = [self.generators[question.job] for question in questions]
        self.actor.draws = WorkerDraws(list(zip(counts, own, strict=True)))
        try:
            together = self.sampler(
                [task for question in questions for task in question.tasks],
                np.concatenate([question.images for question in questions]),
                np.concatenate([question.state for question in questions]),
            )
        finally:
            self.actor.draws = TORCH
        parts = zip(*(np.split(values, np.cumsum(counts)[:-1]) for values in together), strict=True)
        return [(image_tokens, sampled, actions) for image_tokens, sampled, actions in parts]
