"""The commands that measure and report. A dataclass each; the field docstrings are the help."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tyro.conf import Positional

from rlrc.benchmarks import claims, latency, machine, memory, success
from rlrc.benchmarks.results import Named, check_out, dump, facts, join, open_artifacts, read, write
from rlrc.errors import UserError


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one inference, in total and by part; several artifacts in one interleaved run."""

    artifacts: Positional[tuple[str, ...]]
    """artifacts, as FOLDER or NAME=FOLDER"""
    baseline: str | None = None
    """what ratios are taken against (default: the first artifact)"""
    trials: int = 500
    """inferences of each, after the warm-up"""
    threads: int = 1
    """threads of the engine"""
    out: Path | None = None
    """result file to write"""
    force: bool = False
    """replace the result file"""
    json: bool = False
    """print the result as JSON instead"""

    def run(self) -> None:
        check_out(self.out, self.force)
        opened = _opened(self.artifacts, self.baseline)
        trials = _timed(opened, self.trials, self.threads)
        rows = [facts(named) | latency.row(trials[named.name]) for named in opened]
        table = Table("policy", "p50", "p90", "p99", *(f"{part} p50" for part in latency.PARTS), "ratio")
        for row in rows:
            ratio = rows[0]["latency_ms"]["p50"] / row["latency_ms"]["p50"]
            figures = [*row["latency_ms"].values(), *(row["parts_ms"][part]["p50"] for part in latency.PARTS)]
            table.add_row(row["name"], *(f"{figure:.3f}" for figure in figures), f"{ratio:.2f}x")
        unstable = [row["name"] for row in rows if not row["warmup"]["stable"]]
        note = f"the warm-up of {', '.join(unstable)} never became stable: the machine is busy" if unstable else ""
        _finish(
            self, _result("latency", rows, self.threads), table, note or "milliseconds; all trials are kept in --out"
        )


@dataclass(frozen=True)
class Memory:
    """Bytes that the runtime loads, and the memory of a fresh process that runs the policy."""

    artifacts: Positional[tuple[str, ...]]
    """artifacts, as FOLDER or NAME=FOLDER"""
    baseline: str | None = None
    """what ratios are taken against (default: the first artifact)"""
    threads: int = 1
    """threads of the engine"""
    out: Path | None = None
    """result file to write"""
    force: bool = False
    """replace the result file"""
    json: bool = False
    """print the result as JSON instead"""

    def run(self) -> None:
        check_out(self.out, self.force)
        opened = _opened(self.artifacts, self.baseline)
        rows = [facts(named) | memory.row(memory.measure(named.artifact.path, self.threads)) for named in opened]
        table = Table(
            "policy", "parameters", "MB to load", "ratio", "graph files", "own pss", "own peak", "whole process"
        )
        for row in rows:
            own, running = row["memory"]["own"], row["memory"]["running"]
            sizes = (row["file_bytes"], own["pss"], own["peak"], running["pss"])
            ratio = rows[0]["bytes"] / row["bytes"]
            table.add_row(
                row["name"],
                f"{row['parameters']:,}",
                f"{row['bytes'] / 1e6:.3f}",
                f"{ratio:.2f}x",
                *(f"{size / 1e6:.1f}" for size in sizes),
            )
        note = (
            "MB of 1e6 bytes; what is not quantized counts as bf16; own: beyond a process that has imported the runtime"
        )
        _finish(self, _result("memory", rows, self.threads), table, note)


