"""The settings of ``rlrc rl``: what the user gives (PPOOptions), and what the stage computes with (PPOConfig).

Importing them does not need the simulator's packages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from rlrc.compressor.training.config import given
from rlrc.compressor.training.losses import SMOOTHING
from rlrc.envs.seeds import DEMONSTRATION
from rlrc.ranges import check_range


@dataclass(frozen=True)
class PPOOptions:
    """Settings of the stage. What is not given (None) depends on the policy: see docs/guide.md."""

    STAGE: ClassVar[str] = "rl"

    iterations: int = 30
    """iterations of rollout and update"""
    episodes: int = 208
    """episodes of an iteration, over all tasks and processes; tasks that fail more get more"""
    warmup: int = 2
    """first iterations, which train only the critic"""
    epochs: int = 2
    """passes over the rollouts of an iteration"""
    minibatch: int | None = None
    """decisions of a step (in each process, under accelerate launch); None: by family (docs/guide.md)"""
    rate: float | None = None
    """learning rate of the decoder and head; None: by family"""
    value_rate: float | None = None
    """learning rate of the critic; None: by family"""
    gamma: float = 0.99
    """discount factor, for each decision"""
    lam: float = 0.95
    """lambda of the generalised advantage estimate"""
    clip: float = 0.2
    """clip range of the probability ratio"""
    behaviour_cloning: float = 0.5
    """weight of the family's own loss on demonstrations"""
    behaviour_batch: int | None = None
    """demonstration samples of a step (in each process, under accelerate launch); None: by family"""
    temperature: float = 1.0
    """softmax temperature of the tokens sampled in rollouts"""
    noise: float = 0.1
    """initial standard deviation of the learned sampling noise of policies without tokens, in normalised actions"""
    correlation: float = 0.8
    """correlation of the sampling noise over the steps of a chunk"""
    target_kl: float = 0.02
    """an iteration's updates stop when the mean KL divergence of a token exceeds this"""
    data: str = ""
    """LeRobotDataset folder for the behaviour-cloning term; empty: the simulator's scripted experts"""
    cameras: dict[str, str] = field(default_factory=dict)
    """pairs of a camera of the policy and one of the data set, if their names differ; none: leave the camera out"""
    demonstrations: int = 60
    """expert episodes of each task for the behaviour-cloning term"""
    first_seed: int = DEMONSTRATION.start
    """scene of the first of these episodes"""
    smoothing: float = SMOOTHING
    """as in sft; for the behaviour-cloning term"""
    seed: int = 0

    def __post_init__(self) -> None:
        check = partial(check_range, self, "rl.")
        check("iterations", "episodes", "epochs", "minibatch", "behaviour_batch", "demonstrations", at_least=1)
        check("rate", "value_rate", "clip", "temperature", "noise", "target_kl", "smoothing", above=0)
        check("warmup", "behaviour_cloning", "seed", at_least=0)
        check("gamma", "lam", "correlation", within=(0, 1))

    def completed(self, values: Mapping[str, Any]) -> PPOConfig:
        """The complete settings, with these values for fields that were not given. Raises UserError."""
        return PPOConfig(**given(self), **values)


@dataclass(frozen=True)
class PPOConfig(PPOOptions):
    """Complete settings, as the history records them. The values here are those of the reference policy."""

    minibatch: int = 256
    rate: float = 1e-4
    value_rate: float = 1e-3
    behaviour_batch: int = 128
