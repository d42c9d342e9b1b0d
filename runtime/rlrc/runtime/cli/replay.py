"""How far the commands of a replayed episode are from the recorded ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.runtime.control.telemetry import Telemetry
from rlrc.runtime.safety.angles import shortest


def errors(
    recorded: NDArray[Any],
    telemetry: Telemetry,
    names: tuple[str, ...],
    periods: NDArray[np.float64] | None = None,
) -> dict[str, Any]:
    """How far the commands are from the recorded actions, by dimension, in its unit; step n is compared with frame n.

    ``periods`` (dim,): the period of angles that wrap, inf for all else; None: none wraps. Steps at which the robot was
    held are left out: they have no command from the policy.
    """
    first, rows = telemetry.steps - len(telemetry.rows), telemetry.rows
    off = np.abs(shortest(telemetry.commands - recorded[first : first + len(rows)], periods))[~rows["held"]]
    found = {"frames": len(recorded), "compared": len(off), "error": None}
    if not len(off):
        return found
    each = zip(names, off.T, strict=True)
    return found | {"error": {name: {"mean": float(of.mean()), "max": float(of.max())} for name, of in each}}


def format_errors(found: Mapping[str, Any], units: tuple[str, ...]) -> dict[str, str]:
    """The errors as text, by heading."""
    rows = {"compared": f"{found['compared']:,} of {found['frames']:,} frames with the recorded actions"}
    for (name, error), unit in zip((found["error"] or {}).items(), units, strict=False):
        rows[f"  {name}"] = f"mean {error['mean']:.4g}, max {error['max']:.4g} {'' if unit == '1' else unit}".rstrip()
    return rows
