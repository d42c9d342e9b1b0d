"""Observations to what the graphs take: pictures, state, token ids. Training, export checks and serving use this code.

Everything is built from the manifest's specs. Needs numpy and PIL; the tokenizers library is imported when a Tokenizer
is made.
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
from rlrc.runtime.inference.prompts import Tokenizer


class ModelInputs(NamedTuple):
    """One observation as the policy takes it.

    ``pixels`` float32 (H, W, C) of every camera that is there, in the order of the policy's cameras; ``ids`` int64
    (L,); ``state`` float32 (S,), normalised and widened with zeros.
    """

    pixels: list[NDArray[np.float32]]
    ids: NDArray[np.int64] | None
    state: NDArray[np.float32] | None


def prepare(observation: Mapping[str, Any], spec: PolicySpec, tokenizer: Tokenizer | None) -> ModelInputs:
    """An observation that ``check`` accepts, prepared. ``tokenizer`` is that of the policy's prompt, if it has one.

    Raises UserError for an instruction that does not fit, and for tokens that the policy does not have.
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
    """Raises UserError for a token that the policy's embedding has no row of: engines read beyond the table or fail."""
    rows = spec.geometry.get("vocabulary")
    if isinstance(rows, int) and ids.size and (largest := int(ids.max())) >= rows:
        raise UserError(
            f"expected tokens below {rows}, the rows of the policy's embedding, found token {largest} in the prompt; "
            "use the tokenizer that the policy was trained with, or leave its special words out of the instruction"
        )


def select_state(state: NDArray[np.float32], spec: PolicySpec) -> NDArray[np.float32] | None:
    """What the policy gets of a normalised state (..., names): (..., width), zeros behind; None if its prompt tells."""
    if spec.state is None or prompt_has_state(spec):
        return None
    more = (spec.state.width or 0) - len(spec.state.names)
    return np.pad(state, [(0, 0)] * (state.ndim - 1) + [(0, more)]) if more > 0 else state


def prompt_has_state(spec: PolicySpec) -> bool:
    """Whether the prompt tells the state, so that the policy gets no other."""
    return spec.prompt is not None and spec.prompt.state_bins > 0


def normalise(x: ArrayLike, stats: NormStats) -> NDArray[np.float32]:
    """Raw (..., D) -> ``(x - center) / scale`` in float32, clipped to ``[-clip, clip]`` where the statistics say so."""
    center, scale = _affine(stats)
    # Subtracted in float64: a raw value far from zero (a pose in millimetres) keeps its digits.
    normalised = ((np.asarray(x, np.float64) - center) / scale).astype(np.float32)
    return normalised if stats.clip is None else np.clip(normalised, -stats.clip, stats.clip)


def unnormalise(x: ArrayLike, stats: NormStats) -> NDArray[np.float32]:
    """The inverse of ``normalise`` (without the clipping): ``x * scale + center`` in float32."""
    center, scale = _affine(stats)
    return (np.asarray(x, np.float64) * scale + center).astype(np.float32)


@lru_cache(maxsize=64)
def _affine(stats: NormStats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    center, scale = np.asarray(stats.center, np.float64), np.asarray(stats.scale, np.float64)
    if center.shape != scale.shape or not (np.isfinite(center).all() and np.isfinite(scale).all() and scale.all()):
        raise UserError(
            f"expected normalisation statistics with as many finite centers as finite, non-zero scales, found centers "
            f"{stats.center} and scales {stats.scale}; correct them where the artifact was made"
        )
    return center, scale


def bin_centers(bins: int) -> NDArray[np.float32]:
    """Centers (bins,) of equal-width bins over [-1, 1]."""
    return ((np.arange(bins) + 0.5) / bins * 2 - 1).astype(np.float32)


def to_bins(actions: ArrayLike, bins: int) -> NDArray[np.int64]:
    """Normalised actions of any shape -> the bin each falls into, the outermost one for what lies beyond [-1, 1]."""
    values = np.asarray(actions, np.float64)
    if not np.isfinite(values).all():
        raise UserError("expected finite normalised actions, found nan or inf; remove those samples from the data")
    return np.clip(np.floor((values + 1) / 2 * bins), 0, bins - 1).astype(np.int64)


def check(observation: Mapping[str, Any], spec: PolicySpec) -> None:
    """Refuses, with one line, an observation that the policy cannot take (its form: rlrc.runtime.inference.policy)."""
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
        raise UserError(f"expected instruction to be a non-empty string, found {found}; say what the robot is to do")


def _check_names(observation: Mapping[str, Any], spec: PolicySpec) -> None:
    cameras = {f"image.{camera.name}": camera for camera in spec.cameras}
    needed = {name for name, camera in cameras.items() if not camera.optional}
    needed |= {"state"} if spec.state is not None else set()
    needed |= {"instruction"} if spec.prompt is not None else set()
    # A policy of one task needs no instruction; but those who send observations tend to send it to all.
    known = needed | cameras.keys() | {"instruction"} | ({"noise"} if spec.flow is not None else set())
    missing, unknown = sorted(needed - observation.keys()), sorted(observation.keys() - known)
    if not missing and not unknown and (not cameras or cameras.keys() & observation.keys()):
        return
    found = [f"no {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(unknown)}"] * bool(unknown)
    may = sorted(known - needed - {"instruction"})
    raise UserError(
        f"expected an observation with {', '.join(sorted(needed))}{' and maybe ' * bool(may)}{', '.join(may)}, "
        f"found {' and '.join(found) or 'no picture'}; "
        "name the observation's entries as the policy does (see rlrc inspect)"
    )


def _check_picture(picture: Any, camera: CameraSpec) -> None:
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8:
        found = f"dtype {picture.dtype}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise UserError(
            f"expected image.{camera.name} as a uint8 array, found {found}; give the camera's bytes, 0 to 255"
        )
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
    with np.errstate(over="ignore"):  # beyond float32 counts as infinite
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
            f"expected noise as a float array of shape {shape}, found {found}; leave it out to have it drawn"
        )
    if not np.isfinite(noise).all():
        raise UserError("expected finite noise, found nan or inf; leave it out to have it drawn")
