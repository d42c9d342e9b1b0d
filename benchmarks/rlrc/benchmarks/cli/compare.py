"""The command that compares results with earlier ones."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from rlrc.benchmarks.claims import regression
from rlrc.benchmarks.claims.regression import FigureChange
from rlrc.benchmarks.results.results import read
from rlrc.errors import UserError
from rlrc.tables import print_table

STYLES = {"REGRESSION": "red", "MISSING": "red", "unclear": "yellow", "better": "green"}


@dataclass(frozen=True)
class Compare:
    """Compare latency, memory, energy, throughput and success with earlier results; exit code 1 for a regression.

    A figure has regressed if it is worse by more than the tolerance and its noise, or missing. Both results must come
    from the same class of machine.
    """

    old: Positional[Path]
    """earlier result file, such as a committed one"""
    new: Positional[Path]
    """result file to compare with it"""
    tolerance: str = "10%"
    """how much worse a figure may be, such as 10% or 0.1"""
    success_margin: float = regression.MARGIN
    """how much lower a success rate may be"""
    json: bool = False
    """print the changes as JSON instead"""

    def run(self) -> int:
        tolerance = fraction(self.tolerance)
        if not 0 <= self.success_margin < 1:
            raise UserError(f"expected a --success-margin from 0 to 1, found {self.success_margin:g}; such as 0.03")
        old, new = read(self.old), read(self.new)
        changes = regression.compare_results(old, new, tolerance, self.success_margin)
        if not changes:
            raise UserError(
                f"expected figures to compare in {self.old}, found none; pass files of rlrc bench ... --out"
            )
        failed = [change for change in changes if change.verdict in ("REGRESSION", "MISSING")]
        if self.json:
            print(json.dumps({"verdict": "FAIL" if failed else "PASS", "changes": [asdict(one) for one in changes]}))
            return 1 if failed else 0
        table = Table("policy", "figure", "old", "new", "worse by", "95 %", "")
        for change in changes:
            style = STYLES.get(change.verdict, "")
            verdict = f"[{style}]{change.verdict}[/]" if style else change.verdict
            unit = f", {change.unit}" if change.unit else ""
            table.add_row(change.name, f"{change.figure}{unit}", *cells(change), verdict)
        console = Console()
        print_table(table, console)
        versions = [(result.get("machine") or {}).get("versions") or {} for result in (old, new)]
        for name in sorted(versions[0].keys() | versions[1].keys()):
            before, after = (version.get(name, "none") for version in versions)
            if before != after:
                console.print(f"{name}: {before} before, {after} now")
        summary = ", ".join(f"{change.figure} of {change.name}" for change in failed) or "no regressions"
        console.print(f"{'FAIL' if failed else 'PASS'}: {summary}", soft_wrap=True)
        return 1 if failed else 0


def cells(change: FigureChange) -> list[str]:
    """Old, new, how much worse, and the 95 % limits of that."""
    values = [number(value) for value in (change.old, change.new)]
    if change.change is None:
        return [*values, "", ""]
    if change.figure == "success":
        worse = [f"{-value:+.3f}" for value in (change.change.value, change.change.high, change.change.low)]
    else:
        worse = [f"{value - 1:+.1%}" for value in (change.change.value, change.change.low, change.change.high)]
    return [*values, worse[0], f"{worse[1]} to {worse[2]}"]


def number(value: float | None) -> str:
    if value is None:
        return "\u2013"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def fraction(text: str) -> float:
    """ "10%" or "0.1" -> 0.1. Raises UserError for anything else or a value outside [0, 10)."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = float("nan")
    if not (isfinite(value) and 0 <= value < 10):
        raise UserError(f"expected a share such as 10% or 0.1, found {text!r}; change --tolerance")
    return value
