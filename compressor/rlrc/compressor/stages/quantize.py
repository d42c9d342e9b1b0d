"""The stage quantize: weights to 4 or 8 bits on the grid."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlrc.artifact import Manifest
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.quantize.padding import pad_policy
from rlrc.compressor.quantize.quantize import QuantizeConfig, check_exempt, quantize
from rlrc.compressor.stages.artifact_io import every_input
from rlrc.compressor.stages.sources import PolicySource, shapes
from rlrc.compressor.training import memory
from rlrc.progress import status

if TYPE_CHECKING:
    pass
from rlrc.compressor.stages.stage import StageOptions, stage


def run_quantize(
    source: Path, out: Path, config: QuantizeConfig, options: StageOptions, flags: Flags | None = None
) -> Manifest:
    def check(found: PolicySource) -> None:
        check_exempt(shapes(found), config)
        memory.check(memory.numbers(shapes(found)) * memory.REWRITTEN, "quantizing")

    with stage("quantize", source, out, config, options, check, flags) as work:
        observations = every_input(work.policy.spec, work.source.observations())
        with status("rounding"):
            policy, added = pad_policy(work.policy, config.group)
            result = quantize(policy, config, observations)
        return work.finish(policy, result, rounding=result.report | added)
