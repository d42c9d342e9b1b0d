"""Match a data set to a policy: its cameras, whether state and actions fit, and raw training samples."""

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

NONE = "none"  # instead of a camera's name: leave this camera out
EMPTY = re.compile(r"empty_camera_\d+")  # lerobot's name for a camera that does not exist


@dataclass(frozen=True)
class Sample:
    """An observation for rlrc.runtime.inference.preprocess.prepare, and the actions that follow it.

    ``chunk`` float32 (horizon, D), raw; ``real`` bool (horizon,) is false beyond the episode's end.
    """

    observation: dict[str, Any]
    chunk: NDArray[np.float32]
    real: NDArray[np.bool_]


@dataclass(frozen=True)
class MatchedDataset:
    """A data set that fits a policy. ``cameras``: from the policy's cameras to the data set's features.

    ``state``: the features that are concatenated to the policy's state.
    """

    dataset: Dataset
    spec: PolicySpec
    cameras: dict[str, str]
    state: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.dataset)

    def samples(self, indices: Sequence[int] | NDArray[np.integer]) -> list[Sample]:
        """The samples of these frames, in the given order. Raises UserError for a damaged file."""
        found: dict[int, Sample] = {}
        for i in sorted({int(i) for i in indices}):  # decoding pictures is cheap in the order of the files
            found[i] = self._sample(i)
        return [found[int(i)] for i in indices]

    def observation(self, i: int) -> dict[str, Any]:
        """The observation of frame ``i``, in a robot's format. Raises UserError for a damaged file."""
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


def match(dataset: Dataset, spec: PolicySpec, cameras: Mapping[str, str] | None = None) -> MatchedDataset:
    """Raises UserError, which names the feature, if the data set does not fit the policy.

    A camera of the policy is the feature ``observation.images.`` plus its name, unless ``cameras`` maps it to another
    one, or to "none": an optional camera may only be missing on request (except lerobot's ``empty_camera_0`` and so
    on). The state is ``observation.state``, followed by ``observation.environment_state`` if the policy's state has the
    width of both.
    """
    _check_frames(dataset)
    matched = MatchedDataset(dataset, spec, _cameras(dataset, spec, cameras or {}), _state(dataset, spec))
    _check_action(dataset, spec)
    _check_tasks(dataset, spec)
    return matched


def find_misfits(dataset: Dataset, spec: PolicySpec, cameras: Mapping[str, str] | None = None) -> list[str]:
    """One line for each reason why ``match`` would fail."""
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


def describe_differences(dataset: Dataset, matched: MatchedDataset) -> list[str]:
    """One line for each vector matched by position although the names differ, and for each unused feature.

    The user must decide whether such vectors mean the same.
    """
    spec, lines = matched.spec, []
    state = spec.state.names if spec.state is not None else ()
    for what, features, names in (("state", matched.state, state), ("action", (ACTION,), spec.action.names)):
        found = _dimensions(dataset, features)
        if found and found != names and not _are_numbered(names) and not _are_numbered(found):
            lines.append(
                f"the policy's {what} ({', '.join(names)}) is taken in this order from {' and '.join(features)} "
                f"({', '.join(found)})"
            )
    own = (STATE, ENVIRONMENT)
    unused = [name for name in dataset.cameras if name not in matched.cameras.values()]
    unused += [name for name in own if name in dataset.features and name not in matched.state]
    return lines + [f"{name} is not used: the policy does not take it" for name in unused]


def split(dataset: Dataset, held_out: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The frames to train on and those of held-out episodes: a random share ``held_out`` of all episodes, by the seed.

    At least one episode on either side; a share of 0 holds none out. Raises UserError if that is impossible.
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
    """The feature of every camera of the policy, except those left out on request."""
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
        without = f", or --cameras {first} {NONE} to leave it out" if names[first].optional else ""
        raise UserError(
            f"expected the policy's camera{'s' * (len(lacking) > 1)} {', '.join(lacking.values())} in {dataset.path}, "
            f"found {there}; map them with --cameras {first} NAME{without}"
        )
    check_distinct(chosen, "camera of the data set", "cameras of the policy", "--cameras POLICY DATASET")
    if names and not chosen:
        raise UserError(
            f"expected one of the cameras {', '.join(names)} in {dataset.path}, found {there}; map it with "
            f"--cameras {next(iter(names))} NAME"
        )
    return chosen


def _camera(dataset: Dataset, name: str) -> str | None:
    """The feature of a camera, given by its full name or the part behind ``observation.images.``."""
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
    """Raises UserError unless the concatenated features have the policy's width, with no known name out of place."""
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
    if dimensions and not _are_numbered(names) and not _are_numbered(dimensions):
        for i, name in enumerate(names):
            if name in dimensions and dimensions.index(name) != i:
                raise UserError(
                    f"expected {' and '.join(features)} in the order of the policy's {what} ({', '.join(names)}) in "
                    f"{dataset.path}, found {', '.join(dimensions)}; write the data set in the policy's order"
                )
    for feature_name in features:
        _check_finite(dataset, feature_name)


def _dimensions(dataset: Dataset, features: Sequence[str]) -> tuple[str, ...]:
    """The names of the features' dimensions; empty unless all features have names."""
    found = [dataset.features[name].names or () if name in dataset.features else () for name in features]
    return tuple(name for names in found for name in names) if all(found) else ()


def _are_numbered(names: Sequence[str]) -> bool:
    """Whether names only count (joint_0, joint_1, ...), as rlrc makes them up for a checkpoint without names."""
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
                f"expected a task for the policy's prompt with every frame in {dataset.path}, found none for "
                f"task_index {index}; write it into meta/tasks.parquet"
            )
