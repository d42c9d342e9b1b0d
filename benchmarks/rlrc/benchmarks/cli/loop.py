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
    """Measure the loop in a long run under load, with slow inference, without a model (and with the page), and faults.

    The first two use the simulator of the reference policy, the others a simulated arm.
    """

    path: Positional[Path]
    """the artifact"""
    scenarios: tuple[Scenario, ...] = ("steady", "slow", "overhead", "page", "faults")
    """scenarios to run"""
    minutes: float = 30.0
    """duration of the steady scenario"""
    periods: float = 3.0
    """duration of an inference in the slow scenario, in periods of the loop"""
    episodes: int = 15
    """episodes of each task and strategy in the slow scenario"""
    tasks: tuple[str, ...] = ("drawer-open-v3", "button-press-topdown-v3", "window-open-v3", "faucet-close-v3")
    """tasks of the slow scenario"""
    out: Path | None = None
    """result file to write; its rows of other scenarios are kept"""
    picture: Path | None = None
    """SVG file for a chart of the jumps between chunks"""

    def run(self) -> None:
        if self.out is None or not self.out.exists():
            check_out(self.out, force=True)
        if not (self.minutes > 0 and self.periods >= 0 and self.episodes > 0):
            raise UserError(
                f"expected positive minutes, periods and episodes, found {self.minutes:g}, {self.periods:g} and "
                f"{self.episodes}; increase them"
            )
        rows = [row for scenario in self.scenarios for row in self._measure(scenario)]
        for row in rows:
            row["command"] = machine.command()
        kept = read(self.out)["rows"] if self.out is not None and self.out.exists() else []
        names = {row["name"] for row in rows}
        result = result_of("loop", [row for row in kept if row["name"] not in names] + rows, 1)
        if self.picture is not None:
            draw(result["rows"], self.picture)
        self.finish(result, table(rows), "milliseconds")

    def _measure(self, scenario: Scenario) -> list[dict[str, Any]]:
        scenarios: dict[str, tuple[int, Callable[[loop.Tick], list[dict[str, Any]]]]] = {
            "steady": (max(1, int(self.minutes * 60 / 1.9)), lambda tick: [loop.steady(self.path, self.minutes, tick)]),
            "slow": (
                (1 + len(STRATEGIES)) * self.episodes * len(self.tasks),
                lambda tick: list(loop.slow(self.path, self.periods, self.episodes, self.tasks, tick)),
            ),
            "overhead": (2, lambda tick: list(loop.overhead(20.0, tick))),
            "page": (2, lambda tick: list(loop.overhead(20.0, tick, page=True))),
            "faults": (len(faults.FAULTS), lambda tick: list(loop.fault_matrix(tick))),
        }
        total, measure = scenarios[scenario]
        with plain_progress(scenario, total) as advance:
            return measure(advance)


def table(rows: list[dict[str, Any]]) -> Table:
    heads = ("scenario", "steps", "late", "held", "jitter p99", "timer's", "growth", "to hold", "success")
    result = Table(*heads)
    for row in rows:
        result.add_row(
            row["name"],
            *(_number(row[key]) for key in ("steps", "late_actions", "held_steps", "jitter_ms_p99")),
            *(_number(row[key]) for key in ("timer_jitter_ms_p99", "rss_growth_bytes", "time_to_hold_ms")),
            _number(row.get("success")),
        )
    return result


def _number(value: float | None) -> str:
    if value is None:
        return "\u2013"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw the share of jumps between chunks above each size, for every strategy."""
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
