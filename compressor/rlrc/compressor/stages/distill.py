"""The stage distill: demonstrations and a dense teacher's hidden states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from rlrc.artifact import Manifest
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.models.coupling import TOWERS
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.stages import training_data as lessons
from rlrc.compressor.stages.sft import taught
from rlrc.compressor.stages.sources import PolicySource, open_source, shapes
from rlrc.compressor.stages.stage import StageOptions, stage
from rlrc.compressor.training import memory
from rlrc.compressor.training.batches import TrainingData
from rlrc.compressor.training.distill import DistillConfig, distillation, numbers
from rlrc.errors import UserError


def run_distill(
    source: Path, out: Path, config: DistillConfig, options: StageOptions, flags: Flags | None = None
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

    def check(student: PolicySource) -> None:
        lessons.check("distill", student, config)
        check_teacher(student, teacher, config)
        besides = memory.numbers(shapes(teacher))
        memory.check_training(shapes(student), bool(config.lora), 1 + bool(config.held_out), besides)

    with stage("distill", source, out, config, options, check) as work:
        pairs, folder = matched(work.source, teacher), work.run.folder

        def objective(lessons: TrainingData) -> Callable[[PolicyModule, float], nn.Module]:
            return distillation(config, teacher.load(), pairs, lessons.batches, folder)

        report = taught(work, config, objective)
        return work.finish(work.policy, teacher=teacher.digest, **report)


def check_teacher(student: PolicySource, teacher: PolicySource, config: DistillConfig) -> None:
    """Raises UserError unless the student can learn from this teacher."""
    if teacher.spec.family != student.spec.family:
        found, wanted = teacher.spec.family, student.spec.family
        raise UserError(f"expected a teacher of the family {wanted}, found {found} in {config.teacher}; give another")
    if config.cache and teacher.spec.flow is not None:
        raise UserError(
            "expected a policy without flow steps for distill.cache, found noise and times that are drawn anew for "
            "every batch; leave the cache out"
        )
    for what, ours, its in (
        ("cameras", _cameras(student), _cameras(teacher)),
        ("state", _state(student), _state(teacher)),
        ("numbers of a chunk", _chunk(student), _chunk(teacher)),
        *((f"{name} width", student.towers[name].width, teacher.towers[name].width) for name in _shared(student)),
    ):
        if ours != its:
            raise UserError(
                f"expected a teacher with the student's {what}, {ours}, found {its} in {config.teacher}; give the "
                "policy that the student was pruned from"
            )
    if "expert" in teacher.towers and teacher.towers["expert"].tabulated and not student.towers["expert"].tabulated:
        raise UserError(
            f"expected a teacher that answers at every time of the flow, found {config.teacher}, cut to its flow "
            "steps; give what it was cut from"
        )
    matched(student, teacher)


def _shared(source: PolicySource) -> list[str]:
    return [name for name in TOWERS if name in source.towers]


def _cameras(source: PolicySource) -> list[str]:
    return [f"{camera.name} {camera.height}x{camera.width}" for camera in source.spec.cameras]


def _state(source: PolicySource) -> int:
    """How many numbers."""
    return 0 if source.spec.state is None else len(source.spec.state.names)


def _chunk(source: PolicySource) -> tuple[int, int, int]:
    """Steps, dimensions, bins."""
    action = source.spec.action
    return action.horizon, action.dim, action.bins


def matched(student: PolicySource, teacher: PolicySource) -> list[tuple[str, str]]:
    """The student's blocks and those of the teacher that they were, by name.

    Blocks that only make keys and values are left out: they hand the residual stream on. Raises UserError for a block
    that the teacher does not have.
    """
    pairs = []
    for tower in _shared(student):
        ours, its = student.towers[tower].layers, teacher.towers[tower].layers
        whole = [numbers(source.history, tower, len(source.towers[tower].layers)) for source in (student, teacher)]
        if not set(whole[0]) <= set(whole[1]):
            raise UserError(
                f"expected a teacher with the blocks {whole[0]} of the student's {tower}, found {whole[1]}; give the "
                "policy that the student was pruned from"
            )
        for i, number in enumerate(whole[0]):
            j = whole[1].index(number)
            if not ours[i].kv_only and not its[j].kv_only:
                pairs.append((f"{tower}.layers.{i}", f"{tower}.layers.{j}"))
    return pairs