@dataclass(frozen=True)
class Success:
    """Closed-loop episodes on the simulator, the same scenes for every artifact; an interrupted run continues."""

    artifacts: Positional[tuple[str, ...]]
    """artifacts, as FOLDER or NAME=FOLDER"""
    baseline: str | None = None
    """what the others are compared with, scene by scene (default: the first artifact)"""
    tasks: tuple[str, ...] = ()
    """tasks to play (default: all, with the shared scenes)"""
    episodes_per_task: int = 50
    """episodes of every task, from the first seed of the evaluation range on"""
    workers: int = 2
    """processes"""
    threads: int = 1
    """threads of the engine in each process"""
    out: Path | None = None
    """result file to write; episodes are kept beside it until all are played"""
    force: bool = False
    """replace the result file"""
    json: bool = False
    """print the result as JSON instead"""

    def run(self) -> None:
        check_out(self.out, self.force)
        opened = _opened(self.artifacts, self.baseline)
        scenes = success.scenes(self.tasks, self.episodes_per_task)
        rows = _played(opened, scenes, self.workers, self.threads, self.out)
        compared = [success.compare(row, rows[0]) for row in rows[1:]]
        table = Table("policy", *(row["name"] for row in rows))
        for task in scenes.tasks:
            table.add_row(task, *(_rate(row["per_task"][task]) for row in rows), style="dim")
        table.add_section()
        table.add_row("hard tasks", *(_rate(row["hard"]) for row in rows))
        table.add_row("all", *(_rate(row) for row in rows), style="bold")
        note = "; ".join(
            f"{pair['name']} - {pair['baseline']}: {pair['difference']:+.3f}, one-sided 95 % lower limit "
            f"{pair['lower_limit']:+.3f}, McNemar p {pair['mcnemar_p']:.3f}"
            for pair in compared
        )
        _finish(self, _result("success", rows, self.threads) | {"comparisons": compared}, table, note)
        _forget(self.out)


@dataclass(frozen=True)
class Claims:
    """Memory, latency and success of one artifact against its dense parent, at once; exit code 1 unless all hold."""

    artifact: Positional[str]
    """the compressed artifact, as FOLDER or NAME=FOLDER"""
    baseline: str
    """its dense parent"""
    success: tuple[Path, ...] = ()
    """result files of `rlrc bench success` with both artifacts"""
    episodes_per_task: int = 0
    """instead of --success: play this many episodes of every task with both"""
    trials: int = 600
    """inferences of each, after the warm-up"""
    threads: int = 1
    """threads of the engine"""
    workers: int = 2
    """processes that play episodes"""
    thresholds: Path | None = None
    """TOML file with other thresholds than those of the paper"""
    out: Path | None = None
    """result file to write"""
    force: bool = False
    """replace the result file"""
    json: bool = False
    """print the result as JSON instead"""

    def run(self) -> int:
        check_out(self.out, self.force)
        limits = claims.thresholds(self.thresholds)
        baseline, compressed = opened = open_artifacts([self.baseline, self.artifact])
        ours, theirs = compressed.artifact.manifest, baseline.artifact.manifest
        claims.check_comparable(ours, theirs)
        rows = {named.name: facts(named) for named in opened}
        played = self._success(opened)
        trials = _timed(opened, self.trials, self.threads)
        for named in opened:
            rows[named.name] |= latency.row(trials[named.name]) | (played[named.name] or {})
        checks = [
            claims.memory(ours, theirs, limits),
            claims.latency(trials[compressed.name], trials[baseline.name], limits),
            claims.success(played[compressed.name], played[baseline.name], limits),
        ]
        result = _result("claims", list(rows.values()), self.threads)
        result["operating_point"] = claims.operating_point(
            compressed, baseline, self.threads, result["machine"]["versions"]
        )
        result |= {"thresholds": asdict(limits), "checks": [asdict(check) for check in checks]}
        passed = all(check.verdict == "PASS" for check in checks)
        result["verdict"] = "PASS" if passed else "FAIL"
        table = Table("claim", "verdict", "measured", "lower limit", "needed", "")
        for check in checks:
            style = {"PASS": "green", "FAIL": "red"}.get(check.verdict, "yellow")
            figures = [claims.figure(check, number) for number in (check.value, check.limit, check.threshold)]
            table.add_row(check.claim, f"[{style}]{check.verdict}[/]", *figures, check.reason)
        point = result["operating_point"]
        cut = ", ".join(f"{key.replace('_', ' ')} {value:.1%}" for key, value in point["pruned"].items())
        note = (
            f"operating point: {compressed.name} ({point['compressed']['precision']}) against {baseline.name} "
            f"({point['baseline']['precision']}), {self.threads} thread(s); cut: {cut}"
        )
        _finish(self, result, table, note)
        _forget(self.out)
        return 0 if passed else 1

    def _success(self, opened: Sequence[Named]) -> dict[str, dict[str, Any] | None]:
        if self.success and self.episodes_per_task:
            raise UserError("expected --success or --episodes-per-task, found both; leave one out")
        if self.success:
            results = [read(path) for path in self.success]
            rows = {named.name: claims.find_success(results, named) for named in opened}
            if missing := [name for name, row in rows.items() if row is None]:
                raise UserError(
                    f"expected success of {' and '.join(missing)} in {', '.join(map(str, self.success))}, found none "
                    "of exactly that artifact; run: rlrc bench success"
                )
            return rows
        if self.episodes_per_task:
            scenes = success.scenes((), self.episodes_per_task)
            return {row["name"]: row for row in _played(opened, scenes, self.workers, self.threads, self.out)}
        return {named.name: None for named in opened}


