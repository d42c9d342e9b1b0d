"""The stages that learn from demonstrations: sft and distill. rl: see reinforcement.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from rlrc.artifact import Manifest
from rlrc.compressor import distributed, lessons, memory
from rlrc.compressor.batches import Lessons
from rlrc.compressor.distill import DistillConfig, check_teacher, distillation, matched
from rlrc.compressor.policy import Policy
from rlrc.compressor.sft import Objective, SFTConfig, sft
from rlrc.compressor.sources import Source, open_source, shapes
from rlrc.compressor.stages import Options, Stage, stage
from rlrc.errors import UserError
from rlrc.progress import progress
from rlrc.runtime.official import Flags


def run_sft(source: Path, out: Path, config: SFTConfig, options: Options, flags: Flags | None = None) -> Manifest:
    def check(found: Source) -> None:
        lessons.check("sft", found, config)
        memory.check_training(shapes(found), bool(config.lora), 1 + bool(config.held_out))

    with stage("sft", source, out, config, options, check, flags) as work:
        return work.finish(work.policy, **taught(work, config, lambda lessons: Objective))


def run_distill(
    source: Path, out: Path, config: DistillConfig, options: Options, flags: Flags | None = None
) -> Manifest:
    """``flags`` are those of an official teacher."""
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


def taught(
    work: Stage, config: SFTConfig, objective: Callable[[Lessons], Callable[[Policy, float], nn.Module]]
) -> dict[str, Any]:
    """Trains the stage's policy in place. -> what the history tells besides."""
    if config.data:
        given, dagger = lessons.of_data(work.source, config, config.held_out, config.batch), None
    else:
        given, dagger = work.simulated().lessons(work.policy, config, work.run)
    with progress(config.STAGE, config.steps, distributed.rank() == 0) as tell:
        return sft(work.policy, config, given, work.run, tell, dagger, objective(given))
