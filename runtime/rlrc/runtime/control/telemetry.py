"""The log of the control loop's steps: in memory allocated at the start, written at the end of the run."""

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
        ("late_ms", np.float32),  # from when the step was due to when it began
        ("sense_ms", np.float32),
        ("plan_ms", np.float32),
        ("guard_ms", np.float32),
        ("command_ms", np.float32),
        ("ask_ms", np.float32),
        ("show_ms", np.float32),  # for the operator's page
        ("inference_ms", np.float32),  # of the chunk that arrived at this step; nan: none did
        ("chunk", np.int32),  # 0: none
        ("place", np.int16),  # of the action in its chunk
        ("age_ms", np.float32),  # of the state that the guard used
        ("clamped", np.int16),  # number of the guard's clamp events
        ("late", np.bool_),  # an action was sent after the next step was due (holds do not count)
        ("held", np.bool_),
        ("stopped", np.bool_),
        ("skipped", np.int32),  # steps before this one that were left out, since they could not begin in time
    ]
)
PARTS = ("sense", "plan", "guard", "command", "ask", "show")


COUNTED = ("late", "held", "skipped", "clamped")


class Telemetry:
    """The last ``capacity`` steps with their ``commands`` (capacity, dim), and ``counts`` of all steps."""

    def __init__(self, capacity: int, dim: int) -> None:
        self._rows, self._commands = np.zeros(capacity, STEP), np.zeros((capacity, dim), np.float32)
        self._rows["sent"] = self._commands[...] = 0.0  # touch every page now, so that none faults later
        self.steps = 0
        self._begun = 0.0  # when the first step was due, once its row is overwritten
        self._dropped = dict.fromkeys(COUNTED, 0)

    def begin(self, step: int, due: float, skipped: int) -> None:
        """A new step. Until ``write`` its row is empty: a step that never ends is in the log all the same."""
        index = self.steps % len(self._rows)
        row = self._rows[index]
        if self.steps >= len(self._rows):
            self._drop(row)
        self._rows[index] = 0
        row["step"], row["due"], row["skipped"] = step, due, skipped
        row["inference_ms"] = row["command_ms"] = np.nan
        self.steps += 1

    def write(self, command: NDArray[Any] | None, **values: float) -> None:
        """The newest step's command, and its other columns by their names in STEP."""
        index = (self.steps - 1) % len(self._rows)
        self._commands[index] = np.nan if command is None else command
        row = self._rows[index]
        for name, value in values.items():
            row[name] = value

    def _drop(self, row: Any) -> None:
        if self.steps == len(self._rows):
            self._begun = float(row["due"])
        for name in COUNTED:
            self._dropped[name] += int(_count(name, row[name]))

    @property
    def counts(self) -> dict[str, int]:
        """Of all steps: those that were sent late, held, clamped; and how many were skipped before them."""
        return {name: dropped + int(_count(name, self.rows[name]).sum()) for name, dropped in self._dropped.items()}

    @property
    def begun(self) -> float:
        """When the first step was due."""
        return self._begun if self.steps > len(self._rows) else float(self._rows["due"][0])

    @property
    def rows(self) -> NDArray[Any]:
        """Oldest first."""
        return self._in_order(self._rows)

    @property
    def commands(self) -> NDArray[np.float32]:
        return self._in_order(self._commands)

    def _in_order(self, array: NDArray[Any]) -> NDArray[Any]:
        if self.steps <= len(array):
            return array[: self.steps]
        return np.roll(array, -(self.steps % len(array)), 0)


def _count(name: str, values: Any) -> Any:
    return values > 0 if name == "clamped" else values


def summary(telemetry: Telemetry, period: float) -> dict[str, Any]:
    """Summary of a run, in seconds and milliseconds. Raises UserError if there are no steps.

    ``late_actions`` were sent after the next step was due. That happens only if a driver blocks while it sends: an
    action that is late before that is replaced by a hold. Percentiles are over the steps that are still kept.
    """
    rows = telemetry.rows
    if not len(rows):
        raise UserError("expected at least one step to sum up, found none; run longer")
    overhead = np.sum([rows[f"{part}_ms"] for part in PARTS], 0)
    lag = (rows["sent"] - rows["due"]) * 1e3
    inference = rows["inference_ms"][np.isfinite(rows["inference_ms"])]
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
        "inference_ms": _percentiles(inference),
        "inferences": len(inference),
    }


def format_rows(totals: Mapping[str, Any]) -> dict[str, str]:
    """The summary as text, by heading."""

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
    """The newest board reading at each step; nan without one, which a row of JSON leaves out."""
    readings = [
        (np.nan,) * 4
        if reading is None
        else (reading.watts, reading.hottest, reading.gpu_load, float(len(reading.throttled)))
        for reading in monitor.readings_at(stamped, sent.tolist())
    ]
    values = np.array(readings, np.float32).reshape(-1, 4)  # None becomes nan
    return {f"board.{name}": values[:, i] for i, name in enumerate(("watts", "celsius", "gpu_load", "throttled"))}


def jitter(gaps: NDArray[Any], period: float) -> float:
    """The 99th percentile, in ms, of how far the times between two commands are from whole periods."""
    return float(np.percentile(np.abs(gaps - np.round(gaps / period) * period), 99) * 1e3) if len(gaps) else 0.0


def _percentiles(milliseconds: NDArray[Any]) -> dict[str, float] | None:
    """None if nothing was measured."""
    known = milliseconds[np.isfinite(milliseconds)]
    if not len(known):
        return None
    p50, p99, largest = np.percentile(known, (50, 99, 100)).tolist()
    return {"p50": p50, "p99": p99, "max": largest}


def write(telemetry: Telemetry, names: tuple[str, ...], path: Path, stamped: Sequence[StampedReading] = ()) -> None:
    """Writes a row for each step, as JSON lines or Parquet (by the suffix), completely or not at all.

    ``stamped``: the board's readings; each row gets the newest one.
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
