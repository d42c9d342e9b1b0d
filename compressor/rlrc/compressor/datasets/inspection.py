"""What is in a data set, and what looks wrong: for people and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlrc.artifact import PolicySpec
from rlrc.datasets.fit import match, misfits, renamed
from rlrc.datasets.lerobot import Dataset
from rlrc.datasets.meta import INDICES, VERSION
from rlrc.runtime.describe import print_rows

FAR = 10  # standard deviations beyond which a value is an outlier
_LATE = 1e-3  # seconds that a time stamp may be off the frame rate, float32's rounding included


def facts(dataset: Dataset) -> dict[str, Any]:
    """Everything that is printed, as JSON values; ``statistics`` are over the finite values of the numeric features.

    Raises UserError if the first or the last picture of a camera cannot be decoded.
    """
    for camera in dataset.cameras:
        for i in (0, len(dataset) - 1)[: len(dataset)]:
            dataset.picture(i, camera)
    own = [name for name, feature in dataset.features.items() if feature.numeric and name not in INDICES]
    tasks = dataset.column("task_index") if len(dataset) else np.empty(0, np.int64)
    frames = Counter(tasks.tolist())
    episodes = Counter(
        int(task) for episode in dataset.episodes for task in np.unique(tasks[episode.start : episode.end])
    )
    return {
        "path": str(dataset.path),
        "version": VERSION,
        "robot": dataset.info.robot_type,
        "fps": dataset.fps,
        "episodes": len(dataset.episodes),
        "frames": len(dataset),
        "seconds": len(dataset) / dataset.fps,
        "bytes": sum(file.stat().st_size for file in dataset.path.rglob("*") if file.is_file()),
        "tasks": {
            task: {"episodes": episodes[index], "frames": frames[index]} for index, task in enumerate(dataset.tasks)
        },
        "features": {
            name: {"dtype": feature.dtype, "shape": list(feature.shape), "names": list(feature.names or ()) or None}
            for name, feature in dataset.features.items()
            if name not in INDICES
        },
        "statistics": {name: statistics(dataset.column(name)) for name in own} if len(dataset) else {},
        "warnings": [line for name in own for line in _suspicions(dataset, name)] + _times(dataset),
    }


def fit(dataset: Dataset, spec: PolicySpec, cameras: Mapping[str, str]) -> dict[str, Any]:
    """Whether a policy can be trained on it, with the mapping, or the reasons why not."""
    if reasons := misfits(dataset, spec, cameras):
        return {"fits": False, "reasons": reasons}
    matched = match(dataset, spec, cameras)
    return {
        "fits": True,
        "cameras": matched.cameras,
        "without": [camera.name for camera in spec.cameras if camera.name not in matched.cameras],
        "state": list(matched.state),
        "chunk": spec.action.horizon,
        "notes": renamed(dataset, matched),
    }


def statistics(values: np.ndarray) -> dict[str, list[float | None]]:
    """(N, ...) -> min, max, mean and std of every dimension over its finite values; None where there is none."""
    columns = np.asarray(values, np.float64).reshape(len(values), -1).T
    finite = [column[np.isfinite(column)] for column in columns]
    kinds: dict[str, Any] = {"min": np.min, "max": np.max, "mean": np.mean, "std": np.std}
    return {name: [float(kind(c)) if len(c) else None for c in finite] for name, kind in kinds.items()}


def show(found: Mapping[str, Any], console: Console) -> None:
    rows = {
        "data set": f"{found['path']} (LeRobotDataset {found['version']})",
        "robot": found["robot"] or "not named",
        "content": f"{found['episodes']:,} episodes, {found['frames']:,} frames at {found['fps']:g} a second, "
        f"{found['seconds'] / 60:.1f} minutes, {found['bytes'] / 1e6:.1f} MB",
    }
    print_rows(rows, console)
    tasks = Table("task", "episodes", "frames")
    for task, numbers in found["tasks"].items():
        tasks.add_row(task, f"{numbers['episodes']:,}", f"{numbers['frames']:,}")
    console.print(tasks)
    features = Table("feature", "type", "shape", "dimension", "min", "max", "mean", "std")
    for name, values in found["features"].items():
        shape = " x ".join(map(str, values["shape"]))
        numbers = found["statistics"].get(name)
        if numbers is None:
            features.add_row(name, values["dtype"], shape)
            continue
        names = values["names"] if len(values["names"] or ()) == len(numbers["min"]) else None
        for i, cells in enumerate(zip(*numbers.values(), strict=True)):
            head = (name, values["dtype"], shape) if i == 0 else ("", "", "")
            features.add_row(*head, names[i] if names else str(i), *("" if c is None else f"{c:.4g}" for c in cells))
    console.print(features)
    for line in found["warnings"]:
        console.print(f"warning: {line}", style="yellow")
    if found.get("policy", {}).get("fits"):
        chosen = found["policy"]
        cameras = ", ".join(f"{name} = {feature}" for name, feature in chosen["cameras"].items()) or "none"
        cameras += f" (without {', '.join(chosen['without'])})" if chosen["without"] else ""
        state = " and ".join(chosen["state"]) or "none"
        for line in chosen["notes"]:
            console.print(f"note: {line}")
        console.print(f"fits the policy: cameras {cameras}; state {state}; chunks of {chosen['chunk']}", style="green")


def _suspicions(dataset: Dataset, name: str) -> list[str]:
    """What a sensor or a recording may have spoilt, by dimension."""
    if not len(dataset):
        return []
    columns = np.asarray(dataset.column(name), np.float64).reshape(len(dataset), -1).T
    names = dataset.features[name].names or ()
    lines = []
    for i, column in enumerate(columns):
        where = f"{name} dimension {i}" + (f" ({names[i]})" if len(names) == len(columns) else "")
        finite = column[np.isfinite(column)]
        if len(finite) < len(column):
            lines.append(f"{where}: nan or inf in {len(column) - len(finite)} frames")
        if not len(finite):
            continue
        if np.ptp(finite) == 0:
            lines.append(f"{where}: constant, always {finite[0]:g}")
            continue
        far = np.abs(finite - finite.mean()) > FAR * finite.std()
        if far.any():
            worst = finite[np.argmax(np.abs(finite - finite.mean()))]
            lines.append(f"{where}: {int(far.sum())} values beyond {FAR} standard deviations, such as {worst:g}")
    return lines


def _times(dataset: Dataset) -> list[str]:
    lines = []
    stamps = np.asarray(dataset.column("timestamp"), np.float64) if len(dataset) else np.empty(0)
    backwards = [e.index for e in dataset.episodes if (np.diff(stamps[e.start : e.end]) <= 0).any()]
    late = [
        e.index
        for e in dataset.episodes
        if np.abs(stamps[e.start : e.end] - np.arange(len(e)) / dataset.fps).max() > _LATE and e.index not in backwards
    ]
    if backwards:
        lines.append(f"time stamps do not grow in {len(backwards)} episodes, the first is {backwards[0]}")
    if late:
        lines.append(f"time stamps are off {dataset.fps:g} a second in {len(late)} episodes, the first is {late[0]}")
    return lines
