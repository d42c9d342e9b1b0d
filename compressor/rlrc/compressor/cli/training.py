"""The commands of the stages that train: sft, distill, rl."""

from __future__ import annotations

from dataclasses import dataclass, field

from tyro.conf import OmitArgPrefixes

from rlrc.compressor.cli.stages import CheckpointStageCommand, StageCommand
from rlrc.compressor.rl.config import PPOOptions
from rlrc.compressor.training.config import SFTOptions
from rlrc.compressor.training.distill import DistillOptions


@dataclass(frozen=True)
class SFT(CheckpointStageCommand):
    """Supervised fine-tuning on a data set, or on scripted experts that also label the policy's episodes (DAgger).

    The first PATH may also be an official checkpoint's folder, or owner/name[@revision] on the hub.
    """

    stage = "sft"
    config: OmitArgPrefixes[SFTOptions] = field(default_factory=SFTOptions)


@dataclass(frozen=True)
class Distill(CheckpointStageCommand):
    """Train a pruned policy on demonstrations and on the hidden states of its dense teacher."""

    stage = "distill"
    config: OmitArgPrefixes[DistillOptions] = field(default_factory=DistillOptions)


@dataclass(frozen=True)
class RL(StageCommand):
    """Reinforcement learning (PPO) on the policy's own episodes."""

    stage = "rl"
    config: OmitArgPrefixes[PPOOptions] = field(default_factory=PPOOptions)
