"""A data set as a policy sees it: which camera is which, whether state and actions fit, and raw training samples."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import CameraSpec, PolicySpec
from rlrc.datasets.lerobot import Dataset
from rlrc.datasets.meta import ACTION, ENVIRONMENT, PICTURES, STATE
from rlrc.errors import UserError
from rlrc.runtime.inference.pictures import wrong_size
from rlrc.strict import check_distinct

NONE = "none"  # instead of a camera's name: to do without it
EMPTY = re.compile(r"empty_camera_\d+")  # what lerobot calls places for cameras that are not there


@dataclass(frozen=True)
class Sample:
    """An observation as rlrc.runtime.inference.preprocess.prepare takes it, and what follows it.

    ``chunk`` float32 (horizon, D), raw; ``real`` bool (horizon,) is false beyond the episode's end.
    """

    observation: dict[str, Any]
    chunk: NDArray[np.float32]
    real: NDArray[np.bool_]


@dataclass(frozen=True)
class Matched:
    """A data set that fits a policy. ``cameras``: the policy's cameras that are there, and the features they are.

    ``state``: the features that make up the policy's state, one behind the other.
    """

    dataset: Dataset
    spec: PolicySpec
    cameras: dict[str, str]
    state: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.dataset)

    def samples(self, indices: Sequence[int] | NDArray[np.integer]) -> list[Sample]:
        """Of these frames of the data set, in the order given. Raises UserError for a damaged file."""
        found: dict[int, Sample] = {}
        for i in sorted({int(i) for i in indices}):  # pictures are cheap to decode in the order of the files
            found[i] = self._sample(i)
        return [found[int(i)] for i in indices]

    def observation(self, i: int) -> dict[str, Any]:
        """Of frame ``i``, as a robot would give it. Raises UserError for a damaged file."""
        dataset = self.dataset
        observation: dict[str, Any] = {
            f"image.{name}": dataset.picture(i, feature) for name, feature in self.cameras.items()
        }
        if self.state:
            parts = [np.atleast_1d(dataset.column(name)[i]) for name in self.state]
            observation["state"] = np.concatenate(parts).astype(np.float32)
        if self.spec.prompt is not None:
            observation["instruction"] = dataset.task(i)
        return observation

    def _sample(self, i: int) -> Sample:
        return Sample(self.observation(i), *self.dataset.chunk(i, self.spec.action.horizon))


def match(dataset: Dataset, spec: PolicySpec, cameras: Mapping[str, str] | None = None) -> Matched:
    """Raises UserError, which names the feature, what was expected and what was found, if the data set does not fit.

    A camera of the policy is the data set's of the same name behind ``observation.images.``, unless ``cameras`` maps it
    to another, or to "none": an optional camera may be missing, but only if that is asked for. (lerobot's
    ``empty_camera_0`` and so on are meant to be missing.) The state is ``observation.state``, and
    ``observation.environment_state`` behind it where the policy's is that wide.
    """
    _check_frames(dataset)
    matched = Matched(dataset, spec, _cameras(dataset, spec, cameras or {}), _state(dataset, spec))
    _check_action(dataset, spec)
    _check_tasks(dataset, spec)
    return matched


def misfits(dataset: Dataset, spec: PolicySpec, cameras: Mapping[str, str] | None = None) -> list[str]:
    """A line for each reason of ``match`` to refuse."""
    lines = []
    checks: tuple[Callable[[], object], ...] = (
        lambda: _check_frames(dataset),
        lambda: _cameras(dataset, spec, cameras or {}),
        lambda: _state(dataset, spec),
        lambda: _check_action(dataset, spec),
        lambda: _check_tasks(dataset, spec),
    )
    for check in checks:
        try:
            check()
        except UserError as error:
            lines.append(str(error))
            if not len(dataset):
                break
    return lines


def renamed(dataset: Dataset, matched: Matched) -> list[str]:
    """What fits by its place only, because policy and data set name it differently, and what is not used: a line each.

    Whether it is the same is for a person to judge.
    """
    spec, lines = matched.spec, []
    state = spec.state.names if spec.state is not None else ()
    for what, features, names in (("state", matched.state, state), ("action", (ACTION,), spec.action.names)):
        found = _dimensions(dataset, features)
        if found and found != names and not _numbered(names) and not _numbered(found):
            lines.append(
                f"the policy's {what} ({', '.join(names)}) is taken in this order from {' and '.join(features)} "
                f"({', '.join(found)})"
            )
    own = (STATE, ENVIRONMENT)
    unused = [name for name in dataset.cameras if name not in matched.cameras.values()]
    unused += [name for name in own if name in dataset.features and name not in matched.state]
    return lines + [f"{name} is not used: the policy does not take it" for name in unused]


def split(dataset: Dataset, held_out: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The frames to train on and those of the held-out episodes, a share of ``held_out`` of all, drawn by the seed.

    Whole episodes, and at least one on either side (none is held out for a share of 0). Raises UserError.
    """
    episodes = dataset.episodes
    if not 0 <= held_out < 1:
        raise UserError(
            f"expected a held-out share of at least 0 and below 1, found {held_out:g}; give 0.1, for instance"
        )
    if held_out and len(episodes) < 2:
        raise UserError(
            f"expected at least two episodes in {dataset.path} to hold some out, found {len(episodes)}; hold out 0"
        )
    number = min(len(episodes) - 1, max(1, round(held_out * len(episodes)))) if held_out else 0
    drawn = set(np.random.default_rng(seed).permutation(len(episodes))[:number].tolist())
    held = np.isin(dataset.column("episode_index"), sorted(drawn))
    return np.flatnonzero(~held), np.flatnonzero(held)


