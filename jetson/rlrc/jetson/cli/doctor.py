"""The command doctor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from tyro.conf import Positional

from rlrc.benchmarks.results import machine
from rlrc.benchmarks.results.results import check_out, dump, write
from rlrc.errors import UserError
from rlrc.jetson.board import doctor, doctor_live, trial
from rlrc.jetson.board.doctor import Finding
from rlrc.tables import plain_console

MARKS = {"ok": ("ok", "green"), "advice": ("ok?", "yellow"), "fix": ("FIX", "red"), "none": ("-", "dim")}


@dataclass(frozen=True)
class Doctor:
    """Check this board: one line for each finding, with what to do; exit code 1 if something has to be fixed.

    With an artifact, also run its golden observations through each engine that is here, and a short benchmark.
    """

    path: Positional[Path | None] = None
    """the artifact to try"""
    trials: int = 100
    """inferences of each engine"""
    threads: int = 1
    """threads of the engines"""
    root: Path = Path("/")
    """check the files below this folder instead, such as those of a mounted card; engines are not tried then"""
    out: Path | None = None
    """file for all results as JSON; with an artifact, rlrc report reads it"""
    force: bool = False
    """replace that file"""
    json: bool = False
    """print everything as JSON"""

    def run(self) -> int:
        check_out(self.out, self.force)
        here = self.root == Path("/")
        if not self.root.is_dir():
            raise UserError(f"expected a folder with a board's files, found none at {self.root}; give another --root")
        if self.path is not None and not here:
            raise UserError("expected an artifact or --root, found both; an artifact is tried on this machine")
        if self.trials < 1:
            raise UserError(f"expected at least one inference, found --trials {self.trials}; give 1 or more")
        findings = doctor.examine(self.root) + (doctor_live.examine() if here else [])
        result: dict[str, Any] = {"kind": "doctor", "command": machine.command(), "machine": machine.describe()}
        if self.path is not None:
            tried, result = trial.try_out(self.path, self.trials, self.threads)
            findings += tried
        result |= {"findings": [asdict(finding) for finding in findings]}
        if self.out:
            write(self.out, dump(result))
        if self.json:
            print(json.dumps(result))
        else:
            print_findings(findings, plain_console())
            for line in trial.lines(result) if self.path else []:
                plain_console().print(line)
        return 1 if any(finding.state == "fix" for finding in findings) else 0


def print_findings(findings: Sequence[Finding], console: Console) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark, style = MARKS[finding.state]
        todo = f"; {finding.todo}" if finding.todo else ""
        console.print(Text(f"{mark:<4}", style), f"{finding.name:<{width}}  {finding.found}{todo}", sep="")
