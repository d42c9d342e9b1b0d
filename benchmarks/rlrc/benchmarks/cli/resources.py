"""The commands that measure energy and throughput."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from rlrc.benchmarks.cli.output import ArtifactOptions, progress, result_of
from rlrc.benchmarks.measure import energy, latency, throughput
from rlrc.benchmarks.results.results import facts
from rlrc.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Energy(ArtifactOptions):
    """Joules of a chunk and of an action: from a Jetson's power rails, or a processor's counters where they are open.

    Says "not available", and why, on any other machine.
    """

    seconds: float = 10.0
    """how long each is run in every round, and nothing at first"""
    rounds: int = 5
    """rounds, in which the artifacts take turns"""

    def run(self) -> None:
        from rlrc.runtime.inference.policy import LocalPolicy

        check_rounds(self.seconds, self.rounds)
        opened = self.open_artifacts()
        found, where = energy.sources()
        rows: list[dict[str, Any]] = [facts(named) | {"energy": None} for named in opened]
        if found is not None:
            calls: dict[str, Any] = {}
            for named in opened:
                policy = LocalPolicy.load(named.artifact.path, self.threads)
                calls[named.name] = latency.make_timer(policy, latency.observations(named.artifact))
                calls[named.name]()
            with progress("intervals", 1 + self.rounds * len(opened)) as advance:
                idle, taken = energy.measure(found, calls, self.seconds, self.rounds, advance)
            for row, named in zip(rows, opened, strict=True):
                row |= energy.row(taken[named.name], idle, named.artifact.manifest.policy.action.horizon)
        table = Table("policy", "J a chunk", "J an action", "above idle, J a chunk", "W", "idle W", "ratio")
        for row in rows:
            table.add_row(row["name"], *_energy_cells(row["energy"], rows[0]["energy"]))
        self.finish(result_of("energy", rows, self.threads) | {"source": where}, table, where)


def _energy_cells(measured: dict[str, Any] | None, baseline: dict[str, Any] | None) -> list[str]:
    if measured is None or baseline is None:
        return ["not available"]
    joules = [measured[key] for key in ("joules_chunk", "joules_action", "joules_chunk_above_idle")]
    cells = [f"{value['value']:.4f} ({value['low']:.4f} to {value['high']:.4f})" for value in joules]
    ratio = baseline["joules_chunk"]["value"] / measured["joules_chunk"]["value"]
    return [*cells, f"{measured['watts']:.2f}", f"{measured['idle_watts']:.2f}", f"{ratio:.2f}x"]


@dataclass(frozen=True, kw_only=True)
class Throughput(ArtifactOptions):
    """Chunks and actions a second when the machine does nothing else, by how many policies run at once."""

    at_once: tuple[int, ...] = ()
    """how many policies run at once (default: 1, and as many as there are cores)"""
    seconds: float = 5.0
    """how long a round is"""
    rounds: int = 5
    """rounds of each"""

    def run(self) -> None:
        from rlrc.runtime.inference.policy import LocalPolicy

        check_rounds(self.seconds, self.rounds)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        numbers = self.at_once or tuple(dict.fromkeys((1, cores)))
        if min(numbers) < 1:
            raise UserError(f"expected one or more policies at once, found {min(numbers)}; change --at-once")
        opened = self.open_artifacts()
        rows = []
        with progress("rounds", len(opened) * len(numbers) * self.rounds) as advance:
            for named in opened:
                seen = latency.observations(named.artifact)
                horizon = named.artifact.manifest.policy.action.horizon
                measured = {}
                for number in numbers:
                    policies = [LocalPolicy.load(named.artifact.path, self.threads) for _ in range(number)]
                    taken = throughput.measure(policies, seen, self.seconds, self.rounds, advance)
                    measured[str(number)] = throughput.row(taken, horizon)
                rows.append(facts(named) | {"throughput": measured})
        table = Table("policy", "at once", "chunks a second", "actions a second", "CPU-s a chunk", "ratio")
        for row in rows:
            for number, one in row["throughput"].items():
                low, high = one["interval"]
                table.add_row(
                    row["name"],
                    number,
                    f"{one['chunks_per_s']:.2f} ({low:.2f} to {high:.2f})",
                    f"{one['actions_per_s']:.1f}",
                    f"{one['cpu_s_per_chunk']:.4f}",
                    f"{one['chunks_per_s'] / rows[0]['throughput'][number]['chunks_per_s']:.2f}x",
                )
        note = "a chunk's actions can be played one after the other while the next is made"
        self.finish(result_of("throughput", rows, self.threads), table, note)


def check_rounds(seconds: float, rounds: int) -> None:
    """Raises UserError for durations and rounds that give no interval."""
    if not seconds > 0 or rounds < 2:
        raise UserError(
            f"expected seconds and two rounds at least, found {seconds:g} and {rounds}; raise --seconds or --rounds"
        )