def _check_frames(dataset: Dataset) -> None:
    if not len(dataset):
        raise UserError(f"expected frames in {dataset.path}, found none; record some")


def _cameras(dataset: Dataset, spec: PolicySpec, mapping: Mapping[str, str]) -> dict[str, str]:
    """The feature of every camera of the policy that is not left out on purpose."""
    mapping = {name.removeprefix(PICTURES): other for name, other in mapping.items()}
    names = {camera.name: camera for camera in spec.cameras}
    there = ", ".join(name.removeprefix(PICTURES) for name in dataset.cameras) or "none"
    for name in mapping:
        if name not in names:
            raise UserError(
                f"expected cameras of the policy ({', '.join(names)}) to be mapped, found {name}; correct it "
                "(--cameras POLICY DATASET)"
            )
    chosen, lacking = dict[str, str](), dict[str, str]()
    for name, camera in names.items():
        wanted = mapping.get(name, NONE if camera.optional and EMPTY.fullmatch(name) else name)
        feature = _camera(dataset, wanted)
        if feature is not None:
            _check_size(dataset, camera, feature)
            chosen[name] = feature
        elif wanted != NONE or not camera.optional:
            lacking[name] = name if wanted in (name, NONE) else f"{name} as {wanted}"
    if lacking:
        first = next(iter(lacking))
        without = f", or --cameras {first} {NONE} to do without it" if names[first].optional else ""
        raise UserError(
            f"expected the policy's camera{'s' * (len(lacking) > 1)} {', '.join(lacking.values())} in {dataset.path}, "
            f"found {there}; say which is which: --cameras {first} NAME{without}"
        )
    check_distinct(chosen, "camera of the data set", "cameras of the policy", "--cameras POLICY DATASET")
    if names and not chosen:
        raise UserError(
            f"expected one of the cameras {', '.join(names)} in {dataset.path}, found {there}; say which is which: "
            f"--cameras {next(iter(names))} NAME"
        )
    return chosen


def _camera(dataset: Dataset, name: str) -> str | None:
    """The feature of a camera that is called by its full name or by what follows ``observation.images.``."""
    return next((full for full in (name, PICTURES + name) if full in dataset.cameras), None)


