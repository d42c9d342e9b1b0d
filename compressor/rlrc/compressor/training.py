"""The stages that train: sft, distill and rl; and the policy of the reference family that they start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from rlrc.artifact import HistoryEntry, Manifest, writing
from rlrc.compressor import distributed, memory, reference
from rlrc.compressor.backbones.tiny import TinyPolicy
from rlrc.compressor.batches import Lessons
from rlrc.compressor.checkpoint import TOKENIZER, write_policy
from rlrc.compressor.dagger import Dagger
from rlrc.compressor.data import DemonstrationConfig
from rlrc.compressor.distill import DistillConfig, check_teacher, distillation, matched
from rlrc.compressor.observations import check_playable
from rlrc.compressor.policy import Policy
from rlrc.compressor.ppo import PPOConfig, ppo
from rlrc.compressor.sft import Objective, SFTConfig, sft
from rlrc.compressor.sources import ArtifactSource, Source, open_source, shapes
from rlrc.compressor.stages import Options, Stage, reference_only, stage
from rlrc.envs.experts import expert
from rlrc.envs.metaworld import PICTURE, TASKS, make
from rlrc.envs.seeds import VALIDATION
from rlrc.errors import UserError
from rlrc.runtime.official import Flags
from rlrc.runtime.preprocess import Tokenizer

GOLDEN_SCENES = 3  # of every task, at the start and half a second into the expert's way


def new(out: Path, seed: int = 0) -> Manifest:
    """A reference policy with random weights: what training starts from."""
    torch.manual_seed(seed)
    with writing(out) as draft:
        policy = TinyPolicy(reference.policy_spec(), reference.towers())
        reference.write_tokenizer(draft.file(TOKENIZER))
        assert policy.spec.prompt is not None
        tokenizer = Tokenizer(draft.file(TOKENIZER), policy.spec.prompt)
        entry = HistoryEntry("new", {"seed": seed}, version("rlrc"), None, 0.0)
        return write_policy(draft, policy, golden_observations(tokenizer), (entry,))


def golden_observations(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Raw observations of every task: at the start and after ten steps of the expert."""
    rows: list[dict[str, Any]] = []
    for name, task in TASKS.items():
        env, act = make(name), expert(task)
        for scene in range(GOLDEN_SCENES):
            rows.append(env.reset(seed=VALIDATION.stop - 1 - scene)[0])
            for _ in range(10):
                env.advance(act(env.full_observation))
            rows.append(env.observe())
    return {
        PICTURE: np.stack([row[PICTURE] for row in rows]),
        "state": np.stack([row["state"] for row in rows]),
        "instructions": np.array([row["instruction"] for row in rows]),
        "ids": np.stack([tokenizer(row["instruction"]) for row in rows]),
    }


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
    def check(found: Source) -> None:
        reference_only("sft", found)
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
        reference_only("distill", student)
        check_teacher(student, teacher, config)

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
    policy, simulation = work.trainable()
    batches = simulation.batches(policy, DemonstrationConfig(config.demonstrations, config.first_seed), config.seed)
    lessons = Lessons(batches, simulation.held_out(policy, config))
    dagger = Dagger(config, simulation.rollouts, batches, work.run)
    with progress_bar(config.STAGE, config.steps) as progress:
        return sft(policy, config, lessons, work.run, progress, dagger, objective(lessons))


def playable(source: Source) -> None:
    """Raises UserError for a policy that no simulator here fits."""
    check_playable(source.spec)
    if not isinstance(source, ArtifactSource):
        raise UserError(
            "expected an artifact for rl, found an official checkpoint; make one of it first: rlrc prune CKPT OUT "
            "--lossless"
        )


def run_rl(source: Path, out: Path, config: PPOConfig, options: Options, flags: Flags | None = None) -> Manifest:
    with stage("rl", source, out, config, options, playable, flags, plays=True) as work:
        policy, simulation = work.policy, work.simulated()
        examples = DemonstrationConfig(config.demonstrations, config.first_seed)
        batches = simulation.batches(policy, examples, config.seed)
        with progress_bar("rl", config.iterations) as progress:
            ppo(policy, config, batches, simulation.rollouts, work.run, progress)
        return work.finish(policy)
