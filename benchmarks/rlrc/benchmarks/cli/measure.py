"""The commands that measure latency, memory and success."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from rlrc.benchmarks.cli.output import ArtifactOptions, progress, result_of
from rlrc.benchmarks.measure import latency, memory, success
from rlrc.benchmarks.results import machine
from rlrc.benchmarks.results.results import NamedArtifact, facts
from rlrc.errors import UserError
from rlrc.runtime.board import monitor
from rlrc.runtime.board.monitor import Board


@dataclass(frozen=True, kw_only=True)
class MeasureLatency(ArtifactOptions):
    """Measure milliseconds of one inference, in total and by part; several artifacts in one interleaved run."""

    trials: int = 500
    """inferences of each, after the warm-up"""

    def run(self) -> None:
        opened = self.open_artifacts()
        with Board.monitor() as board:
            trials = time_inferences(opened, self.trials, self.threads)
        rows = [facts(named) | latency.row(trials[named.name]) for named in opened]
        parts = [part for part in latency.PARTS if any(part in row["parts_ms"] for row in rows)]
        table = Table("policy", *rows[0]["latency_ms"], *(f"{part} p50" for part in parts), "ratio")
        for row in rows:
            ratio = rows[0]["latency_ms"]["p50"] / row["latency_ms"]["p50"]
            figures = [f"{figure:.3f}" for figure in row["latency_ms"].values()]
            figures += [f"{row['parts_ms'][part]['p50']:.3f}" if part in row["parts_ms"] else "" for part in parts]
            table.add_row(row["name"], *figures, f"{ratio:.2f}x")
        unstable = [row["name"] for row in rows if not row["warmup"]["stable"]]
        note = (
            f"the warm-up of {', '.join(unstable)} did not become stable: the machine is busy, or the policy is slow"
            if unstable
            else ""
        )
        result = result_of("latency", rows, self.threads)
        if (during := monitor.summarise(board.readings())) is not None:
            result, note = result | {"board": during}, f"{monitor.format_summary(during)}; {note}".rstrip("; ")
        self.finish(result, table, note or "milliseconds; all trials are kept in --out")


@dataclass(frozen=True, kw_only=True)
class MeasureMemory(ArtifactOptions):
    """Measure the bytes that the runtime loads, by graph, and the memory of new processes that run the policy."""

    repeats: int = 3
    """processes of each artifact"""

    def run(self) -> None:
        opened = self.open_artifacts()
        if self.repeats < 1:
            raise UserError(f"expected at least one process of each, found --repeats {self.repeats}; increase it")
        rows = []
        with progress("processes", len(opened) * self.repeats) as advance:
            for named in opened:
                runs = []
                for _ in range(self.repeats):
                    runs.append(memory.measure(named.artifact.path, self.threads))
                    advance(1)
                rows.append(facts(named) | memory.row(runs))
        table = Table("policy", "MB to load", "ratio", "of it", "own pss", "anonymous", "mapped", "peak", "page cache")
        shared = machine.unified_memory()
        if shared:
            table.add_column("system")
        for row in rows:
            measured = row["memory"]
            own, (low, high) = measured["own"], measured["own_range"]["pss"]
            graphs = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in row["graph_bytes"].items())
            figures = (own["anonymous"], own["file"], own["peak"], measured["page_cache"], *[own["used"]] * shared)
            table.add_row(
                row["name"],
                f"{row['bytes'] / 1e6:.3f}",
                f"{rows[0]['bytes'] / row['bytes']:.2f}x",
                graphs,
                f"{own['pss'] / 1e6:.1f} ({low / 1e6:.1f} to {high / 1e6:.1f})",
                *(f"{size / 1e6:.1f}" for size in figures),
            )
        note = (
            "MB of 1e6 bytes; unquantized policies count as bf16; own: beyond a process that has imported the runtime; "
            "page cache: the graphs' files, which belong to no process"
        )
        self.finish(result_of("memory", rows, self.threads), table, note)


@dataclass(frozen=True, kw_only=True)
class MeasureSuccess(ArtifactOptions):
    """Play episodes on the simulator, the same scenes for every artifact; an interrupted run can be continued."""

    tasks: tuple[str, ...] = ()
    """Meta-World tasks to play (default: all, with the shared scenes)"""
    env: tuple[str, ...] = ()
    """instead of --tasks: environments to play, as metaworld:TASK, gym:ID or libero:SUITE/NUMBER"""
    env_mapping: Path | None = None
    """TOML file that maps the environments' values to the policy's, for gym:ID"""
    episodes_per_task: int = 50
    """episodes of every task or environment, from the first seed of the evaluation range on; without --tasks and --env,
    twice as many of a task that has no shared variant"""
    workers: int = 2
    """processes that play episodes"""
    out: Path | None = None
    """result file to write; finished episodes are kept next to it until all are played"""

    def run(self) -> None:
        opened = self.open_artifacts()
        scenes = self._scenes(opened)
        rows = play_episodes(opened, scenes, self.workers, self.threads, self.out)
        compared = [success.compare(row, rows[0]) for row in rows[1:]]
        table = Table("policy", *(row["name"] for row in rows))
        for task in scenes.episodes:
            table.add_row(task, *(_rate(row["per_task"][task]) for row in rows), style="dim")
        table.add_section()
        table.add_row("hard tasks", *(_rate(row["hard"]) for row in rows))
        table.add_row("all", *(_rate(row) for row in rows), style="bold")
        note = "; ".join(
            f"{pair['name']} - {pair['baseline']}: {pair['difference']:+.3f}, one-sided 95 % lower limit "
            f"{pair['lower_limit']:+.3f}, McNemar p {pair['mcnemar_p']:.3f}"
            for pair in compared
        )
        self.finish(result_of("success", rows, self.threads) | {"comparisons": compared}, table, note)
        forget_episodes(self.out)

    def _scenes(self, opened: Sequence[NamedArtifact]) -> success.Scenes:
        if self.env and self.tasks:
            raise UserError("expected --tasks or --env, found both; pass Meta-World tasks as --env metaworld:TASK")
        if self.env:
            return success.environment_scenes(self.env, opened, self.episodes_per_task, self.env_mapping)
        if self.env_mapping is not None:
            raise UserError("expected --env with --env-mapping, found no --env; add the environment")
        return success.scenes(self.tasks, self.episodes_per_task)


def time_inferences(opened: Sequence[NamedArtifact], trials: int, threads: int) -> dict[str, latency.Trials]:
    from rlrc.runtime.inference.policy import LocalPolicy

    policies = {named.name: LocalPolicy.load(named.artifact.path, threads) for named in opened}
    observations = {named.name: latency.observations(named.artifact) for named in opened}
    whole_blocks = math.ceil(trials / latency.BLOCK) * latency.BLOCK
    with progress("inferences", whole_blocks * len(opened)) as advance:
        return latency.measure(policies, observations, trials, tick=advance)


def play_episodes(
    opened: Sequence[NamedArtifact], scenes: success.Scenes, workers: int, threads: int, out: Path | None
) -> list[dict[str, Any]]:
    """A row for every artifact. Finished episodes are kept next to ``out``."""
    total = len(opened) * sum(scenes.episodes.values())
    with progress("episodes", total) as advance:
        played = success.measure(opened, scenes, workers, threads, out and _partial(out), advance)
    return [facts(named) | success.row(played[named.name], scenes, success.hard_tasks(scenes)) for named in opened]


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial.jsonl")


def forget_episodes(out: Path | None) -> None:
    """Delete the episodes kept next to ``out``, after the result is written."""
    if out is not None:
        _partial(out).unlink(missing_ok=True)


def _rate(row: dict[str, Any]) -> str:
    if row["success"] is None:
        return "\u2013"
    low, high = row["interval"]
    return f"{row['success']:.3f} [{low:.3f}, {high:.3f}]"
