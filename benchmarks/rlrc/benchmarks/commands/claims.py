"""The command that checks all claims about one artifact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from tyro.conf import Positional

from rlrc.benchmarks import claims, latency, success
from rlrc.benchmarks.commands.measure import forget_episodes, play_episodes, time_inferences
from rlrc.benchmarks.commands.output import finish, result_of
from rlrc.benchmarks.results import Named, check_out, facts, open_artifacts, read
from rlrc.errors import UserError


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
    """instead of --success: play this many episodes of every task with both, as rlrc bench success does"""
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
        trials = time_inferences(opened, self.trials, self.threads)
        for named in opened:
            rows[named.name] |= latency.row(trials[named.name]) | (played[named.name] or {})
        checks = [
            claims.memory(ours, theirs, limits),
            claims.latency(trials[compressed.name], trials[baseline.name], limits),
            claims.success(played[compressed.name], played[baseline.name], limits),
        ]
        result = result_of("claims", list(rows.values()), self.threads)
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
        finish(self, result, table, note)
        forget_episodes(self.out)
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
            return {row["name"]: row for row in play_episodes(opened, scenes, self.workers, self.threads, self.out)}
        return {named.name: None for named in opened}