@dataclass(frozen=True)
class Report:
    """Results, training curves and a film strip as one HTML page that needs nothing else."""

    results: Positional[tuple[str, ...]]
    """result files (.json) and training curves (.jsonl, or NAME=FILE.jsonl)"""
    out: Path = Path("report.html")
    """page to write"""
    before: str | None = None
    """artifact of the upper film strip, such as pruned=FOLDER"""
    after: str | None = None
    """artifact of the lower film strip, such as compressed=FOLDER"""
    task: str = "drawer-open-v3"
    """task of the film strips"""
    scenes: int = 20
    """scenes to try for one in which only `after` succeeds"""
    joined: Path | None = None
    """also write all rows, joined by name, as one result file"""
    picture: Path | None = None
    """also write the table as a picture (.svg or .png)"""
    beside: Path | None = None
    """a joined result file of an earlier time, whose figures are printed beside these"""
    force: bool = False
    """replace the page"""

    def run(self) -> None:
        from rlrc.benchmarks import report

        check_out(self.out, self.force)
        check_out(self.joined, self.force)
        check_out(self.picture, self.force)
        if self.picture and self.picture.suffix not in (".svg", ".png"):
            raise UserError(f"expected a picture that ends in .svg or .png, found {self.picture}; rename it")
        if (self.before is None) != (self.after is None):
            raise UserError("expected --before and --after, found one of them; a film strip compares two artifacts")
        curve_files = [argument for argument in self.results if argument.endswith(".jsonl")]
        files = [Path(argument) for argument in self.results if not argument.endswith(".jsonl")]
        if not files:
            raise UserError("expected result files, found none; pass files written by rlrc bench ... --out")
        results = [read(path) for path in files]
        earlier = read(self.beside) if self.beside else None
        joined = join(results) if self.joined or self.beside else {}
        curves = report.read_curves(curve_files)
        film = self._film() if self.before and self.after else None
        write(self.out, report.page(results, curves, film))
        if self.joined:
            write(self.joined, dump(joined))
        if self.picture:
            report.table_picture(results, self.picture)
        if earlier is not None:
            Console().print(_side_by_side(joined["rows"], earlier["rows"]))
        print(f"{self.out}: {self.out.stat().st_size / 1e6:.2f} MB; open it in a browser")

    def _film(self) -> Any:
        from rlrc.benchmarks import report
        from rlrc.benchmarks.film import before_and_after
        from rlrc.envs.metaworld import HORIZON, make
        from rlrc.envs.seeds import EVALUATION
        from rlrc.runtime.policy import LocalPolicy

        if not 1 <= self.scenes <= len(EVALUATION):
            raise UserError(f"expected 1 to {len(EVALUATION)} scenes, found {self.scenes}; change --scenes")
        before, after = opened = open_artifacts([named for named in (self.before, self.after) if named])
        size = before.artifact.manifest.policy.cameras[0].height
        policies = {named.name: LocalPolicy.load(named.artifact.path) for named in opened}
        strips, caption = before_and_after(
            (before.name, policies[before.name]),
            (after.name, policies[after.name]),
            make(self.task, size),
            EVALUATION[: self.scenes],
            HORIZON,
        )
        return report.Film(strips, self.task, caption)


