"""The stage sft: supervised fine-tuning on demonstrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlrc.artifact import Manifest
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.models.nn.linear import widen
from rlrc.compressor.stages import memory
from rlrc.compressor.stages.sources import PolicySource
from rlrc.compressor.stages.stage import StageOptions, stage
from rlrc.compressor.stages.statistics import adopt_statistics
from rlrc.compressor.stages.training_data import check_data
from rlrc.compressor.training import distributed
from rlrc.compressor.training.config import SFTConfig, SFTOptions
from rlrc.compressor.training.sft import sft
from rlrc.progress import progress
from rlrc.tables import plain_console


def run_sft(source: Path, out: Path, config: SFTOptions, options: StageOptions, flags: Flags | None = None) -> Manifest:
    """Settings that ``config`` leaves out are those of the policy's family: see rlrc.compressor.training.defaults."""
    adopted: dict[str, Any] = {}
    lines: list[str] = []

    def check(source: PolicySource, config: SFTConfig) -> None:
        before = source.normalisation
        lines.extend(adopt_statistics(source, config))
        if source.normalisation != before:
            adopted["normalisation"] = source.normalisation
        check_data("sft", source, config)
        memory.check(source, lambda: memory.of_training(source, config), "training", config.less_memory())

    with stage("sft", source, out, config, options, check, flags, incomplete=True) as work:
        if distributed.rank() == 0:
            for line in lines:
                plain_console(stderr=True).print(f"normalisation: {line}")
        complete: SFTConfig = work.config
        data, before_step = work.training_data(complete)
        if not complete.lora or distributed.is_fsdp():
            widen(work.policy)
        with progress("sft", complete.steps, distributed.rank() == 0) as report:
            metrics = sft(work.policy, complete, data, work.run, report, before_step, learned=work.learned())
        return work.finish(work.policy, **adopted, **metrics)
