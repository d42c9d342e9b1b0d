"""The settings of ``rlrc rl``. Importing them does not need the simulator's packages."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from rlrc.compressor.training.losses import SMOOTHING
from rlrc.envs.seeds import DEMONSTRATION
from rlrc.ranges import check_range


@dataclass(frozen=True)
class PPOConfig:
    iterations: int = 30
    """iterations of rollout and update"""
    episodes: int = 208
    """episodes of an iteration, over all tasks and processes; tasks that fail more get more"""
    warmup: int = 2
    """first iterations, which train only the critic"""
    epochs: int = 2
    """passes over the rollouts of an iteration"""
    minibatch: int = 256
    """decisions of a step (in each process, under accelerate launch)"""
    rate: float = 1e-4
    """learning rate of the decoder and head"""
    value_rate: float = 1e-3
    """learning rate of the critic"""
    gamma: float = 0.99
    """discount factor, for each decision"""
    lam: float = 0.95
    """lambda of the generalised advantage estimate"""
    clip: float = 0.2
    """clip range of the probability ratio"""
    behaviour_cloning: float = 0.5
    """weight of the family's own loss on demonstrations"""
    behaviour_batch: int = 128
    """demonstration samples of a step (in each process, under accelerate launch)"""
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
