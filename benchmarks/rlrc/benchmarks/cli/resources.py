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
    """Measure joules of a chunk and of an action, from a Jetson's power rails or a processor's readable counters.

    On any other machine, prints "not available" and the reason.
    """

    seconds: float = 10.0
    """duration of each artifact in a round, and of the idle measurement"""
    rounds: int = 5
    """rounds; each measures all artifacts in turn"""

    def run(self) -> None:
        from rlrc.runtime.inference.policy import LocalPolicy

        check_rounds(self.seconds, self.rounds)
        opened = self.open_artifacts()
        sources, description = energy.sources()
        rows: list[dict[str, Any]] = [facts(named) | {"energy": None} for named in opened]
        if sources is not None:
            calls: dict[str, Any] = {}
            for named in opened:
                policy = LocalPolicy.load(named.artifact.path, self.threads)
                calls[named.name] = latency.make_timer(policy, latency.observations(named.artifact))
                calls[named.name]()
            with progress("intervals", 1 + self.rounds * len(opened)) as advance:
                idle, measured = energy.measure(sources, calls, self.seconds, self.rounds, advance)
            for row, named in zip(rows, opened, strict=True):
                row |= energy.row(measured[named.name], idle, named.artifact.manifest.policy.action.horizon)
        table = Table("policy", "J a chunk", "J an action", "above idle, J a chunk", "W", "idle W", "ratio")
        for row in rows:
            table.add_row(row["name"], *_energy_cells(row["energy"], rows[0]["energy"]))
        self.finish(result_of("energy", rows, self.threads) | {"source": description}, table, description)


def _energy_cells(measured: dict[str, Any] | None, baseline: dict[str, Any] | None) -> list[str]:
    if measured is None or baseline is None:
        return ["not available"]
    joules = [measured[key] for key in ("joules_chunk", "joules_action", "joules_chunk_above_idle")]
    cells = [f"{value['value']:.4f} ({value['low']:.4f} to {value['high']:.4f})" for value in joules]
    ratio = baseline["joules_chunk"]["value"] / measured["joules_chunk"]["value"]
    return [*cells, f"{measured['watts']:.2f}", f"{measured['idle_watts']:.2f}", f"{ratio:.2f}x"]


@dataclass(frozen=True, kw_only=True)
class Throughput(ArtifactOptions):
    """Measure chunks and actions a second on an otherwise idle machine, by the number of policies that run at once."""

    at_once: tuple[int, ...] = ()
    """numbers of policies that run at once (default: 1 and the number of cores)"""
    seconds: float = 5.0
    """duration of a round"""
    rounds: int = 5
    """rounds of each artifact and number"""

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
                observations = latency.observations(named.artifact)
                horizon = named.artifact.manifest.policy.action.horizon
                measured = {}
                for number in numbers:
                    policies = [LocalPolicy.load(named.artifact.path, self.threads) for _ in range(number)]
                    rates = throughput.measure(policies, observations, self.seconds, self.rounds, advance)
                    measured[str(number)] = throughput.row(rates, horizon)
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
        note = "the actions of a chunk can be executed while the next chunk is computed"
        self.finish(result_of("throughput", rows, self.threads), table, note)


def check_rounds(seconds: float, rounds: int) -> None:
    """Raises UserError for a duration of zero or too few rounds for an interval."""
    if not seconds > 0 or rounds < 2:
        raise UserError(
            f"expected --seconds above 0 and at least two rounds, found {seconds:g} and {rounds}; increase them"
        )
