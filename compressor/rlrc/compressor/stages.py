"""The stages of a compression as artifact -> artifact: load, evaluate, work, evaluate, write.

Every output's history holds the stage's full configuration and the success before and after it, measured on validation
scenes by argmax decoding. A stage that is interrupted leaves a run folder beside its output, from which the same
command goes on. Only the reference family has a simulator and demonstrations here: policies of other families, which
may come straight from their official folders, are pruned by their weights alone, quantized, and not evaluated.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlrc import artifact as artifacts
from rlrc.artifact import Draft, HistoryEntry, Manifest, writing
from rlrc.compressor import reference
from rlrc.compressor.backbones.tiny import FAMILY as REFERENCE
from rlrc.compressor.backbones.tiny import TinyPolicy
from rlrc.compressor.checkpoint import CURVES, TOKENIZER, answers, quantized, write_policy
from rlrc.compressor.data import Batches, DemonstrationConfig, demonstrations
from rlrc.compressor.lossless import lossless, outside
from rlrc.compressor.policy import Policy
from rlrc.compressor.ppo import PPOConfig, ppo
from rlrc.compressor.prune import PruneConfig, magnitude_scores, prune, pruned_towers, random_scores, taylor_scores
from rlrc.compressor.quantize import QuantizeConfig, check_exempt
from rlrc.compressor.recipe import Recipe
from rlrc.compressor.rollout import Mode, Request, Rollouts
from rlrc.compressor.run import Run
from rlrc.compressor.sft import SFTConfig, ids_of_tasks, sft
from rlrc.compressor.sources import ArtifactSource, Source, open_source, shapes
from rlrc.envs.metaworld import PICTURE, TASKS, make
from rlrc.envs.seeds import VALIDATION
from rlrc.errors import UserError
from rlrc.folders import check_output
from rlrc.runtime.official import Flags
from rlrc.runtime.preprocess import Tokenizer

GOLDEN_SCENES = 3  # of every task, at the start and half a second into the expert's way


@dataclass(frozen=True)
class Options:
    """What a stage needs besides its configuration."""

    evaluate: int = 8
    """validation episodes a task, before and after; 0 leaves them out"""
    workers: int = 2
    """processes that simulate"""
    threads: int = 2
    """threads of torch"""

    def __post_init__(self) -> None:
        for name, least in (("evaluate", 0), ("workers", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise UserError(f"expected --{name} >= {least}, found {getattr(self, name)}")


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("{task.fields[text]}")) as progress:
        bar = progress.add_task(title, total=total, text="")
        yield lambda done, text: progress.update(bar, completed=done, text=text)


def evaluate(policy: TinyPolicy, rollouts: Rollouts, episodes: int) -> dict[str, Any]:
    """Success by argmax on validation scenes: over all tasks, over the hard ones (without closing), and per task."""
    if episodes == 0:
        return {}
    requests = [Request(task, VALIDATION.start + i) for i in range(episodes) for task in TASKS]
    with Console(stderr=True).status(f"playing {len(requests)} validation episodes"):
        results = rollouts.run(requests, policy, Mode())
    per_task = {task: float(np.mean([r.success for r in results if r.task == task])) for task in TASKS}
    return {
        "success": round(float(np.mean(list(per_task.values()))), 4),
        "success_hard": round(float(np.mean([rate for name, rate in per_task.items() if TASKS[name].hard])), 4),
        "episodes": len(results),
        "per_task": {name: round(rate, 4) for name, rate in per_task.items()},
    }


@dataclass
class Stage:
    """One stage under way. ``rollouts`` is None for families without a simulator here."""

    name: str
    source: Source
    draft: Draft
    policy: Policy
    rollouts: Rollouts | None
    run: Run
    config: Any
    options: Options
    before: dict[str, Any]

    def trainable(self) -> tuple[TinyPolicy, Rollouts]:
        """What training needs (see ``reference_only``)."""
        assert isinstance(self.policy, TinyPolicy)
        assert self.rollouts is not None
        return self.policy, self.rollouts

    def batches(self, demonstrations_config: DemonstrationConfig, seed: int) -> Batches:
        policy, rollouts = self.trainable()
        with Console(stderr=True).status("playing demonstrations, unless they are in the cache"):
            samples = demonstrations(demonstrations_config, rollouts)
        return Batches(samples, policy.spec, ids_of_tasks(rollouts.load_tokenizer()), seed)

    def finish(
        self, policy: Policy, quantization: QuantizeConfig | None = None, exact: bool = False, **after: Any
    ) -> Manifest:
        """``exact``: see write_policy; ``after``: metrics of the stage itself."""
        cpu_minutes = self.run.cpu_seconds() / 60
        if self.run.curve_file.exists():
            shutil.copy(self.run.curve_file, self.draft.file(f"{CURVES}/{len(self.source.history)}-{self.name}.jsonl"))
        success: dict[str, Any] = {}
        if self.rollouts is not None:
            played = policy if quantization is None else quantized(policy, quantization)
            assert isinstance(played, TinyPolicy)
            success = evaluate(played, self.rollouts, self.options.evaluate)
        entry = HistoryEntry(
            stage=self.name,
            config=dataclasses.asdict(self.config),
            version=version("rlrc"),
            parent=self.source.digest,
            cpu_minutes=round(cpu_minutes, 2),
            before=self.before,
            after=success | after,
        )
        history = (*self.source.history, entry)
        return write_policy(self.draft, policy, self.source.observations(), history, quantization, exact)


@contextmanager
def stage(
    name: str,
    path: Path,
    out: Path,
    config: Any,
    options: Options,
    check: Callable[[Source], object] = lambda source: None,
    flags: Flags | None = None,
) -> Iterator[Stage]:
    """Everything around a stage's own work.

    Raises UserError before any work if input or output cannot be used, or if ``check`` raises it about the source.
    """
    source = open_source(path, flags or Flags())
    check(source)
    torch.set_num_threads(options.threads)
    run = Run(out.parent / f".{out.name}.run")
    with writing(out) as draft:
        source.hand_on(draft)
        policy = source.load()
        run.open(name, source.digest or str(path), config)
        try:
            with simulators(source, run, options) as rollouts:
                before: dict[str, Any] = {}
                if rollouts is not None:
                    assert isinstance(policy, TinyPolicy)
                    before = inherited_metrics(source, options) or evaluate(policy, rollouts, options.evaluate)
                run.start_clock(rollouts)
                yield Stage(name, source, draft, policy, rollouts, run, config, options, before)
        except BaseException:
            if not run.state_file.exists():  # nothing to go on with
                run.remove()
            raise
    run.remove()


@contextmanager
def simulators(source: Source, run: Run, options: Options) -> Iterator[Rollouts | None]:
    """For policies of the reference family."""
    if not isinstance(source, ArtifactSource) or source.spec.family != REFERENCE:
        yield None
        return
    artifact = source.artifact
    with Rollouts(artifact.manifest, artifact.file(TOKENIZER), run.folder, options.workers) as rollouts:
        yield rollouts


def reference_only(stage: str, source: Source, instead: str = "") -> None:
    """Raises UserError for a family that has no demonstrations here."""
    if source.spec.family != REFERENCE:
        raise UserError(
            f"expected a policy of the family {REFERENCE} for {stage}, which needs demonstrations, found "
            f"{source.spec.family}; {instead or 'this version of rlrc trains no other'}"
        )


def inherited_metrics(source: Source, options: Options) -> dict[str, Any]:
    """The parent's own success, if its last stage measured it on the same scenes."""
    after = source.history[-1].after if source.history else {}
    if after.get("episodes") != options.evaluate * len(TASKS):
        return {}
    return {name: after[name] for name in ("success", "success_hard", "episodes", "per_task")}


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
    from rlrc.envs.experts import expert

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


