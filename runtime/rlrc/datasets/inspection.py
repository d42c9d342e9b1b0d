"""Describe a data set and what looks wrong in it, as tables and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlrc.artifact import PolicySpec
from rlrc.datasets.fit import describe_differences, find_misfits, match
from rlrc.datasets.lerobot import Dataset
from rlrc.datasets.meta import INDICES, VERSION
from rlrc.tables import print_rows, print_table

ONE_BY_ONE = 64  # longest vector whose dimensions are described one by one; others and tensors are described as a whole
FAR = 10  # standard deviations beyond which a value is an outlier
_LATE = 1e-3  # seconds that a time stamp may differ from the frame rate, including the rounding of float32


def describe(dataset: Dataset) -> dict[str, Any]:
    """Everything that ``show`` prints, as JSON values.

    ``statistics`` are over the finite values of numeric features: lists with a value for each dimension of a vector, or
    with one value for all numbers of a larger feature. Raises UserError if the first or last picture of a camera cannot
    be decoded.
    """
    for camera in dataset.cameras:
        for i in (0, len(dataset) - 1)[: len(dataset)]:
            dataset.picture(i, camera)
    own = [name for name, feature in dataset.features.items() if feature.numeric and name not in INDICES]
    described = {name: _describe_feature(dataset, name) for name in own} if len(dataset) else {}
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
        "statistics": {name: numbers for name, (numbers, _) in described.items()},
        "warnings": [line for _, lines in described.values() for line in lines] + _check_times(dataset),
    }


def check_fit(dataset: Dataset, spec: PolicySpec, cameras: Mapping[str, str]) -> dict[str, Any]:
    """Whether a policy can be trained on the data set, with the mapping or the reasons against it."""
    if reasons := find_misfits(dataset, spec, cameras):
        return {"fits": False, "reasons": reasons}
    matched = match(dataset, spec, cameras)
    return {
        "fits": True,
        "cameras": matched.cameras,
        "without": [camera.name for camera in spec.cameras if camera.name not in matched.cameras],
        "state": list(matched.state),
        "chunk": spec.action.horizon,
        "notes": describe_differences(dataset, matched),
    }


def _describe_feature(dataset: Dataset, name: str) -> tuple[dict[str, list[float | None]], list[str]]:
    """Statistics of a feature, and warnings about it."""
    shape = dataset.features[name].shape
    if len(shape) == 1 and shape[0] <= ONE_BY_ONE:
        return compute_statistics(dataset.column(name)), _check_values(dataset, name)
    return _describe_together(dataset, name)


def _describe_together(dataset: Dataset, name: str) -> tuple[dict[str, list[float | None]], list[str]]:
    """The same over all numbers of a large feature, read in pieces: a depth picture has 300,000 numbers."""
    count, least, most, mean, squares, broken = 0, np.inf, -np.inf, 0.0, 0.0, 0
    for part in dataset.parts(name):
        values = part.reshape(len(part), -1).astype(np.float64)
        finite = np.isfinite(values)
        broken += int((~finite.all(1)).sum())
        if not len(values := values[finite]):
            continue
        more, ahead = len(values), values.mean() - mean  # merging mean and variance: Chan et al. 1979
        squares += values.var() * more + ahead**2 * count * more / (count + more)
        mean += ahead * more / (count + more)
        count, least, most = count + more, min(least, values.min()), max(most, values.max())
    lines = [f"{name}: nan or inf in {broken} frames"] if broken else []
    lines += [f"{name}: constant, always {least:g}"] if count and least == most else []
    found = {"min": least, "max": most, "mean": mean, "std": (squares / max(count, 1)) ** 0.5}
    return {kind: [float(value) if count else None] for kind, value in found.items()}, lines


def compute_statistics(values: np.ndarray) -> dict[str, list[float | None]]:
    """(N, ...) -> min, max, mean and std of every dimension over its finite values; None without finite values."""
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
    print_table(tasks, console)
    features = Table("feature", "type", "shape", "dimension", "min", "max", "mean", "std")
    for name, values in found["features"].items():
        shape = " x ".join(map(str, values["shape"]))
        numbers = found["statistics"].get(name)
        if numbers is None:
            features.add_row(name, values["dtype"], shape)
            continue
        size = prod(values["shape"])
        names = values["names"] if len(values["names"] or ()) == size else list(map(str, range(size)))
        for i, cells in enumerate(zip(*numbers.values(), strict=True)):
            head = (name, values["dtype"], shape) if i == 0 else ("", "", "")
            dimension = names[i] if len(numbers["min"]) == size else f"all {size:,}"
            features.add_row(*head, dimension, *("" if c is None else f"{c:.4g}" for c in cells))
    print_table(features, console)
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


def _check_values(dataset: Dataset, name: str) -> list[str]:
    """Warnings about values that a sensor or recording may have corrupted, by dimension."""
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


def _check_times(dataset: Dataset) -> list[str]:
    lines = []
    stamps = np.asarray(dataset.column("timestamp"), np.float64) if len(dataset) else np.empty(0)
    if not np.isfinite(stamps).all():
        return [f"time stamps are nan or inf in {int((~np.isfinite(stamps)).sum())} frames"]
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
