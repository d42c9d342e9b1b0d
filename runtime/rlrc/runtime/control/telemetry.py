"""What every step of the control loop was like: in memory that is there from the start, written when it is over."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.errors import UserError
from rlrc.folders import replace_file
from rlrc.runtime.board import monitor
from rlrc.runtime.board.monitor import StampedReading

STEP = np.dtype(
    [
        ("step", np.int64),
        ("due", np.float64),  # seconds of the loop's clock
        ("sent", np.float64),  # when the command went out
        ("late_ms", np.float32),  # how long after it was due the step began
        ("sense_ms", np.float32),
        ("plan_ms", np.float32),
        ("guard_ms", np.float32),
        ("command_ms", np.float32),
        ("ask_ms", np.float32),
        ("show_ms", np.float32),  # for the operator's page
        ("inference_ms", np.float32),  # of the chunk that came at this step; nan: none did
        ("chunk", np.int32),  # 0: none
        ("place", np.int16),  # of the action in its chunk
        ("age_ms", np.float32),  # since the state that the guard saw was measured
        ("clamped", np.int16),  # guard events of this step, by what was done
        ("late", np.bool_),  # an action was sent when the next step was due already (a hold may be)
        ("held", np.bool_),
        ("stopped", np.bool_),
        ("skipped", np.int32),  # steps before this one that were not begun in time, and so left out
    ]
)
PARTS = ("sense", "plan", "guard", "command", "ask", "show")


COUNTED = ("late", "held", "skipped", "clamped")


class Telemetry:
    """The last ``capacity`` steps, and ``counts`` of all. ``commands`` are kept beside, (capacity, dim)."""

    def __init__(self, capacity: int, dim: int) -> None:
        self._rows, self._commands = np.zeros(capacity, STEP), np.zeros((capacity, dim), np.float32)
        self._rows["sent"] = self._commands[...] = 0.0  # touched now, so that no page is missing later
        self.steps = 0
        self._begun = 0.0  # when the first step was due, once that is forgotten
        self._gone = dict.fromkeys(COUNTED, 0)

    def next(self) -> Any:
        """The record of a new step, to be filled in."""
        row = self._rows[self.steps % len(self._rows)]
        if self.steps >= len(self._rows):
            self._forget(row)
        row["inference_ms"], row["command_ms"] = np.nan, np.nan
        row["chunk"] = row["place"] = row["show_ms"] = 0  # an older step's, when the capacity is used up
        self.steps += 1
        return row

    def _forget(self, row: Any) -> None:
        if self.steps == len(self._rows):
            self._begun = float(row["due"])
        for name in COUNTED:
            self._gone[name] += int(_count(name, row[name]))

    @property
    def counts(self) -> dict[str, int]:
        """Of all steps: those that were sent late, held, clamped; and how many were skipped before them."""
        return {name: gone + int(_count(name, self.rows[name]).sum()) for name, gone in self._gone.items()}

    @property
    def begun(self) -> float:
        """When the first step was due."""
        return self._begun if self.steps > len(self._rows) else float(self._rows["due"][0])

    def commanded(self, command: NDArray[Any] | None) -> None:
        """The command of the newest step."""
        self._commands[(self.steps - 1) % len(self._commands)] = np.nan if command is None else command

    @property
    def rows(self) -> NDArray[Any]:
        """Oldest first."""
        return self._rolled(self._rows)

    @property
    def commands(self) -> NDArray[np.float32]:
        return self._rolled(self._commands)

    def _rolled(self, array: NDArray[Any]) -> NDArray[Any]:
        if self.steps <= len(array):
            return array[: self.steps]
        return np.roll(array, -(self.steps % len(array)), 0)


def _count(name: str, values: Any) -> Any:
    return values > 0 if name == "clamped" else values


def summary(telemetry: Telemetry, period: float) -> dict[str, Any]:
    """What a run was like, in seconds and milliseconds.

    ``late_actions`` were sent when the next step was due already. That takes a driver that is stuck in the middle of
    it: what is noticed before is replaced by a hold. Percentiles are those of the steps that are still there.
    """
    rows = telemetry.rows
    if not len(rows):
        raise UserError("expected at least one step to sum up, found none; run longer")
    overhead = np.sum([rows[f"{part}_ms"] for part in PARTS], 0)
    lag = (rows["sent"] - rows["due"]) * 1e3
    came = rows["inference_ms"][np.isfinite(rows["inference_ms"])]
    seconds, counts = float(rows["due"][-1]) - telemetry.begun + period, telemetry.counts
    return {
        "steps": telemetry.steps,
        "seconds": seconds,
        "hz": telemetry.steps / seconds,
        "late_actions": counts["late"],
        "held_steps": counts["held"],
        "skipped_steps": counts["skipped"],
        "clamped_steps": counts["clamped"],
        "stopped": bool(rows["stopped"][-1]),
        "jitter_ms_p99": jitter(np.diff(rows["sent"])[np.diff(rows["step"]) > 0], period),
        "lag_ms": _percentiles(lag),
        "overhead_ms": _percentiles(overhead),
        **{f"{part}_ms": _percentiles(rows[f"{part}_ms"]) for part in PARTS},
        "age_ms": _percentiles(rows["age_ms"]),
        "inference_ms": _percentiles(came),
        "inferences": len(came),
    }


def told(totals: Mapping[str, Any]) -> dict[str, str]:
    """The summary in words, by heading."""

    def spread(name: str) -> str:
        found = totals[name]
        return "none" if found is None else f"p50 {found['p50']:.2f}, p99 {found['p99']:.2f}, max {found['max']:.2f} ms"

    steps = totals["steps"]
    rows = {
        "rate": f"{totals['hz']:.4g} of {totals['asked_hz']:g} Hz, {steps:,} steps in {totals['seconds']:.1f} s, "
        f"jitter p99 {totals['jitter_ms_p99']:.2f} ms",
        "misses": f"{totals['late_actions']} actions late, {totals['held_steps']} steps held, "
        f"{totals['skipped_steps']} left out",
        "guard": ", ".join(f"{what} {count}" for what, count in totals["guard"].items()),
        "inference": spread("inference_ms"),
        "age of the state": spread("age_ms"),
        "all but inference": spread("overhead_ms"),
        **{f"  {part}": spread(f"{part}_ms") for part in PARTS},
        "granted": ", ".join(f"{what} {how}" for what, how in totals["granted"].items()),
    }
    if totals.get("board"):
        rows["board"] = monitor.format_summary(totals["board"])
    if totals["stop"]:
        rows["stopped"] = totals["stop"]
    if "successes" in totals:
        rows["success"] = f"{totals['successes']} of {totals['episodes']} episodes"
    return rows


def _board_columns(stamped: Sequence[StampedReading], sent: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
    """nan where nothing is told, which a row of JSON leaves out."""
    told = [
        (np.nan,) * 4
        if reading is None
        else (reading.watts, reading.hottest, reading.gpu_load, float(len(reading.throttled)))
        for reading in monitor.readings_at(stamped, sent.tolist())
    ]
    values = np.array(told, np.float32).reshape(-1, 4)  # None becomes nan
    return {f"board.{name}": values[:, i] for i, name in enumerate(("watts", "celsius", "gpu_load", "throttled"))}


def jitter(gaps: NDArray[Any], period: float) -> float:
    """How far the times between two commands of an episode are from whole periods, in ms, at the 99th percentile."""
    return float(np.percentile(np.abs(gaps - np.round(gaps / period) * period), 99) * 1e3) if len(gaps) else 0.0


def _percentiles(milliseconds: NDArray[Any]) -> dict[str, float] | None:
    """None where nothing was measured."""
    known = milliseconds[np.isfinite(milliseconds)]
    if not len(known):
        return None
    p50, p99, largest = np.percentile(known, (50, 99, 100)).tolist()
    return {"p50": p50, "p99": p99, "max": largest}


def write(telemetry: Telemetry, names: tuple[str, ...], path: Path, stamped: Sequence[StampedReading] = ()) -> None:
    """A row a step: JSON lines, or Parquet if the name ends so. Whole or not at all.

    With the newest reading of the board at each step, where there are some.
    """
    columns: Mapping[str, Any] = {name: telemetry.rows[name] for name in STEP.names or ()}
    columns = {**columns, **{f"command.{name}": telemetry.commands[:, i] for i, name in enumerate(names)}}
    if stamped:
        columns = {**columns, **_board_columns(stamped, telemetry.rows["sent"])}
    with replace_file(path) as partial:
        if path.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), partial)
        else:
            lists = [values.tolist() for values in columns.values()]
            with partial.open("w", encoding="utf-8") as stream:
                for row in zip(*lists, strict=True):
                    known = {name: value for name, value in zip(columns, row, strict=True) if value == value}  # no nan
                    stream.write(json.dumps(known) + "\n")
