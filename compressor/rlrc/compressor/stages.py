"""The stages of a compression as artifact -> artifact: load, evaluate, work, evaluate, write.

Every output's history holds the stage's full configuration and the success before and after it, measured on validation
scenes by argmax decoding. A stage that is interrupted leaves a run folder beside its output, from which the same
command goes on.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlrc import artifact as artifacts
from rlrc.artifact import Artifact, Draft, HistoryEntry, Manifest, writing
from rlrc.compressor import reference
from rlrc.compressor.backbones.tiny import TinyPolicy
from rlrc.compressor.checkpoint import (
    CURVES,
    GOLDEN,
    OBSERVATIONS,
    TOKENIZER,
    WEIGHTS,
    load_policy,
    quantized,
    write_policy,
)
from rlrc.compressor.data import Batches, DemonstrationConfig, demonstrations
from rlrc.compressor.ppo import PPOConfig, ppo
from rlrc.compressor.prune import PruneConfig, prune, pruned_tower, random_scores, taylor_scores
from rlrc.compressor.quantize import QuantizeConfig, check_exempt
from rlrc.compressor.recipe import Recipe
from rlrc.compressor.rollout import Mode, Request, Rollouts
from rlrc.compressor.run import Run
from rlrc.compressor.sft import SFTConfig, ids_of_tasks, sft
from rlrc.envs.metaworld import PICTURE, TASKS, make
from rlrc.envs.seeds import VALIDATION
from rlrc.errors import UserError
from rlrc.folders import check_output
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
    """One stage under way."""

    name: str
    parent: Artifact
    draft: Draft
    policy: TinyPolicy
    rollouts: Rollouts
    run: Run
    config: Any
    options: Options
    before: dict[str, Any]

    def batches(self, demonstrations_config: DemonstrationConfig, seed: int) -> Batches:
        samples = demonstrations(demonstrations_config, self.rollouts)
        return Batches(samples, self.policy.spec, ids_of_tasks(self.rollouts.load_tokenizer()), seed)

    def finish(self, policy: TinyPolicy, quantization: QuantizeConfig | None = None, **after: Any) -> Manifest:
        cpu_minutes = self.run.cpu_seconds() / 60
        if self.run.curve_file.exists():
            shutil.copy(
                self.run.curve_file, self.draft.file(f"{CURVES}/{len(self.parent.manifest.history)}-{self.name}.jsonl")
            )
        if quantization is not None:
            policy = quantized(policy, quantization)
        entry = HistoryEntry(
            stage=self.name,
            config=dataclasses.asdict(self.config),
            version=version("rlrc"),
            parent=self.parent.digest,
            cpu_minutes=round(cpu_minutes, 2),
            before=self.before,
            after=evaluate(policy, self.rollouts, self.options.evaluate) | after,
        )
        with np.load(self.parent.file(GOLDEN)) as arrays:
            observations = {name: arrays[name] for name in OBSERVATIONS}
        return write_policy(self.draft, policy, observations, (*self.parent.manifest.history, entry), quantization)


@contextmanager
def stage(
    name: str,
    source: Path,
    out: Path,
    config: Any,
    options: Options,
    check: Callable[[TinyPolicy], object] = lambda policy: None,
) -> Iterator[Stage]:
    """Everything around a stage's own work.

    Raises UserError before any work if input or output cannot be used, or if ``check`` raises it about the policy.
    """
    parent = artifacts.load(source)
    if WEIGHTS not in parent.manifest.files:
        raise UserError(
            f"expected trainable weights ({WEIGHTS}) in {source}, found none; start from an artifact of the compressor"
        )
    torch.set_num_threads(options.threads)
    run = Run(out.parent / f".{out.name}.run")
    with writing(out) as draft:
        draft.inherit(parent, TOKENIZER, CURVES)
        policy = load_policy(parent)
        check(policy)
        run.open(name, parent.digest, config)
        try:
            with Rollouts(parent.manifest, parent.file(TOKENIZER), run.folder, options.workers) as rollouts:
                before = inherited_metrics(parent, options) or evaluate(policy, rollouts, options.evaluate)
                run.start_clock(rollouts)
                yield Stage(name, parent, draft, policy, rollouts, run, config, options, before)
        except BaseException:
            if not run.state_file.exists():  # nothing to go on with
                run.remove()
            raise
    run.remove()


def inherited_metrics(parent: Artifact, options: Options) -> dict[str, Any]:
    """The parent's own success, if its last stage measured it on the same scenes."""
    history = parent.manifest.history
    after = history[-1].after if history else {}
    if after.get("episodes") != options.evaluate * len(TASKS):
        return {}
    return {name: after[name] for name in ("success", "success_hard", "episodes", "per_task")}


