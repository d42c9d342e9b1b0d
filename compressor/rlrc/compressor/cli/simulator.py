"""Commands that need the simulator: new, rl."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from tyro.conf import OmitArgPrefixes, Positional

from rlrc.compressor.cli.next_commands import hint
from rlrc.compressor.cli.stages import StageCommand
from rlrc.compressor.rl.config import PPOConfig
from rlrc.compressor.stages.reference import create_reference
from rlrc.compressor.stages.rl import run_rl


@dataclass(frozen=True)
class New:
    """Make the reference policy with random weights."""

    out: Positional[Path]
    """artifact to write"""
    seed: int = 0

    def run(self) -> None:
        Console().print(f"next: {hint(self.out, create_reference(self.out, self.seed))}", soft_wrap=True)


@dataclass(frozen=True)
class RL(StageCommand):
    """Reinforcement learning (PPO) on the policy's own episodes."""

    config: OmitArgPrefixes[PPOConfig] = field(default_factory=PPOConfig)

    def run(self) -> None:
        self._run("rl", run_rl, self.config)
