"""Statistics of the training data set for policies without their own, as in LeRobot's training.

Base checkpoints such as lerobot/pi0_base have modes of normalisation but no statistics, and declare their largest state
and action. LeRobot normalises with the data set's statistics in the base's modes, then pads; for pictures it uses
ImageNet's statistics.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlrc.artifact import ActionSpec, NormStats, PolicySpec, StateSpec
from rlrc.artifact.describe import Recorded
from rlrc.compressor.checkpoints.layout import Normalisation
from rlrc.compressor.checkpoints.lerobot.features import dimension_names, meanings
from rlrc.compressor.checkpoints.lerobot.normaliser import IDENTITY, MODES, Values, affine, identity
from rlrc.errors import UserError
from rlrc.strict import encode, parse

if TYPE_CHECKING:
    from rlrc.datasets.lerobot import Dataset

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # LeRobot's use_imagenet_stats
PARTS = {"state": "observation.state", "environment_state": "observation.environment_state", "action": "action"}


def find_missing(record: Recorded) -> list[str]:
    """The inputs and outputs whose statistics are missing."""
    return [name for name, steps in record.items() if any(step["missing"] for step in steps)]


def find_normalised(record: Recorded) -> list[str]:
    """The inputs and outputs that one of LeRobot's modes normalises, with or without statistics."""
    return [name for name, steps in record.items() if any(step["mode"] in MODES for step in steps)]


def find_undecided(spec: PolicySpec, record: Recorded) -> list[str]:
    """The parts that the data set decides: those without statistics, and padded ones of a base with IDENTITY."""
    wide = [
        name
        for name in ("state", "action")
        if spec.flow is not None and all(step["mode"] == IDENTITY for step in record.get(name, [{"mode": ""}]))
        if len(set(_range(spec, name))) == 1
    ]
    return find_missing(record) + wide


def adopt_statistics(
    spec: PolicySpec, record: Recorded, names: Collection[str], dataset: Dataset, cameras: Mapping[str, str]
) -> tuple[PolicySpec, Recorded]:
    """The policy with the data set's statistics for the parts in ``names``, and its new record.

    A flow policy's state and action get the data set's widths, up to the policy's. Raises UserError for a data set that
    does not fit or lacks statistics.
    """
    record = dict(record)
    for name in names:
        if len(record[name]) != 1:
            raise UserError(
                f"expected one step that normalises {name}, found {len(record[name])}; rlrc cannot use the statistics "
                f"of {dataset.path} for several steps"
            )
        mode, eps = record[name][0]["mode"], record[name][0]["eps"]
        feature = PARTS.get(name) or _camera(dataset, name.removeprefix("image."), cameras)
        if name.startswith("image."):
            values, origin = _picture_statistics(dataset, feature, mode)
            spec = _replace_picture(spec, name.removeprefix("image."), affine(mode, values, 3, eps, feature))
        else:
            width = _width(dataset, feature, spec, name)
            if mode == IDENTITY:
                if width != _range(spec, name)[0]:
                    spec = _replace_numbers(spec, name, identity(width), dataset.features[feature].names)
                continue
            values, origin = _number_statistics(dataset, feature, mode)
            norm = affine(mode, values, width, eps, f"{feature} in {dataset.path}", inverse=name == "action")
            spec = _replace_numbers(spec, name, norm, dataset.features[feature].names)
        record[name] = [encode(Normalisation(feature, mode, f"{', '.join(MODES[mode])} of {origin}", eps=eps))]
    return spec, record


def _read_stats(dataset: Dataset, feature: str, mode: str) -> Values | None:
    """The mode's statistics in meta/stats.json, which LeRobot trains with; None if they are missing."""
    try:
        stats = parse((dataset.path / "meta/stats.json").read_bytes())[feature]
        return {name: torch.tensor(stats[name], dtype=torch.float64) for name in MODES[mode]}
    except (OSError, UserError, KeyError, TypeError, ValueError, RuntimeError):
        return None