def _side_by_side(here: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]]) -> Table:
    """The rows of two joined results, each figure as "here (earlier)"."""

    def figures(row: dict[str, Any] | None) -> list[str]:
        if row is None:
            return ["\u2013"] * 5
        success = f"{row['success']:.3f}" if row.get("success") is not None else "\u2013"
        latency_ms = f"{row['latency_ms']['p50']:.2f}" if "latency_ms" in row else "\u2013"
        size, minutes = f"{row['bytes'] / 1e6:.2f}", f"{row['cpu_minutes']:.1f}"
        return [size, latency_ms, success, str(row.get("episodes", "\u2013")), minutes]

    table = Table("policy", "MB", "p50 ms", "success", "episodes", "CPU-minutes", title="here (full budget, committed)")
    committed = {row["name"]: row for row in earlier}
    for row in here:
        pairs = zip(figures(row), figures(committed.get(row["name"])), strict=True)
        table.add_row(row["name"], *(f"{ours} ({theirs})" for ours, theirs in pairs))
    return table


def _opened(artifacts: Sequence[str], baseline: str | None) -> list[Named]:
    """The artifacts, the baseline first."""
    return open_artifacts([*([baseline] if baseline else []), *artifacts])


def _timed(opened: Sequence[Named], trials: int, threads: int) -> dict[str, latency.Trials]:
    from rlrc.runtime.policy import LocalPolicy

    policies = {named.name: LocalPolicy.load(named.artifact.path, threads) for named in opened}
    observations = {named.name: latency.observations(named.artifact) for named in opened}
    with _progress("inferences", trials * len(opened)) as advance:
        return latency.measure(policies, observations, trials, tick=advance)


def _played(
    opened: Sequence[Named], scenes: success.Scenes, workers: int, threads: int, out: Path | None
) -> list[dict[str, Any]]:
    """A row for every artifact. Episodes are kept beside ``out`` as they are played."""
    from rlrc.envs.metaworld import TASKS

    hard = [name for name, task in TASKS.items() if task.hard]
    total = len(opened) * len(scenes.tasks) * scenes.per_task
    with _progress("episodes", total) as advance:
        played = success.measure(opened, scenes, workers, threads, out and _partial(out), advance)
    return [facts(named) | success.row(played[named.name], scenes, hard) for named in opened]


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial.jsonl")


def _forget(out: Path | None) -> None:
    """The result is written: its episodes need not be kept any more."""
    if out is not None:
        _partial(out).unlink(missing_ok=True)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda more: progress.advance(task, more)


def _result(kind: str, rows: list[dict[str, Any]], threads: int) -> dict[str, Any]:
    return {"kind": kind, "command": machine.command(), "machine": machine.describe(threads), "rows": rows}


def _finish(command: Latency | Memory | Success | Claims, result: dict[str, Any], table: Table, note: str) -> None:
    if command.out:
        write(command.out, dump(result))
    if command.json:
        print(json.dumps(result))
        return
    console = Console()
    console.print(table)
    if note:
        console.print(note, soft_wrap=True)
    if command.out:
        console.print(f"next: rlrc report {command.out} --out report.html", soft_wrap=True)


def _rate(row: dict[str, Any]) -> str:
    if row["success"] is None:
        return "\u2013"
    low, high = row["interval"]
    return f"{row['success']:.3f} [{low:.3f}, {high:.3f}]"
