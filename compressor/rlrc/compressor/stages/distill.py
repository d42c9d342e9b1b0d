"""The stage distill: training on demonstrations and on a dense teacher's hidden states."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rlrc.artifact import Manifest
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.models.coupling import TOWERS
from rlrc.compressor.models.nn.linear import widen
from rlrc.compressor.stages import memory
from rlrc.compressor.stages.sources import PolicySource, open_source
from rlrc.compressor.stages.stage import StageOptions, stage
from rlrc.compressor.stages.training_data import check_data
from rlrc.compressor.training import distributed
from rlrc.compressor.training.distill import DistillConfig, DistillOptions, build_objective, original_numbers
from rlrc.compressor.training.sft import sft
from rlrc.errors import UserError
from rlrc.progress import progress


def run_distill(
    source: Path, out: Path, config: DistillOptions, options: StageOptions, flags: Flags | None = None
) -> Manifest:
    """``flags`` are those of an official teacher. Settings that ``config`` leaves out are as for ``run_sft``."""
    if config.statistics != "policy":
        raise UserError(
            f"expected distill.statistics policy, found {config.statistics}; a student has its teacher's, and rlrc sft "
            "takes a data set's"
        )
    if not config.teacher:
        raise UserError("expected a teacher for distill, found none; give --teacher, or teacher in [distill]")
    teacher = open_source(Path(config.teacher), flags or Flags())

    def check(student: PolicySource, config: DistillConfig) -> None:
        check_data("distill", student, config)
        check_teacher(student, teacher, config)
        need = partial(memory.of_training, student, config, teacher)
        memory.check(student, need, "training", config.less_memory())

    with stage("distill", source, out, config, options, check) as work:
        complete: DistillConfig = work.config
        data, before_step = work.training_data(complete)
        blocks = match_blocks(work.source, teacher)
        objective = build_objective(complete, teacher.load(), blocks, data.batches, work.run.folder)
        if not complete.lora or distributed.is_fsdp():
            widen(work.policy)
        with progress("distill", complete.steps, distributed.rank() == 0) as report:
            metrics = sft(work.policy, complete, data, work.run, report, before_step, objective, work.learned())
        return work.finish(work.policy, teacher=teacher.digest, **metrics)


def check_teacher(student: PolicySource, teacher: PolicySource, config: DistillOptions) -> None:
    """Raises UserError unless the student can learn from this teacher."""
    if teacher.spec.family != student.spec.family:
        raise UserError(
            f"expected a teacher of the family {student.spec.family}, found {teacher.spec.family} in {config.teacher}; "
            "give another"
        )
    if config.cache and teacher.spec.flow is not None:
        raise UserError(
            "expected a policy without flow steps for distill.cache, found noise and times that are drawn for "
            "every batch; leave the cache out"
        )
    widths = [
        (f"{name} width", student.towers[name].width, teacher.towers[name].width) for name in _shared_towers(student)
    ]
    for name, expected, found in (
        ("cameras", _cameras(student), _cameras(teacher)),
        ("state", _state(student), _state(teacher)),
        ("numbers of a chunk", _chunk(student), _chunk(teacher)),
        *widths,
    ):
        if expected != found:
            raise UserError(
                f"expected a teacher with the student's {name}, {expected}, found {found} in {config.teacher}; give "
                "the policy that the student was pruned from"
            )
    if "expert" in teacher.towers and teacher.towers["expert"].norm == "steps" != student.towers["expert"].norm:
        raise UserError(
            f"expected a teacher that answers at every time of the flow, found {config.teacher}, cut to its flow "
            "steps; give what it was cut from"
        )
    match_blocks(student, teacher)


def _shared_towers(source: PolicySource) -> list[str]:
    return [name for name in TOWERS if name in source.towers]


def _cameras(source: PolicySource) -> list[str]:
    return [f"{camera.name} {camera.height}x{camera.width}" for camera in source.spec.cameras]


def _state(source: PolicySource) -> int:
    """Dimension of the state."""
    return 0 if source.spec.state is None else len(source.spec.state.names)


def _chunk(source: PolicySource) -> tuple[int, int, int]:
    """Steps, dimensions, bins."""
    action = source.spec.action
    return action.horizon, action.dim, action.bins


def match_blocks(student: PolicySource, teacher: PolicySource) -> list[tuple[str, str]]:
    """Pairs of names: each block of the student, and the teacher's block that it was pruned from.

    Blocks that only make keys and values are left out, because they pass the residual stream on unchanged. Raises
    UserError for a block that the teacher does not have.
    """
    pairs = []
    for tower in _shared_towers(student):
        student_layers, teacher_layers = student.towers[tower].layers, teacher.towers[tower].layers
        student_numbers = original_numbers(student.history, tower, len(student_layers))
        teacher_numbers = original_numbers(teacher.history, tower, len(teacher_layers))
        if not set(student_numbers) <= set(teacher_numbers):
            raise UserError(
                f"expected a teacher with the blocks {student_numbers} of the student's {tower}, found "
                f"{teacher_numbers}; give the policy that the student was pruned from"
            )
        for i, number in enumerate(student_numbers):
            j = teacher_numbers.index(number)
            if "half" not in (student_layers[i].kind, teacher_layers[j].kind):
                pairs.append((f"{tower}.layers.{i}", f"{tower}.layers.{j}"))
    return pairs
