"""The stages that learn from demonstrations: sft and distill. rl: see reinforcement.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from rlrc.artifact import Manifest
from rlrc.compressor import distributed, lessons, memory, normalisation
from rlrc.compressor.backbones.normaliser import MODES
from rlrc.compressor.batches import Lessons
from rlrc.compressor.distill import DistillConfig, check_teacher, distillation, matched
from rlrc.compressor.policy import Policy
from rlrc.compressor.sft import Objective, SFTConfig, sft
from rlrc.compressor.sources import Source, open_source, shapes
from rlrc.compressor.stages import Options, Stage, stage
from rlrc.errors import UserError
from rlrc.runtime.describe import normalisation_lines, plain_console
from rlrc.runtime.official import Flags


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Of several processes the first one tells.
    with Progress(*columns, TextColumn("{task.fields[text]}"), disable=distributed.rank() > 0) as progress:
        bar = progress.add_task(title, total=total, text="")
        yield lambda done, text: progress.update(bar, completed=done, text=text)


def run_sft(source: Path, out: Path, config: SFTConfig, options: Options, flags: Flags | None = None) -> Manifest:
    told: dict[str, Any] = {}

    def check(found: Source) -> None:
        if take_statistics(found, config):
            told["normalisation"] = found.normalisation
        lessons.check("sft", found, config)
        memory.check_training(shapes(found), bool(config.lora), 1 + bool(config.held_out))

    with stage("sft", source, out, config, options, check, flags, incomplete=True) as work:
        return work.finish(work.policy, **told, **taught(work, config, lambda lessons: Objective))


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


def take_statistics(source: Source, config: SFTConfig) -> bool:
    """Gives the source the data set's statistics where its own are missing, or for all; whether it did.

    Raises UserError where there are none to take.
    """
    spec, record, everything = source.spec, source.normalisation, config.statistics == "data"
    absent, own = normalisation.missing(record), normalisation.normalised(record)
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
    names += [name for name in normalisation.undecided(spec, record) if name not in names]
    if names and config.data:
        dataset = normalisation.from_data(config.data)
        source.spec, source.normalisation = normalisation.adopted(spec, record, names, dataset, config.cameras)
        dataset.close()
    changed = source.normalisation != record
    if distributed.rank() == 0 and config.data:
        console = plain_console(stderr=True)
        for line in normalisation_lines({name: source.normalisation[name] for name in names}) if changed else ():
            console.print(f"normalisation: {line}")
        if kept := [name for name in own if name not in names]:
            console.print(
                f"normalisation: the policy's own statistics of {', '.join(kept)} are kept; --statistics data takes "
                f"those of {config.data}"
            )
    return changed


def taught(
    work: Stage, config: SFTConfig, objective: Callable[[Lessons], Callable[[Policy, float], nn.Module]]
) -> dict[str, Any]:
    """Trains the stage's policy in place. -> what the history tells besides."""
    if config.data:
        given, dagger = lessons.of_data(work.source, config, config.held_out, config.batch), None
    else:
        given, dagger = work.simulated().lessons(work.policy, config, work.run)
    with progress_bar(config.STAGE, config.steps) as progress:
        return sft(work.policy, config, given, work.run, progress, dagger, objective(given))
