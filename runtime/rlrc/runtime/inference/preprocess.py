"""From an observation to the model's inputs: pixels, state, token ids. Training, export checks and serving use it.

Everything follows from the manifest's specs. Needs numpy and PIL; creating a Tokenizer imports the tokenizers library.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlrc.artifact import CameraSpec, NormStats, PolicySpec, StateSpec
from rlrc.errors import UserError
from rlrc.runtime.inference.pictures import to_pixels, wrong_size
from rlrc.runtime.inference.prompts import Tokenizer as Tokenizer


class ModelInputs(NamedTuple):
    """One observation, preprocessed.

    ``pixels``: float32 (H, W, C) of every camera present, in the order of the policy's cameras; ``ids``: int64 (L,);
    ``state``: float32 (S,), normalised and padded with zeros.
    """

    pixels: list[NDArray[np.float32]]
    ids: NDArray[np.int64] | None
    state: NDArray[np.float32] | None


def prepare(observation: Mapping[str, Any], spec: PolicySpec, tokenizer: Tokenizer | None) -> ModelInputs:
    """Preprocesses an observation that ``check`` accepts. ``tokenizer``: that of the policy's prompt, if it has one.

    Raises UserError for an instruction that is too long, and for tokens outside the policy's vocabulary.
    """
    pixels = [
        to_pixels(observation[f"image.{camera.name}"], camera)
        for camera in spec.cameras
        if f"image.{camera.name}" in observation
    ]
    state = None if spec.state is None else normalise(observation["state"], spec.state.norm)
    ids = None if tokenizer is None else tokenizer(observation["instruction"], state)
    if ids is not None:
        _check_ids(ids, spec)
    return ModelInputs(pixels, ids, None if state is None else select_state(state, spec))


def _check_ids(ids: NDArray[np.int64], spec: PolicySpec) -> None:
    """Raises UserError for a token without a row in the policy's embedding: engines fail or read out of bounds."""
    rows = spec.geometry.get("vocabulary")
    if isinstance(rows, int) and ids.size and (largest := int(ids.max())) >= rows:
        raise UserError(
            f"expected tokens below {rows}, the rows of the policy's embedding, found token {largest} in the prompt; "
            "use the tokenizer that the policy was trained with, or leave its special words out of the instruction"
        )


def select_state(state: NDArray[np.float32], spec: PolicySpec) -> NDArray[np.float32] | None:
    """The model's state input (..., width) from a normalised state (..., names), padded with zeros.

    None if the policy has no state, or has it in the prompt.
    """
    if spec.state is None or prompt_has_state(spec):
        return None
    more = (spec.state.width or 0) - len(spec.state.names)
    return np.pad(state, [(0, 0)] * (state.ndim - 1) + [(0, more)]) if more > 0 else state


def prompt_has_state(spec: PolicySpec) -> bool:
    """Whether the state is part of the prompt. The model then has no state input."""
    return spec.prompt is not None and spec.prompt.state_bins > 0


def normalise(x: ArrayLike, stats: NormStats) -> NDArray[np.float32]:
    """Raw (..., D) -> ``(x - center) / scale`` in float32, clipped to ``[-clip, clip]`` if ``clip`` is set."""
    center, scale = _affine(stats)
    # In float64, so that raw values far from zero (a pose in millimetres) keep their precision.
    normalised = ((np.asarray(x, np.float64) - center) / scale).astype(np.float32)
    return normalised if stats.clip is None else np.clip(normalised, -stats.clip, stats.clip)


def unnormalise(x: ArrayLike, stats: NormStats) -> NDArray[np.float32]:
    """The inverse of ``normalise``, without clipping: ``x * scale + center`` in float32."""
    center, scale = _affine(stats)
    return (np.asarray(x, np.float64) * scale + center).astype(np.float32)


