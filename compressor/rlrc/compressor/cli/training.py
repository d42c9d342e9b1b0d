"""The commands of the stages that train: sft, distill, rl."""

from __future__ import annotations

from dataclasses import dataclass, field

from tyro.conf import OmitArgPrefixes

from rlrc.compressor.cli.stages import CheckpointStageCommand, StageCommand
from rlrc.compressor.rl.config import PPOConfig
from rlrc.compressor.training.distill import DistillConfig
from rlrc.compressor.training.sft import SFTConfig


@dataclass(frozen=True)
class SFT(CheckpointStageCommand):
    """Supervised fine-tuning on a data set, or on scripted experts that also label the policy's episodes (DAgger).

    The first PATH may also be an official checkpoint's folder, or owner/name[@revision] on the hub.
    """

    stage = "sft"
    config: OmitArgPrefixes[SFTConfig] = field(default_factory=SFTConfig)


@dataclass(frozen=True)
class Distill(CheckpointStageCommand):
    """Train a pruned policy on demonstrations and on the hidden states of its dense teacher."""

    stage = "distill"
    config: OmitArgPrefixes[DistillConfig] = field(default_factory=DistillConfig)


@dataclass(frozen=True)
class RL(StageCommand):
    """Reinforcement learning (PPO) on the policy's own episodes."""

    stage = "rl"
    config: OmitArgPrefixes[PPOConfig] = field(default_factory=PPOConfig)
