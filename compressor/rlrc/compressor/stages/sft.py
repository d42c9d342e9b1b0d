"""The stage sft: supervised fine-tuning on demonstrations, and what it shares with distill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from rlrc.artifact import Manifest
from rlrc.artifact.describe import normalisation_lines
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.checkpoints.lerobot import dataset_statistics
from rlrc.compressor.checkpoints.lerobot.normaliser import MODES
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.stages import training_data as lessons
from rlrc.compressor.stages.sources import PolicySource, shapes
from rlrc.compressor.stages.stage import Stage, StageOptions, stage
from rlrc.compressor.training import distributed, memory
from rlrc.compressor.training.batches import TrainingData
from rlrc.compressor.training.sft import SFTConfig, SFTObjective, sft
from rlrc.errors import UserError
from rlrc.progress import progress
from rlrc.tables import plain_console


def run_sft(source: Path, out: Path, config: SFTConfig, options: StageOptions, flags: Flags | None = None) -> Manifest:
    adopted: dict[str, Any] = {}
    lines: list[str] = []

    def check(found: PolicySource) -> None:
        before = found.normalisation
        lines.extend(take_statistics(found, config))
        if found.normalisation != before:
            adopted["normalisation"] = found.normalisation
        lessons.check("sft", found, config)
        memory.check_training(shapes(found), bool(config.lora), 1 + bool(config.held_out))

    with stage("sft", source, out, config, options, check, flags, incomplete=True) as work:
        if distributed.rank() == 0:
            for line in lines:
                plain_console(stderr=True).print(f"normalisation: {line}")
        return work.finish(work.policy, **adopted, **taught(work, config, lambda lessons: SFTObjective))


def take_statistics(source: PolicySource, config: SFTConfig) -> list[str]:
    """Gives the source the data set's statistics where its own are missing, or for all. -> lines that say so.

    Raises UserError where there are none to take.
    """
    spec, record, everything = source.spec, source.normalisation, config.statistics == "data"
    absent, own = dataset_statistics.find_missing(record), dataset_statistics.find_normalised(record)
    if everything and not own:
        raise UserError(
            f"expected a policy that is normalised as LeRobot does ({', '.join(MODES)}) with --statistics data, found "
            f"{spec.family} without a record of it; leave --statistics out to keep the policy's"
        )
    if (absent or everything) and not config.data:
        raise UserError(
            f"expected a data set for the statistics of {', '.join(absent or own)}, found none; give --data FOLDER"
        )
    names = own if everything else []
    names += [name for name in dataset_statistics.find_undecided(spec, record) if name not in names]
    if names and config.data:
        dataset = dataset_statistics.open_dataset(config.data)
        source.spec, source.normalisation = dataset_statistics.adopt_statistics(
            spec, record, names, dataset, config.cameras
        )
        dataset.close()
    taken = {name: how for name, how in source.normalisation.items() if how != record[name]}
    kept = [name for name in own if name not in names]
    if not kept or not config.data:
        return normalisation_lines(taken)
    return [
        *normalisation_lines(taken),
        f"the policy's own statistics of {', '.join(kept)} are kept; --statistics data takes those of {config.data}",
    ]


def taught(
    work: Stage, config: SFTConfig, objective: Callable[[TrainingData], Callable[[PolicyModule, float], nn.Module]]
) -> dict[str, Any]:
    """Trains the stage's policy in place. -> what the history tells besides."""
    if config.data:
        given, rounds = lessons.of_data(work.source, config, config.held_out, config.batch), None
    else:
        given, rounds = work.simulated().training_data(work.policy, config, work.run)
    with progress(config.STAGE, config.steps, distributed.rank() == 0) as tell:
        return sft(work.policy, config, given, work.run, tell, rounds, objective(given))