def run_sft(source: Path, out: Path, config: SFTConfig, options: Options) -> Manifest:
    with stage("sft", source, out, config, options, partial(reference_only, "sft")) as work:
        policy, rollouts = work.trainable()
        with progress_bar("sft", config.steps) as progress:
            sft(policy, config, rollouts, work.run, progress)
        return work.finish(policy)


def run_prune(source: Path, out: Path, config: PruneConfig, options: Options, flags: Flags | None = None) -> Manifest:
    def check(source: Source) -> None:
        if config.lossless:
            if source.quantized:  # its weights would be stored as floats again
                raise UserError("expected an unquantized artifact, found int4; cut its parent, then quantize")
            return
        pruned_towers(source.towers, config)
        if config.score == "taylor":
            reference_only("prune.score taylor", source, "give --score magnitude")

    with stage("prune", source, out, config, options, check, flags) as work:
        if config.lossless:
            pruned, report = lossless(work.policy, work.source.unread)
            if pruned.spec.action.tokens != work.policy.spec.action.tokens:
                whole = answers(work.policy, work.source.observations())["tokens"]
                report["outside"] = {"observations": len(whole), "changed": outside(whole, pruned.spec.action)}
            return work.finish(pruned, exact=True, lossless=report)
        if config.score == "random":
            scores = random_scores(work.policy, config)
        elif config.score == "magnitude":
            scores = magnitude_scores(work.policy, config)
        else:
            batches = work.batches(DemonstrationConfig(config.demonstrations), config.seed)
            policy, _ = work.trainable()
            scores = taylor_scores(policy, batches, config, SFTConfig().smoothing)
        pruned, removed = prune(work.policy, scores, config)
        return work.finish(pruned, exact=not work.source.quantized, removed=removed)


