"""The command that checks the latency benchmark itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table
from tyro.conf import Positional

from rlrc.benchmarks.cli.output import finish, progress, result_of
from rlrc.benchmarks.measure import latency, selfcheck
from rlrc.benchmarks.results.results import check_out, facts, open_artifacts


@dataclass(frozen=True)
class SelfCheck:
    """Whether `rlrc bench latency` tells an artifact from itself on this machine, and from itself 10 % slower.

    Exit code 1 unless it finds no difference in the first case, and one in the second.
    """

    artifact: Positional[str]
    """an artifact, as FOLDER or NAME=FOLDER"""
    trials: int = 300
    """inferences of each, after the warm-up"""
    threads: int = 1
    """threads of the engine"""
    out: Path | None = None
    """result file to write"""
    force: bool = False
    """replace the result file"""
    json: bool = False
    """print the result as JSON instead"""

    def run(self) -> int:
        from rlrc.runtime.inference.policy import LocalPolicy

        check_out(self.out, self.force)
        (named,) = open_artifacts([self.artifact])

        def opened() -> LocalPolicy:
            return LocalPolicy.load(named.artifact.path, self.threads)

        with progress("inferences", 3 * self.trials) as advance:
            found = selfcheck.findings(opened, latency.observations(named.artifact), self.trials, advance)
        table = Table("check", "verdict", "time ratio", "95 % interval", "found", "needed")
        for finding in found:
            style = "green" if finding.verdict == "PASS" else "red"
            figures = (f"{finding.ratio:.3f}", f"{finding.interval[0]:.3f} to {finding.interval[1]:.3f}")
            table.add_row(finding.what, f"[{style}]{finding.verdict}[/]", *figures, finding.said, finding.wanted)
        result = result_of("self-check", [facts(named)], self.threads)
        result["checks"] = [asdict(finding) for finding in found]
        finish(self, result, table, "ratios of medians, in alternating blocks of one run")
        return 0 if all(finding.verdict == "PASS" for finding in found) else 1
