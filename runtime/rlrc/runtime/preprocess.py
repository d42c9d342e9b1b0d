"""Observations to what the graphs take: pictures, state, token ids. Training, export checks and serving use this code.

Everything is built from the manifest's specs and works on one observation or a batch of them. Needs numpy and PIL; the
tokenizers library is imported when a Tokenizer is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from rlrc.artifact import CameraSpec, NormStats, PolicySpec, PromptSpec, StateSpec
from rlrc.errors import UserError


def pictures(image: NDArray[np.uint8], camera: CameraSpec) -> NDArray[np.float32]:
    """uint8 (H, W, 3) or (N, H, W, 3) -> float32 ``(image / 255 - mean) / std`` of the camera's size and layout.

    "bilinear" is PIL's, which filters when it shrinks. Raises UserError for another size when the camera says "none".
    """
    size = (camera.height, camera.width)
    if image.shape[-3:-1] != size:
        if camera.resize == "none":
            raise _wrong_size(camera, image.shape[-3:-1])
        flat = [_bilinear(picture, camera) for picture in image.reshape(-1, *image.shape[-3:])]
        image = np.stack(flat).reshape(*image.shape[:-3], *size, 3)
    scale, offset = _pixel_affine(camera.mean, camera.std)
    pixels = image.astype(np.float32)
    pixels *= scale
    pixels += offset
    if camera.layout == "CHW":
        return np.ascontiguousarray(np.moveaxis(pixels, -1, -3))
    return pixels


def _bilinear(picture: NDArray[np.uint8], camera: CameraSpec) -> NDArray[np.uint8]:
    resized = Image.fromarray(picture).resize((camera.width, camera.height), Image.Resampling.BILINEAR)
    return np.asarray(resized)


@lru_cache(maxsize=16)
def _pixel_affine(
    mean: tuple[float, float, float], std: tuple[float, float, float]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(x / 255 - mean) / std as x * scale + offset."""
    deviation = np.asarray(std, np.float64)
    return (1 / (255 * deviation)).astype(np.float32), (-np.asarray(mean, np.float64) / deviation).astype(np.float32)


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


class Tokenizer:
    """An instruction to token ids, by the artifact's tokenizer and prompt template."""

    def __init__(self, path: Path, prompt: PromptSpec) -> None:
        from tokenizers import Tokenizer as Tokenizers

        try:
            self._tokenizer = Tokenizers.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"expected a tokenizers file, found {path}: {error}; copy it again from its source"
            ) from None
        self._tokenizer.no_padding()  # a file may carry its own; the prompt's rule is the only one
        self._tokenizer.no_truncation()
        self.prompt = prompt

    def __call__(self, instruction: str) -> NDArray[np.int64]:
        """-> ids (max_tokens,), padded on the right. Raises UserError for an instruction that does not fit."""
        prompt = self.prompt
        try:
            ids = self._tokenizer.encode(prompt.template.replace("{instruction}", instruction)).ids
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"expected an instruction of known words, found {instruction!r}: {error}; reword it"
            ) from None
        if len(ids) > prompt.max_tokens:
            raise UserError(
                f"expected an instruction of at most {prompt.max_tokens} tokens with its template, "
                f"found {len(ids)} in {instruction!r}; shorten it"
            )
        padded = np.full(prompt.max_tokens, prompt.pad_id, np.int64)
        padded[: len(ids)] = ids
        return padded


def check(observation: Mapping[str, Any], spec: PolicySpec) -> None:
    """Refuses, with one line, an observation that the policy cannot take: see rlrc.runtime.policy for its form."""
    expected = {f"image.{camera.name}" for camera in spec.cameras} | {"instruction"}
    if spec.state is not None:
        expected.add("state")
    if observation.keys() != expected:
        missing, unknown = sorted(expected - observation.keys()), sorted(observation.keys() - expected)
        found = [f"no {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(unknown)}"] * bool(unknown)
        raise UserError(
            f"expected an observation with {', '.join(sorted(expected))}, found {' and '.join(found)}; "
            "name the observation's entries as the policy does (see rlrc inspect)"
        )
    for camera in spec.cameras:
        _check_picture(observation[f"image.{camera.name}"], camera)
    if spec.state is not None:
        _check_state(observation["state"], spec.state)
    instruction = observation["instruction"]
    if not isinstance(instruction, str) or not instruction.strip():
        found_instruction = repr(instruction) if isinstance(instruction, str) else type(instruction).__name__
        raise UserError(
            f"expected instruction to be a non-empty string, found {found_instruction}; say what the robot is to do"
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
        raise _wrong_size(camera, picture.shape[:2])


def _wrong_size(camera: CameraSpec, found: tuple[int, ...]) -> UserError:
    return UserError(
        f"expected image.{camera.name} of {camera.height} x {camera.width} pixels (height x width), "
        f"found {found[0]} x {found[1]}; set the camera to that size (this policy does not resize)"
    )


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
