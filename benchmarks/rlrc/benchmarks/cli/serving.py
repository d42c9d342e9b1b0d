"""The command that measures what serving costs beyond inference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from rlrc.benchmarks.cli.output import finish, progress, result_of
from rlrc.benchmarks.control import transport
from rlrc.benchmarks.results import machine
from rlrc.benchmarks.results.results import check_out
from rlrc.errors import UserError


@dataclass(frozen=True)
class Serving:
    """Compare `rlrc serve` with a minimal server on the same libraries. Needs no artifact."""

    cameras: int = 2
    """pictures of an observation"""
    size: int = 224
    """their height and width"""
    calls: int = 2000
    """of each way"""
    out: Path | None = None
    """result file to write"""
    force: bool = False
    """replace it"""
    json: bool = False
    """print the result as JSON instead"""

    def run(self) -> None:
        check_out(self.out, self.force)
        if not (self.cameras > 0 and 0 < self.size <= 2048 and self.calls > 0):
            raise UserError("expected cameras, a size of up to 2048 and calls above 0, found others; change them")
        with progress("calls", self.calls) as advance:
            rows = list(transport.measure((self.size, self.size), self.cameras, self.calls, advance))
        for row in rows:
            row["command"] = machine.command()
        finish(self, result_of("serving", rows, 1), table(rows), "milliseconds beyond inference")


def table(rows: list[dict[str, Any]]) -> Table:
    found = Table("way", "p50", "p90", "p99", "max")
    for row in rows:
        found.add_row(row["name"], *(f"{value:.3f}" for value in row["overhead_ms"].values()))
    return found
