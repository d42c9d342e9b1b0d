"""The stage rl: reinforcement learning of a policy that fits the simulator."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rlrc.artifact import Manifest
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.rl.config import PPOConfig, PPOOptions
from rlrc.compressor.rl.observations import check_fits_simulator
from rlrc.compressor.rl.ppo import ppo
from rlrc.compressor.stages import memory
from rlrc.compressor.stages.sources import ArtifactSource, PolicySource
from rlrc.compressor.stages.stage import StageOptions, stage
from rlrc.compressor.stages.training_data import open_data
from rlrc.compressor.training import distributed
from rlrc.errors import UserError
from rlrc.progress import progress


def check_source(source: PolicySource) -> None:
    """Raises UserError unless the source is an artifact whose policy fits the simulator."""
    check_fits_simulator(source.spec)
    if not isinstance(source, ArtifactSource):
        raise UserError(
            "expected an artifact for rl, found an official checkpoint; convert it first: rlrc prune CKPT OUT "
            "--lossless"
        )


def run_rl(source: Path, out: Path, config: PPOOptions, options: StageOptions, flags: Flags | None = None) -> Manifest:
    """Settings that ``config`` leaves out are those of the policy's family: see rlrc.compressor.training.defaults."""

    def check(source: PolicySource, config: PPOConfig) -> None:
        check_source(source)
        if config.data:
            open_data(config, source.spec)
        need = partial(memory.of_reinforcement, source, config.minibatch)
        memory.check(source, need, "reinforcement learning", "take a smaller --minibatch")

    with stage("rl", source, out, config, options, check, flags, plays=True) as work:
        complete: PPOConfig = work.config
        batches = work.demonstrations(complete, complete.first_seed)
        with progress("rl", complete.iterations, distributed.rank() == 0) as report:
            ppo(work.policy, complete, batches, work.require_simulation().rollouts, work.run, report)
        return work.finish(work.policy)
