"""The page's metadata, sent once to every browser: the artifact, its figures, and the plots."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

from rlrc.artifact import Artifact, PolicySpec
from rlrc.artifact.describe import folder_bytes, policy_rows
from rlrc.runtime.page.feed import TEXT
from rlrc.runtime.safety.profile import RobotProfile, match_state
from rlrc.runtime.safety.verdict import Event

CLAMPS_S = 1.0  # minimal interval between shown clamps of one limit


def page_metadata(
    kind: str,
    artifact: Artifact,
    profile: RobotProfile | None,
    deadline_ms: float | None,
    can: Collection[str],
    **facts: str,
) -> dict[str, Any]:
    """``kind``: "run" or "serve"; ``deadline_ms``: what takes longer is late; ``can``: the requests offered."""
    manifest, spec = artifact.manifest, artifact.manifest.policy
    described = policy_rows(spec)
    rows = {
        "artifact": f"{artifact.path.name} ({artifact.digest[:12]})",
        "family": described["family"],
        "parameters": f"{manifest.parameters:,} stored as {manifest.dtype}",
        "graphs": ", ".join(sorted({f"{one.backend} {one.precision}" for one in manifest.graphs})) or "none",
        "bytes": ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in folder_bytes(artifact).items()),
        "actions": described["actions"],
        "robot": "no profile, no guard" if profile is None else profile.robot,
        **facts,
    }
    return {
        "kind": kind,
        "name": artifact.path.name,
        "facts": list(rows.items()),
        "rows": list_plots(spec, profile),
        "cameras": [camera.name for camera in spec.cameras],
        "deadline_ms": deadline_ms,
        "can": sorted(can),
        "clock": [time.monotonic(), time.time()],
    }


def list_plots(spec: PolicySpec, profile: RobotProfile | None) -> list[dict[str, Any]]:
    """One plot per action dimension, with the state entry that measures it, and one per remaining state entry.

    ``command`` and ``state`` are indices into the action and the state; None: there is none.
    """
    names, units = ((), ()) if spec.state is None else (spec.state.names, spec.state.units)
    measures = _measures(spec, profile, names, units)
    rows = []
    for index, (name, unit) in enumerate(zip(spec.action.names, spec.action.units, strict=True)):
        entry, factor = measures.get(index, (None, 1.0))
        position = None if profile is None else profile.dimensions[index].position
        absolute = position is not None and spec.action.meaning[index] in ("absolute", "gripper")
        limits = (position.low, position.high) if position is not None and absolute else (None, None)
        rows.append(_plot(name, unit, index, entry, factor, *limits))
    shown = {entry for entry, _ in measures.values()}
    rows += [
        _plot(name, unit, None, entry, 1.0)
        for entry, (name, unit) in enumerate(zip(names, units, strict=True))
        if entry not in shown
    ]
    return rows


def _measures(
    spec: PolicySpec, profile: RobotProfile | None, names: Sequence[str], units: Sequence[str]
) -> dict[int, tuple[int, float]]:
    """For absolute action dimensions: the state entry that measures it, and its conversion factor."""
    if profile is not None:
        wired = match_state(profile, spec.action, names, units)
        found = list(zip(wired.dimensions, wired.entries, wired.factors, strict=True))
    else:
        alike = [(i, list(names).index(name)) for i, name in enumerate(spec.action.names) if name in names]
        found = [(i, j, 1.0) for i, j in alike if units[j] == spec.action.units[i]]
    return {i: (j, factor) for i, j, factor in found if spec.action.meaning[i] in ("absolute", "gripper")}


def _plot(
    name: str,
    unit: str,
    command: int | None,
    state: int | None,
    factor: float,
    low: float | None = None,
    high: float | None = None,
) -> dict[str, Any]:
    unit = "" if unit == "1" else unit
    return {"name": name, "unit": unit, "command": command, "state": state, "factor": factor, "low": low, "high": high}


class EventFilter:
    """Formats guard events as (clock seconds, action, text), and drops clamps of one limit within a second."""

    def __init__(self) -> None:
        self._clamped: dict[tuple[str, str | None], float] = {}

    def format(self, events: Collection[Event], now: float) -> list[tuple[float, str, str]]:
        return [(now, event.act, _format_event(event)[:TEXT]) for event in events if self._is_new(event, now)]

    def _is_new(self, event: Event, now: float) -> bool:
        if event.act != "clamp":
            return True
        key = event.kind, event.dimension
        if now - self._clamped.get(key, -CLAMPS_S) < CLAMPS_S:
            return False
        self._clamped[key] = now
        return True


def _format_event(event: Event) -> str:
    twice = f"{event.act}: {event.kind}" if event.act == event.kind else ""  # "stop: stop: the page"
    return str(event).replace(twice, event.act, 1) if twice else str(event)
