"""The stage distill: demonstrations and a dense teacher's hidden states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from rlrc.artifact import Manifest
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.models.policy import Policy
from rlrc.compressor.stages import training_data as lessons
from rlrc.compressor.stages.sft import taught
from rlrc.compressor.stages.sources import Source, open_source, shapes
from rlrc.compressor.stages.stage import Options, stage
from rlrc.compressor.training import memory
from rlrc.compressor.training.batches import Lessons
from rlrc.compressor.training.distill import DistillConfig, check_teacher, distillation, matched
from rlrc.errors import UserError


def run_distill(
    source: Path, out: Path, config: DistillConfig, options: Options, flags: Flags | None = None
) -> Manifest:
    """``flags`` are those of an official teacher."""
    if config.statistics != "policy":
        raise UserError(
            f"expected distill.statistics policy, found {config.statistics}; a student has its teacher's, and rlrc sft "
            "takes a data set's"
        )
    if not config.teacher:
        raise UserError("expected a teacher for distill, found none; give --teacher, or teacher in [distill]")
    teacher = open_source(Path(config.teacher), flags or Flags())

    def check(student: Source) -> None:
        lessons.check("distill", student, config)
        check_teacher(student, teacher, config)
        besides = memory.numbers(shapes(teacher))
        memory.check_training(shapes(student), bool(config.lora), 1 + bool(config.held_out), besides)

    with stage("distill", source, out, config, options, check) as work:
        pairs, folder = matched(work.source, teacher), work.run.folder

        def objective(lessons: Lessons) -> Callable[[Policy, float], nn.Module]:
            return distillation(config, teacher.load(), pairs, lessons.batches, folder)

        report = taught(work, config, objective)
        return work.finish(work.policy, teacher=teacher.digest, **report)
