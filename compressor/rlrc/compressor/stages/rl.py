"""The stage rl: reinforcement learning of a policy that fits the simulator."""

from __future__ import annotations

from pathlib import Path

from rlrc.artifact import Manifest
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.rl.config import PPOConfig
from rlrc.compressor.rl.observations import check_playable
from rlrc.compressor.rl.ppo import ppo
from rlrc.compressor.stages import training_data
from rlrc.compressor.stages.sources import ArtifactSource, PolicySource, shapes
from rlrc.compressor.stages.stage import StageOptions, stage
from rlrc.compressor.training import distributed, memory
from rlrc.errors import UserError
from rlrc.progress import progress


def playable(source: PolicySource) -> None:
    """Raises UserError for a policy that no simulator here fits."""
    check_playable(source.spec)
    if not isinstance(source, ArtifactSource):
        raise UserError(
            "expected an artifact for rl, found an official checkpoint; make one of it first: rlrc prune CKPT OUT "
            "--lossless"
        )


def run_rl(source: Path, out: Path, config: PPOConfig, options: StageOptions, flags: Flags | None = None) -> Manifest:
    def check(found: PolicySource) -> None:
        playable(found)
        if config.data:
            training_data.open_data(config, found.spec)
        memory.check(memory.numbers(shapes(found)) * (memory.WEIGHTS + memory.ADAMW), "reinforcement learning")

    with stage("rl", source, out, config, options, check, flags, plays=True) as work:
        policy = work.policy
        batches = work.demonstrations(config, config.first_seed)
        with progress("rl", config.iterations, distributed.rank() == 0) as tell:
            ppo(policy, config, batches, work.simulated().rollouts, work.run, tell)
        return work.finish(policy)