def run_rl(source: Path, out: Path, config: PPOConfig, options: Options) -> Manifest:
    with stage("rl", source, out, config, options, partial(reference_only, "rl")) as work:
        policy, rollouts = work.trainable()
        batches = work.batches(DemonstrationConfig(config.demonstrations, config.first_seed), config.seed)
        with progress_bar("rl", config.iterations) as progress:
            ppo(policy, config, batches, rollouts, work.run, progress)
        return work.finish(policy)


def run_quantize(
    source: Path, out: Path, config: QuantizeConfig, options: Options, flags: Flags | None = None
) -> Manifest:
    def check(found: Source) -> None:
        if found.quantized:
            raise UserError(f"expected an unquantized artifact, found int4 in {source}; quantize its parent")
        check_exempt(shapes(found), config)

    with stage("quantize", source, out, config, options, check, flags) as work:
        return work.finish(work.policy, config)


RUNNERS: dict[str, Callable[..., Manifest]] = {
    "prune": run_prune,
    "sft": run_sft,
    "rl": run_rl,
    "quantize": run_quantize,
}


def compress(source: Path, out: Path, recipe: Recipe, options: Options) -> None:
    """Every stage of a recipe, each an artifact of its own in ``OUT.stages/``, then the export to ``out``.

    A stage that an earlier call finished is kept, provided it did the same to the same input; otherwise it is refused.
    """
    from rlrc.exporters.export import export  # imported late: only this function goes all the way

    check_output(out)
    folder = out.parent / f"{out.name}.stages"
    folder.mkdir(parents=True, exist_ok=True)
    current = source
    for name, config in recipe.stages():
        target = folder / name
        if target.exists():
            check_same(target, name, open_source(current, Flags()), config)
        else:
            RUNNERS[name](current, target, config, options)
        current = target
    export(artifacts.load(current), out)


def check_same(finished: Path, name: str, source: Source, config: Any) -> None:
    """Refuse a finished stage that is not what the recipe would do now."""
    *earlier, entry = artifacts.load(finished).manifest.history
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    # An official folder has no digest; but the history says which one it was.
    same = [(e.stage, e.config) for e in earlier] == [(e.stage, e.config) for e in source.history]
    if not same or (entry.stage, entry.parent, json.loads(json.dumps(entry.config))) != (name, source.digest, wanted):
        raise UserError(
            f"expected {finished} to be stage {name} of this recipe and input, found another one; remove it"
        )