def new(out: Path, seed: int = 0) -> Manifest:
    """A reference policy with random weights: what training starts from."""
    torch.manual_seed(seed)
    with writing(out) as draft:
        policy = TinyPolicy(reference.policy_spec(), reference.towers())
        reference.write_tokenizer(draft.file(TOKENIZER))
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
        "images": np.stack([row[PICTURE][None] for row in rows]),
        "state": np.stack([row["state"] for row in rows]),
        "instructions": np.array([row["instruction"] for row in rows]),
        "ids": np.stack([tokenizer(row["instruction"]) for row in rows]),
    }


def run_sft(source: Path, out: Path, config: SFTConfig, options: Options) -> Manifest:
    with stage("sft", source, out, config, options) as work:
        with progress_bar("sft", config.steps) as progress:
            sft(work.policy, config, work.rollouts, work.run, progress)
        return work.finish(work.policy)


def run_prune(source: Path, out: Path, config: PruneConfig, options: Options) -> Manifest:
    with stage("prune", source, out, config, options, lambda p: pruned_tower(p.towers["decoder"], config)) as work:
        if config.score == "random":
            scores = random_scores(work.policy, config.seed)
        else:
            with Console(stderr=True).status("playing demonstrations, unless they are in the cache"):
                batches = work.batches(DemonstrationConfig(config.demonstrations), config.seed)
            scores = taylor_scores(work.policy, batches, config, SFTConfig().smoothing)
        pruned, removed = prune(work.policy, scores, config)
        return work.finish(pruned, removed=removed)


def run_rl(source: Path, out: Path, config: PPOConfig, options: Options) -> Manifest:
    with stage("rl", source, out, config, options) as work:
        batches = work.batches(DemonstrationConfig(config.demonstrations), config.seed)
        with progress_bar("rl", config.iterations) as progress:
            ppo(work.policy, config, batches, work.rollouts, work.run, progress)
        return work.finish(work.policy)


def run_quantize(source: Path, out: Path, config: QuantizeConfig, options: Options) -> Manifest:
    if artifacts.load(source).manifest.quantization is not None:
        raise UserError(f"expected an unquantized artifact, found int4 in {source}; quantize its parent")
    with stage("quantize", source, out, config, options, lambda p: check_exempt(p.state_dict(), config)) as work:
        return work.finish(work.policy, config)


RUNNERS: dict[str, Callable[[Path, Path, Any, Options], Manifest]] = {
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
            check_same(target, name, artifacts.load(current).digest, config)
        else:
            RUNNERS[name](current, target, config, options)
        current = target
    export(artifacts.load(current), out)


def check_same(finished: Path, name: str, parent: str, config: Any) -> None:
    """Refuse a finished stage that is not what the recipe would do now."""
    entry = artifacts.load(finished).manifest.history[-1]
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    if (entry.stage, entry.parent, json.loads(json.dumps(entry.config))) != (name, parent, wanted):
        raise UserError(
            f"expected {finished} to be stage {name} of this recipe and input, found another one; remove it"
        )