def _check_size(dataset: Dataset, camera: CameraSpec, feature: str) -> None:
    found = dataset.features[feature].size
    if camera.resize == "none" and found != (camera.height, camera.width):
        raise UserError(f"{feature} of {dataset.path}: {wrong_size(camera, found)}")


def _state(dataset: Dataset, spec: PolicySpec) -> tuple[str, ...]:
    if spec.state is None:
        return ()
    found = [name for name in (STATE, ENVIRONMENT) if name in dataset.features and dataset.features[name].numeric]
    both = len(found) == 2 and sum(prod(dataset.features[name].shape) for name in found) == len(spec.state.names)
    features = tuple(found if both else found[:1] or (STATE,))
    _check_numbers(dataset, features, spec.state.names, "state")
    return features


def _check_action(dataset: Dataset, spec: PolicySpec) -> None:
    _check_numbers(dataset, (ACTION,), spec.action.names, "action")


def _check_numbers(dataset: Dataset, features: tuple[str, ...], names: tuple[str, ...], what: str) -> None:
    """Whether features, one behind the other, have the policy's width and none of its names at another place."""
    found = [dataset.features.get(name) for name in features]
    widths = [
        feature.shape[0] if feature and feature.numeric and len(feature.shape) == 1 else None for feature in found
    ]
    dimensions = _dimensions(dataset, features)
    if None in widths or sum(width or 0 for width in widths) != len(names):
        text = " and ".join(f"{feature.dtype} {feature.shape}" if feature else "none" for feature in found)
        text += f": {', '.join(dimensions)}" if dimensions else ""
        raise UserError(
            f"expected {' and '.join(features)} of shape ({len(names)},) in {dataset.path}, the policy's {what} "
            f"({', '.join(names)}), found {text}; choose a data set of the same robot"
        )
    if dimensions and not _numbered(names) and not _numbered(dimensions):
        for i, name in enumerate(names):
            if name in dimensions and dimensions.index(name) != i:
                raise UserError(
                    f"expected {' and '.join(features)} in the order of the policy's {what} ({', '.join(names)}) in "
                    f"{dataset.path}, found {', '.join(dimensions)}; write the data set in the policy's order"
                )
    for feature_name in features:
        _check_finite(dataset, feature_name)


def _dimensions(dataset: Dataset, features: Sequence[str]) -> tuple[str, ...]:
    """The names of the features' dimensions, or nothing unless all have names."""
    found = [dataset.features[name].names or () if name in dataset.features else () for name in features]
    return tuple(name for names in found for name in names) if all(found) else ()


def _numbered(names: Sequence[str]) -> bool:
    """Names that only count (joint_0, joint_1, ...), as those that rlrc gives where a checkpoint has none."""
    found = [re.fullmatch(r"(.*?)(\d+)", name) for name in names]
    heads = {match[1] for match in found if match}
    numbers = [int(match[2]) for match in found if match]
    return None not in found and len(heads) == 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def _check_finite(dataset: Dataset, name: str) -> None:
    values = dataset.column(name)
    broken = ~np.isfinite(values.reshape(len(values), -1)).all(1)
    if broken.any():
        i = int(np.argmax(broken))
        episode = dataset.episode(i)
        raise UserError(
            f"expected finite {name} in {dataset.path}, found nan or inf in {int(broken.sum())} frames, first in frame "
            f"{i - episode.start} of episode {episode.index}; remove those episodes"
        )


def _check_tasks(dataset: Dataset, spec: PolicySpec) -> None:
    if spec.prompt is None:
        return
    for index in np.unique(dataset.column("task_index")):
        if not dataset.tasks[index].strip():
            raise UserError(
                f"expected a task in words for the policy's prompt with every frame in {dataset.path}, found none for "
                f"task_index {index}; write it into meta/tasks.parquet"
            )