@lru_cache(maxsize=64)
def _affine(stats: NormStats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    center, scale = np.asarray(stats.center, np.float64), np.asarray(stats.scale, np.float64)
    if center.shape != scale.shape or not (np.isfinite(center).all() and np.isfinite(scale).all() and scale.all()):
        raise UserError(
            f"expected normalisation statistics with as many finite centers as finite, non-zero scales, found centers "
            f"{stats.center} and scales {stats.scale}; correct them in the artifact's source"
        )
    return center, scale


def bin_centers(bins: int) -> NDArray[np.float32]:
    """Centers (bins,) of equal-width bins over [-1, 1]."""
    return ((np.arange(bins) + 0.5) / bins * 2 - 1).astype(np.float32)


def to_bins(actions: ArrayLike, bins: int) -> NDArray[np.int64]:
    """Normalised actions of any shape -> the bin of each; beyond [-1, 1] the outermost bin."""
    values = np.asarray(actions, np.float64)
    if not np.isfinite(values).all():
        raise UserError("expected finite normalised actions, found nan or inf; remove those samples from the data")
    return np.clip(np.floor((values + 1) / 2 * bins), 0, bins - 1).astype(np.int64)


def check(observation: Mapping[str, Any], spec: PolicySpec) -> None:
    """Raises UserError for an observation that does not fit the policy (format: rlrc.runtime.inference.policy)."""
    _check_names(observation, spec)
    for camera in spec.cameras:
        if f"image.{camera.name}" in observation:
            _check_picture(observation[f"image.{camera.name}"], camera)
    if spec.state is not None:
        _check_state(observation["state"], spec.state)
    if "noise" in observation:
        _check_noise(observation["noise"], spec)
    if spec.prompt is None:
        return
    instruction = observation["instruction"]
    if not isinstance(instruction, str) or not instruction.strip():
        found = repr(instruction) if isinstance(instruction, str) else type(instruction).__name__
        raise UserError(f"expected instruction to be a non-empty string, found {found}; describe the task")


def _check_names(observation: Mapping[str, Any], spec: PolicySpec) -> None:
    cameras = {f"image.{camera.name}": camera for camera in spec.cameras}
    needed = {name for name, camera in cameras.items() if not camera.optional}
    needed |= {"state"} if spec.state is not None else set()
    needed |= {"instruction"} if spec.prompt is not None else set()
    # A policy for one task needs no instruction, but clients often send one to every policy.
    known = needed | cameras.keys() | {"instruction"} | ({"noise"} if spec.flow is not None else set())
    missing, unknown = sorted(needed - observation.keys()), sorted(observation.keys() - known)
    if not missing and not unknown and (not cameras or cameras.keys() & observation.keys()):
        return
    found = [f"no {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(unknown)}"] * bool(unknown)
    may = sorted(known - needed - {"instruction"})
    raise UserError(
        f"expected an observation with {', '.join(sorted(needed))}{' and optionally ' * bool(may)}{', '.join(may)}, "
        f"found {' and '.join(found) or 'no picture'}; "
        "name the observation's entries as the policy does (see rlrc inspect)"
    )


def _check_picture(picture: Any, camera: CameraSpec) -> None:
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8:
        found = f"dtype {picture.dtype}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise UserError(f"expected image.{camera.name} as a uint8 array, found {found}; give values from 0 to 255")
    if picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        raise UserError(
            f"expected image.{camera.name} of shape (height, width, 3), found {picture.shape}; "
            "give one RGB picture, channels last"
        )
    if camera.resize == "none" and picture.shape[:2] != (camera.height, camera.width):
        raise wrong_size(camera, picture.shape[:2])


def _check_state(state: Any, spec: StateSpec) -> None:
    try:
        values = np.asarray(state)
    except ValueError:  # a ragged list
        values = np.empty(0, object)
    if values.dtype.kind != "f":
        raise UserError(
            f"expected state as floating-point numbers, found {values.dtype}; give {', '.join(spec.units)} as floats"
        )
    if values.shape != (len(spec.names),):
        raise UserError(
            f"expected state of shape ({len(spec.names)},), found {values.shape}; give {', '.join(spec.names)}"
        )
    with np.errstate(over="ignore"):  # values beyond float32 become infinite
        finite = np.isfinite(values.astype(np.float32))
    if not finite.all():
        broken = int(np.argmin(finite))
        raise UserError(
            f"expected finite state, found {values[broken]} in {spec.names[broken]} (dimension {broken}); "
            "check that sensor"
        )


def _check_noise(noise: Any, spec: PolicySpec) -> None:
    assert spec.flow is not None
    shape = (spec.action.horizon, spec.flow.width)
    if not isinstance(noise, np.ndarray) or noise.dtype.kind != "f" or noise.shape != shape:
        found = f"{noise.dtype} {noise.shape}" if isinstance(noise, np.ndarray) else type(noise).__name__
        raise UserError(
            f"expected noise as a float array of shape {shape}, found {found}; leave it out to draw it at random"
        )
    if not np.isfinite(noise).all():
        raise UserError("expected finite noise, found nan or inf; leave it out to draw it at random")
