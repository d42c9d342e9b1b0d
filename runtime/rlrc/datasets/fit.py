"""A data set as a policy sees it: which camera is which, whether state and actions fit, and raw training samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import CameraSpec, PolicySpec
from rlrc.datasets.lerobot import Dataset
from rlrc.datasets.meta import ACTION, ENVIRONMENT, PICTURES, STATE
from rlrc.errors import UserError
from rlrc.runtime.pictures import wrong_size
from rlrc.wiring import check_distinct


@dataclass(frozen=True)
class Sample:
    """An observation as rlrc.runtime.preprocess.prepare takes it, and what follows it.

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
    to another. The state is ``observation.state``, and ``observation.environment_state`` behind it where the policy's
    is that wide.
    """
    if not len(dataset):
        raise UserError(f"expected frames in {dataset.path}, found none; record some")
    chosen = _cameras(dataset, spec, cameras or {})
    state = _state(dataset, spec)
    _check_width(dataset, (ACTION,), spec.action.names, "action")
    for name in (*state, ACTION):
        _check_finite(dataset, name)
    if spec.prompt is not None:
        _check_tasks(dataset)
    return Matched(dataset, spec, chosen, state)


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


def _cameras(dataset: Dataset, spec: PolicySpec, mapping: Mapping[str, str]) -> dict[str, str]:
    names = [camera.name for camera in spec.cameras]
    for name in mapping:
        if name not in names:
            raise UserError(
                f"expected cameras of the policy ({', '.join(names)}) to be mapped, found {name}; correct it"
            )
    chosen = {}
    for camera in spec.cameras:
        wanted = mapping.get(camera.name, camera.name)
        feature = _camera(dataset, wanted)
        if feature is None:
            if camera.optional and camera.name not in mapping:
                continue
            there = ", ".join(name.removeprefix(PICTURES) for name in dataset.cameras) or "none"
            raise UserError(
                f"expected the camera {wanted} in {dataset.path}, found {there}; map the policy's cameras "
                f"({', '.join(names)}) to those of the data set"
            )
        _check_size(dataset, camera, feature)
        chosen[camera.name] = feature
    check_distinct(chosen, "camera of the data set", "cameras of the policy", "--cameras POLICY DATASET")
    if names and not chosen:
        raise UserError(
            f"expected one of the cameras {', '.join(names)} in {dataset.path}, found "
            f"{', '.join(dataset.cameras) or 'none'}; say which is which: --cameras POLICY DATASET"
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
    features = tuple(name for name in (STATE, ENVIRONMENT) if name in dataset.features)
    if len(features) == 2 and _width(dataset, features) == len(spec.state.names):
        return features
    alone = features[:1] or (STATE,)
    _check_width(dataset, alone, spec.state.names, "state")
    return alone


def _width(dataset: Dataset, features: Sequence[str]) -> int:
    return sum(dataset.features[name].shape[0] for name in features)


def _check_width(dataset: Dataset, features: Sequence[str], names: Sequence[str], what: str) -> None:
    (name,) = features
    feature = dataset.features.get(name)
    if feature is not None and feature.numeric and feature.shape == (len(names),):
        return
    found = "none" if feature is None else f"{feature.dtype} {feature.shape}"
    if feature is not None and feature.names:
        found += f": {', '.join(feature.names)}"
    raise UserError(
        f"expected {name} of shape ({len(names)},) in {dataset.path}, the policy's {what} ({', '.join(names)}), "
        f"found {found}; choose a data set of the same robot"
    )


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


def _check_tasks(dataset: Dataset) -> None:
    for index in np.unique(dataset.column("task_index")):
        if not dataset.tasks[index].strip():
            raise UserError(
                f"expected a task in words for the policy's prompt with every frame in {dataset.path}, found none for "
                f"task_index {index}; write it into meta/tasks.parquet"
            )