def _number_statistics(dataset: Dataset, feature: str, mode: str) -> tuple[Values, str]:
    from rlrc.datasets.stats import compute_stats

    if (values := _read_stats(dataset, feature, mode)) is not None:
        return values, f"{feature} in {dataset.path / 'meta/stats.json'}"
    found = compute_stats(dataset.column(feature))
    rows = {name: torch.tensor(found[name], dtype=torch.float64) for name in MODES[mode]}
    return rows, f"{feature} in the rows of {dataset.path}"


def _picture_statistics(dataset: Dataset, feature: str, mode: str) -> tuple[Values, str]:
    if mode == "MEAN_STD":
        return {name: torch.tensor(values) for name, values in IMAGENET.items()}, "ImageNet, as LeRobot trains"
    if (values := _read_stats(dataset, feature, mode)) is not None:
        return values, f"{feature} in {dataset.path / 'meta/stats.json'}"
    raise UserError(
        f"expected {' and '.join(MODES[mode])} of {feature} in {dataset.path / 'meta/stats.json'}, because the "
        f"policy's mode is {mode}, found none; compute the data set's statistics again"
    )


def _camera(dataset: Dataset, name: str, cameras: Mapping[str, str]) -> str:
    chosen = cameras.get(name, name)
    return chosen if chosen in dataset.features else f"observation.images.{chosen}"


def _width(dataset: Dataset, name: str, spec: PolicySpec, part: str) -> int:
    """The width of the data set's feature. Raises UserError if the policy cannot take it."""
    feature = dataset.features.get(name)
    own, most = _range(spec, part)
    wanted = f"at most {most}" if most > own or spec.flow is not None else str(own)
    found = "none" if feature is None else f"{feature.dtype} {feature.shape}"
    if feature is not None and feature.numeric and len(feature.shape) == 1:
        width = feature.shape[0]
        if width == own or (spec.flow is not None and width <= most):
            return width
    raise UserError(
        f"expected {name} of {wanted} numbers in {dataset.path}, as in the policy, found {found}; choose a "
        "data set that fits it"
    )


def _range(spec: PolicySpec, part: str) -> tuple[int, int]:
    """The size of a part, and its largest possible size."""
    if part == "action":
        return spec.action.dim, spec.flow.width if spec.flow else spec.action.dim
    names = () if spec.state is None else spec.state.names
    environment = spec.geometry.get("environment", 0)  # of ACT, at the end of the state
    own = environment if part == "environment_state" else len(names) - environment
    return own, max(own, (spec.state and spec.state.width) or 0)


def _replace_numbers(spec: PolicySpec, part: str, norm: NormStats, names: Any) -> PolicySpec:
    dim = len(norm.center)
    dimensions = dimension_names(names, dim)
    if part == "action":
        action: ActionSpec = replace(
            spec.action, names=dimensions, meaning=meanings(dimensions), units=("1",) * dim, norm=norm
        )
        return replace(spec, action=action)
    state = spec.state
    assert state is not None
    own, _ = _range(spec, "state")
    first, last = (slice(0, own), slice(own, None)) if part == "state" else (slice(own, None), slice(0, own))

    def insert(new: tuple[Any, ...], old: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*new, *old[last]) if part == "state" else (*old[last], *new)

    named = dimensions if part == "state" else state.names[first]
    new: StateSpec = replace(
        state,
        names=insert(named, state.names),
        units=insert(("1",) * dim, state.units),
        norm=NormStats(insert(norm.center, state.norm.center), insert(norm.scale, state.norm.scale)),
    )
    return replace(spec, state=new)


def _replace_picture(spec: PolicySpec, name: str, norm: NormStats) -> PolicySpec:
    cameras = (
        replace(camera, mean=norm.center, std=norm.scale) if camera.name == name else camera for camera in spec.cameras
    )
    return replace(spec, cameras=tuple(cameras))


def open_dataset(path: str) -> Dataset:
    from rlrc.datasets.lerobot import Dataset

    return Dataset.open(Path(path))
