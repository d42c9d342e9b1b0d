"""The stage sft: supervised fine-tuning on demonstrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlrc.artifact import Manifest
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.models.nn.linear import widen
from rlrc.compressor.stages.sources import PolicySource, shapes
from rlrc.compressor.stages.stage import StageOptions, stage
from rlrc.compressor.stages.statistics import adopt_statistics
from rlrc.compressor.stages.training_data import check_data
from rlrc.compressor.training import distributed, memory
from rlrc.compressor.training.config import SFTConfig
from rlrc.compressor.training.sft import sft
from rlrc.progress import progress
from rlrc.tables import plain_console


def run_sft(source: Path, out: Path, config: SFTConfig, options: StageOptions, flags: Flags | None = None) -> Manifest:
    adopted: dict[str, Any] = {}
    lines: list[str] = []

    def check(source: PolicySource) -> None:
        before = source.normalisation
        lines.extend(adopt_statistics(source, config))
        if source.normalisation != before:
            adopted["normalisation"] = source.normalisation
        check_data("sft", source, config)
        memory.check_training(shapes(source), bool(config.lora), 1 + bool(config.held_out))

    with stage("sft", source, out, config, options, check, flags, incomplete=True) as work:
        if distributed.rank() == 0:
            for line in lines:
                plain_console(stderr=True).print(f"normalisation: {line}")
        data, before_step = work.training_data(config)
        if not config.lora:
            widen(work.policy)
        with progress("sft", config.steps, distributed.rank() == 0) as report:
            metrics = sft(work.policy, config, data, work.run, report, before_step)
        return work.finish(work.policy, **adopted, **metrics)
