"""The stage quantize: round the weights to integers of 4 or 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlrc.artifact import Manifest
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.models.storage.scratch import Scratch
from rlrc.compressor.quantize.padding import pad_policy
from rlrc.compressor.quantize.quantize import QuantizeConfig, check_exempt, quantize
from rlrc.compressor.stages import memory
from rlrc.compressor.stages.artifact_io import every_input
from rlrc.compressor.stages.sources import PolicySource, shapes
from rlrc.compressor.stages.stage import StageOptions, stage
from rlrc.compressor.stages.training_data import load_data, open_data
from rlrc.progress import status


def run_quantize(
    source: Path, out: Path, config: QuantizeConfig, options: StageOptions, flags: Flags | None = None
) -> Manifest:
    def check(source: PolicySource, _: Any) -> None:
        check_exempt(shapes(source), config)
        if config.data:
            open_data(config, source.spec)
        memory.check(source, lambda: memory.of_quantize(source, config), "quantizing")

    with stage("quantize", source, out, config, options, check, flags) as work:
        observations = every_input(work.policy.spec, work.source.observations())
        if config.data:
            batches = load_data(work.source, config).batches
            observations = (batches.draw(1).inputs for _ in range(config.samples))
        with status("rounding"):
            work.run.folder.mkdir(parents=True, exist_ok=True)
            allocate = Scratch(work.run.folder).empty
            policy, added = pad_policy(work.policy, config.group, allocate)
            result = quantize(
                policy.to(work.device), config, (inputs.to(work.device) for inputs in observations), allocate
            )
        return work.finish(policy, result, rounding=result.report | added)
