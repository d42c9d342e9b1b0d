"""The command that checks all claims about one artifact."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from rlrc.benchmarks.claims import claims
from rlrc.benchmarks.cli.measure import forget_episodes, play_episodes, time_inferences
from rlrc.benchmarks.cli.output import ResultOptions, result_of, stages
from rlrc.benchmarks.measure import latency, success
from rlrc.benchmarks.results.results import NamedArtifact, facts, open_artifacts, read
from rlrc.errors import UserError
from rlrc.tables import print_table


@dataclass(frozen=True, kw_only=True)
class Claims(ResultOptions):
    """Check memory, latency and success of one artifact against its dense parent; exit code 1 unless all hold."""

    artifact: Positional[str | None] = None
    """the compressed artifact, as FOLDER or NAME=FOLDER"""
    baseline: str | None = None
    """its dense parent"""
    geometry: Literal["openvla-7b", "openvla-oft-7b", "pi0", "smolvla-450m"] | None = None
    """instead of artifacts: a policy of this size with random weights, dense in 16 bits against 90 % pruned in 4 bits,
    also against torch in the faster of float32 and bfloat16; the artifacts are created, measured and deleted. Latency
    and memory only"""
    runtime: Literal["gguf", "onnxruntime"] | None = None
    """of --geometry (default: gguf if llama.cpp supports the policy)"""
    rounds: int = 8
    """of --geometry: actions of each policy, interleaved"""
    torch: bool = True
    """of --geometry: also compare with torch"""
    work: Path | None = None
    """of --geometry: folder for the temporary graphs (default: the system's temporary folder)"""
    success: tuple[Path, ...] = ()
    """result files of `rlrc bench success` with both artifacts"""
    episodes_per_task: int = 0
    """instead of --success: play this many episodes of every task with both artifacts"""
    trials: int = 600
    """inferences of each, after the warm-up"""
    threads: int = 1
    """threads of the engine"""
    workers: int = 2
    """processes that play episodes"""
    thresholds: Path | None = None
    """TOML file with thresholds (default: those of the paper)"""

    def run(self) -> int:
        self.check_out()
        limits = claims.thresholds(self.thresholds)
        if self.geometry is not None:
            return self._full_size(limits)
        if self.artifact is None or self.baseline is None:
            found = "neither" if self.artifact is None and self.baseline is None else "one of them"
            raise UserError(f"expected an artifact and --baseline, or --geometry, found {found}; add what is missing")
        baseline, compressed = opened = open_artifacts([self.baseline, self.artifact])
        manifest, baseline_manifest = compressed.artifact.manifest, baseline.artifact.manifest
        claims.check_comparable(manifest, baseline_manifest)
        claims.check_same_tasks(compressed.artifact, baseline.artifact)
        rows = {named.name: facts(named) for named in opened}
        played = self._success(opened)
        trials = time_inferences(opened, self.trials, self.threads)
        for named in opened:
            rows[named.name] |= latency.row(trials[named.name]) | (played[named.name] or {})
        checks = [
            claims.memory(manifest, baseline_manifest, limits),
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
        table = table_of(checks)
        point = result["operating_point"]
        cut = ", ".join(f"{key.replace('_', ' ')} {value:.1%}" for key, value in point["pruned"].items())
        note = (
            f"operating point: {compressed.name} ({point['compressed']['precision']}) against {baseline.name} "
            f"({point['baseline']['precision']}), {self.threads} thread(s); cut: {cut}"
        )
        self.finish(result, table, note)
        forget_episodes(self.out)
        return 0 if passed else 1

    def _full_size(self, limits: claims.Thresholds) -> int:
        from rlrc.benchmarks.claims import full_size
        from rlrc.benchmarks.claims.operating_points import point

        if self.artifact or self.baseline or self.success or self.episodes_per_task:
            raise UserError("expected --geometry alone, found artifacts or success as well; remove one or the other")
        if self.rounds < 2:
            raise UserError(f"expected two or more rounds, found {self.rounds}; increase --rounds")
        assert self.geometry is not None
        chosen = point(self.geometry, self.runtime)
        if self.work is not None and not self.work.is_dir():
            raise UserError(f"expected a folder for the graphs, found none at {self.work}; create it, or omit --work")
        with tempfile.TemporaryDirectory(dir=self.work, prefix="rlrc-claims-") as folder, stages(self.geometry) as step:
            result = full_size.run(chosen, Path(folder), self.threads, self.rounds, self.torch, limits, step)
        note = (
            f"operating point: {result['compressed']['precision']} against {result['dense']['precision']} on "
            f"{chosen.runtime}, {self.threads} thread(s), random weights: success is not measured"
        )
        self.finish(result, table_of([claims.ClaimCheck(**check) for check in result["checks"]]), note)
        if not self.json:
            print_table(parts_table(result), Console())
        return 0 if result["verdict"] == "PASS" else 1

    def _success(self, opened: Sequence[NamedArtifact]) -> dict[str, dict[str, Any] | None]:
        if self.success and self.episodes_per_task:
            raise UserError("expected --success or --episodes-per-task, found both; remove one")
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


def table_of(checks: Sequence[claims.ClaimCheck]) -> Table:
    table = Table("claim", "verdict", "measured", "lower limit", "needed", "")
    for check in checks:
        style = {"PASS": "green", "FAIL": "red"}.get(check.verdict, "yellow")
        figures = [claims.figure(check, number) for number in (check.value, check.limit, check.threshold)]
        table.add_row(check.claim, f"[{style}]{check.verdict}[/]", *figures, check.reason)
    return table


def parts_table(result: dict[str, Any]) -> Table:
    """Milliseconds of every part, and how close they are to the limits of bandwidth and products."""
    peaks = result["roofline"]
    rates = ", ".join(f"{kind} {rate:,.0f}" for kind, rate in peaks["products_gop_s"].items())
    title = f"limits: {peaks['read_gb_s']} GB/s read, products in Gop/s: {rates}"
    table = Table("policy", "part", "ms", "limit ms", "share", "bound by", title=title)
    for name in ("dense", "compressed", "torch", "elsewhere"):
        for part, entry in result.get(name, {}).get("roofline", {}).items():
            figures = (f"{entry['measured_ms']:,.1f}", f"{entry['limit_ms']:,.1f}", f"{entry['share']:.0%}")
            where = f" on {result['elsewhere']['runtime']}" if name == "elsewhere" else ""
            table.add_row(f"compressed{where}" if where else name, part, *figures, entry["bound"])
    return table
