"""The command that measures the overhead of serving beyond inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.table import Table

from rlrc.benchmarks.cli.output import ResultOptions, progress, result_of
from rlrc.benchmarks.control import transport
from rlrc.benchmarks.results import machine
from rlrc.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Serving(ResultOptions):
    """Measure the overhead of serving, compared with a minimal server on the same libraries; no artifact needed."""

    cameras: int = 2
    """images of an observation"""
    size: int = 224
    """height and width of the images, in pixels"""
    calls: int = 2000
    """calls of each server"""

    def run(self) -> None:
        self.check_out()
        if not (self.cameras > 0 and 0 < self.size <= 2048 and self.calls > 0):
            raise UserError(
                f"expected cameras and calls above 0 and a size from 1 to 2048, found {self.cameras}, {self.calls} and "
                f"{self.size}; change --cameras, --calls or --size"
            )
        with progress("calls", self.calls) as advance:
            rows = list(transport.measure((self.size, self.size), self.cameras, self.calls, advance))
        for row in rows:
            row["command"] = machine.command()
        self.finish(result_of("serving", rows, 1), table(rows), "milliseconds beyond inference")


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table("server", "p50", "p90", "p99", "max")
    for row in rows:
        result.add_row(row["name"], *(f"{value:.3f}" for value in row["overhead_ms"].values()))
    return result
