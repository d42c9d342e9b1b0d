"""The command that measures the control loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib import pyplot
from rich.table import Table
from tyro.conf import Positional

from rlrc.benchmarks.cli.output import OutputOptions, plain_progress, result_of
from rlrc.benchmarks.control import faults
from rlrc.benchmarks.control import scenarios as loop
from rlrc.benchmarks.results import machine
from rlrc.benchmarks.results.results import check_out, read
from rlrc.errors import UserError
from rlrc.folders import replace_file
from rlrc.runtime.control.chunks import STRATEGIES

Scenario = Literal["steady", "slow", "overhead", "page", "faults"]


@dataclass(frozen=True, kw_only=True)
class Loop(OutputOptions):
    """Steady rate under load, slow inference, the loop's own cost, with the page too, and everything that can break.

    The first two play the reference policy's simulator, the others an arm in software.
    """

    path: Positional[Path]
    """the artifact"""
    scenarios: tuple[Scenario, ...] = ("steady", "slow", "overhead", "page", "faults")
    """what to measure"""
    minutes: float = 30.0
    """of the steady run"""
    periods: float = 3.0
    """that slow inference takes"""
    episodes: int = 15
    """of each task and strategy, with slow inference"""
    tasks: tuple[str, ...] = ("drawer-open-v3", "button-press-topdown-v3", "window-open-v3", "faucet-close-v3")
    """played with slow inference"""
    out: Path | None = None
    """result file to write; rows of other scenarios that it has already stay"""
    picture: Path | None = None
    """SVG to draw of the jumps where chunks meet"""

    def run(self) -> None:
        if self.out is None or not self.out.exists():
            check_out(self.out, force=True)
        if not (self.minutes > 0 and self.periods >= 0 and self.episodes > 0):
            raise UserError("expected positive minutes, periods and episodes, found others; raise them")
        rows = [row for scenario in self.scenarios for row in self._measured(scenario)]
        for row in rows:
            row["command"] = machine.command()
        kept = read(self.out)["rows"] if self.out is not None and self.out.exists() else []
        names = {row["name"] for row in rows}
        result = result_of("loop", [row for row in kept if row["name"] not in names] + rows, 1)
        if self.picture is not None:
            draw(result["rows"], self.picture)
        self.finish(result, table(rows), "milliseconds")

    def _measured(self, scenario: Scenario) -> list[dict[str, Any]]:
        measure: dict[str, tuple[int, Callable[[loop.Tick], list[dict[str, Any]]]]] = {
            "steady": (max(1, int(self.minutes * 60 / 1.9)), lambda tick: [loop.steady(self.path, self.minutes, tick)]),
            "slow": (
                (1 + len(STRATEGIES)) * self.episodes * len(self.tasks),
                lambda tick: list(loop.slow(self.path, self.periods, self.episodes, self.tasks, tick)),
            ),
            "overhead": (2, lambda tick: list(loop.overhead(20.0, tick))),
            "page": (2, lambda tick: list(loop.overhead(20.0, tick, page=True))),
            "faults": (len(faults.FAULTS), lambda tick: list(loop.fault_matrix(tick))),
        }
        total, measured = measure[scenario]
        with plain_progress(scenario, total) as advance:
            return measured(advance)


def table(rows: list[dict[str, Any]]) -> Table:
    heads = ("scenario", "steps", "late", "held", "jitter p99", "timer's", "growth", "to hold", "success")
    found = Table(*heads)
    for row in rows:
        found.add_row(
            row["name"],
            *(_number(row[key]) for key in ("steps", "late_actions", "held_steps", "jitter_ms_p99")),
            *(_number(row[key]) for key in ("timer_jitter_ms_p99", "rss_growth_bytes", "time_to_hold_ms")),
            _number(row.get("success")),
        )
    return found


def _number(value: float | None) -> str:
    if value is None:
        return "\u2013"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """How many of the jumps where chunks meet are larger than so much, for every strategy."""
    matplotlib.use("agg")
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    for row in (row for row in rows if "splice_jump" in row):
        jumps = sorted(row["splice_jump"]["all"])
        share = [1 - i / len(jumps) for i in range(len(jumps))]
        axes.step(jumps, share, where="post", label=f"{row['name']}: success {row['success']:.2f}")
    axes.set(xlabel="jump of the command, action units", ylabel="share of splices above", yscale="log")
    axes.legend(fontsize=7)
    figure.tight_layout()
    with replace_file(file) as partial:
        figure.savefig(partial, format="svg", metadata={"Date": None})
