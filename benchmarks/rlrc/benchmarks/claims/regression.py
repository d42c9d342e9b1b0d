"""Compare new results with old ones of the same class of machine, figure by figure, with intervals.

A figure has regressed if it is worse by more than the tolerance and its interval excludes "no change". A change beyond
the tolerance but within the noise is "unclear" and does not fail; a longer measurement decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlrc.benchmarks.measure.success import compare, same_scenes
from rlrc.benchmarks.results.results import rows_of
from rlrc.benchmarks.results.stats import Estimate, difference_limit, paired_difference_limit, percentile_change
from rlrc.errors import UserError

Verdict = Literal["REGRESSION", "MISSING", "unclear", "same", "better"]
Row = Mapping[str, Any]
MARGIN = 0.03  # of success, as in claims.toml
CLASS = ("device", "cpu", "cores", "threads", "power_mode")


@dataclass(frozen=True)
class FigureChange:
    """One figure of one row. ``change``: new / old (throughput: old / new, success: new - old)."""

    name: str
    figure: str
    unit: str
    old: float | None
    new: float | None
    change: Estimate | None
    verdict: Verdict


def compare_results(old: Row, new: Row, tolerance: float, margin: float = MARGIN) -> list[FigureChange]:
    """Compare every figure of the old result. Raises UserError for results of different classes of machines."""
    check_machines(old.get("machine") or {}, new.get("machine") or {})
    fresh = {row["name"]: row for row in rows_of(new)}
    changes: list[FigureChange] = []
    for row in rows_of(old):
        of_row = list(_row(row, fresh.get(row["name"], {}), tolerance, margin))
        gone = of_row and row["name"] not in fresh
        changes += [FigureChange(row["name"], "everything", "", None, None, None, "MISSING")] if gone else of_row
    return changes


def check_machines(old: Row, new: Row) -> None:
    """Raises UserError unless both results have the same class of machine and number of threads."""
    differing = [key for key in CLASS if old.get(key) != new.get(key)]
    if differing:
        values = [", ".join(f"{key} {machine.get(key)}" for key in differing) for machine in (old, new)]
        raise UserError(
            f"expected results of one class of machine, found {values[0]} in the old and {values[1]} in the new; "
            "measure both on the same one"
        )


def _row(old: Row, new: Row, tolerance: float, margin: float) -> Iterator[FigureChange]:
    name = old["name"]
    for percentile in ("p50", "p99"):
        if percentile in old.get("latency_ms", {}):
            values = [row.get("latency_ms", {}).get(percentile) for row in (old, new)]
            yield _ratio(name, percentile, "ms", values, _ratio_of_trials(old, new, percentile), tolerance)
    for figure, unit, scale, path in FIGURES:
        if (before := _look_up(old, path)) is not None:
            after = _look_up(new, path)
            change = None if after is None else _ratio_of_limits(_limits(old, path), _limits(new, path))
            values = [None if value is None else value / scale for value in (before, after)]
            yield _ratio(name, figure, unit, values, change, tolerance)
    for number, one in (old.get("throughput") or {}).items():
        other = ((new.get("throughput") or {}).get(number)) or {}
        values = [one["chunks_per_s"], other.get("chunks_per_s")]
        # A higher rate is better: the ratio is inverted.
        change = _ratio_of_limits(tuple(other["interval"]), tuple(one["interval"])) if other else None
        yield _ratio(name, f"throughput, {number} at once", "1/s", values, change, tolerance, more_is_better=True)
    if old.get("success") is not None:
        yield _success(name, old, new, margin)


# Figure, unit, scale of the unit, path in a row; lower is better.
FIGURES = (
    ("bytes", "MB", 1e6, ("bytes",)),
    ("own memory", "MB", 1e6, ("memory", "own", "pss")),
    ("peak memory", "MB", 1e6, ("memory", "own", "peak")),
    ("peak memory", "MB", 1e6, ("peak_rss",)),
    ("energy", "J a chunk", 1.0, ("energy", "joules_chunk", "value")),
)


def _look_up(row: Row, path: Sequence[str]) -> float | None:
    value: Any = row
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return None if value is None else float(value)


def _limits(row: Row, path: Sequence[str]) -> tuple[float, float]:
    """The measured range or the interval's limits; an exact figure is both limits."""
    if path[0] == "memory" and (spread := row["memory"].get("own_range")):
        return tuple(spread[path[-1]])
    if path[0] == "energy":
        return row["energy"]["joules_chunk"]["low"], row["energy"]["joules_chunk"]["high"]
    value = _look_up(row, path)
    assert value is not None
    return value, value


def _ratio_of_limits(old: tuple[float, ...], new: tuple[float, ...]) -> Estimate | None:
    """The ratio, with the widest limits that both ranges allow."""
    if min(*old, *new) <= 0:
        return None
    return Estimate(sum(new) / sum(old), new[0] / old[1], new[1] / old[0])


def _ratio_of_trials(old: Row, new: Row, percentile: str) -> Estimate | None:
    rounds = [_rounds(row) for row in (new, old)]
    if min(map(len, rounds)) < 2:
        return None
    return percentile_change(rounds[0], rounds[1], float(percentile.removeprefix("p")))


def _rounds(row: Row) -> list[list[float]]:
    trials, block = row.get("trials_ms") or [], row.get("block", 1)
    return [trials[i : i + block] for i in range(0, len(trials), block)]


def _ratio(
    name: str,
    figure: str,
    unit: str,
    values: Sequence[float | None],
    change: Estimate | None,
    tolerance: float,
    more_is_better: bool = False,
) -> FigureChange:
    old, new = values
    if old is None or new is None:
        return FigureChange(name, figure, unit, old, new, None, "MISSING")
    worse, better = (old, new) if more_is_better else (new, old)
    if better <= 0:
        return FigureChange(name, figure, unit, old, new, None, "same" if worse <= 0 else "unclear")
    ratio = Estimate(worse / better, change.low, change.high) if change else Estimate(*(worse / better,) * 3)
    return FigureChange(name, figure, unit, old, new, ratio, verdict(ratio, tolerance))


def verdict(ratio: Estimate, tolerance: float) -> Verdict:
    """The verdict on a ratio worse / better: above one is worse."""
    if ratio.value > 1 + tolerance:
        return "REGRESSION" if ratio.low > 1 else "unclear"
    return "better" if ratio.value < 1 / (1 + tolerance) and ratio.high < 1 else "same"


def _success(name: str, old: Row, new: Row, margin: float) -> FigureChange:
    if new.get("success") is None:
        return FigureChange(name, "success", "", old["success"], None, None, "MISSING")
    difference = new["success"] - old["success"]
    counts = [(round(row["success"] * row["episodes"]), row["episodes"]) for row in (new, old)]
    if same_scenes(new, old):
        pair = compare(new, old)
        # The upper limit is the negative lower limit of the opposite difference.
        low = paired_difference_limit(pair["only"], pair["only_baseline"], pair["pairs"])
        high = -paired_difference_limit(pair["only_baseline"], pair["only"], pair["pairs"])
    else:
        low, high = difference_limit(*counts[0], *counts[1]), -difference_limit(*counts[1], *counts[0])
    estimate = Estimate(difference, low, high)
    outcome: Verdict = "same"
    if difference < -margin:
        outcome = "REGRESSION" if high < 0 else "unclear"
    elif difference > margin and low > 0:
        outcome = "better"
    return FigureChange(name, "success", "", old["success"], new["success"], estimate, outcome)
