"""Pictures to pixels: resize by the camera's rule, normalise, repeat the colours for every vision encoder.

For one picture or a batch. Needs numpy and PIL.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rlrc.artifact import CameraSpec
from rlrc.errors import UserError

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def to_pixels(image: NDArray[np.uint8], camera: CameraSpec) -> NDArray[np.float32]:
    """uint8 (H, W, 3) or (N, H, W, 3) -> float32 ``(image / 255 - mean) / std`` of the camera's size and layout.

    Three channels per encoder, as in ``mean``. Raises UserError for another size if the camera's ``resize`` is "none".
    """
    values = _resize(image, camera)
    *batch, rows, columns, _ = values.shape
    encoders = len(camera.mean) // 3
    # Whole rows at a time: numpy takes six times as long in loops over three colours.
    pixels: NDArray[Any] = values.reshape(*batch, rows, columns * 3)
    if encoders > 1:
        pixels = pixels.take(_colour_indices(columns, encoders), -1)
    pixels = pixels.astype(np.float32)
    mean, std = _row_colours(camera.mean, camera.std, columns)
    pixels /= 255  # the order of operations of the policies' own code, for bit-identical results
    pixels -= mean
    pixels /= std
    if (rows, columns) != (camera.height, camera.width):
        pixels = _pad(pixels, camera)
    pixels = pixels.reshape(*batch, camera.height, camera.width, 3 * encoders)
    if camera.layout == "CHW":
        return np.ascontiguousarray(np.moveaxis(pixels, -1, -3))
    return pixels


def wrong_size(camera: CameraSpec, found: tuple[int, ...]) -> UserError:
    """The error for a picture of size ``found`` (height, width) where the camera does not resize."""
    return UserError(
        f"expected image.{camera.name} of {camera.height} x {camera.width} pixels (height x width), "
        f"found {found[0]} x {found[1]}; set the camera to that size (this policy does not resize)"
    )


def _resize(image: NDArray[np.uint8], camera: CameraSpec) -> NDArray[Any]:
    """(..., H, W, 3) -> values from 0 to 255 of the camera's size, or smaller where padding follows."""
    found = (image.shape[-3], image.shape[-2])
    size = _fit_size(found, camera) if camera.resize in ("pad", "pad-left-top") else (camera.height, camera.width)
    if found == size:
        return image
    if camera.resize == "none":
        raise wrong_size(camera, found)
    if camera.resize not in _FILTERS:
        return _interpolate(image, size)
    flat = [_resize_with_pil(picture, camera) for picture in image.reshape(-1, *image.shape[-3:])]
    return np.stack(flat).reshape(*image.shape[:-3], *size, 3)


def _resize_with_pil(picture: NDArray[np.uint8], camera: CameraSpec) -> NDArray[np.uint8]:
    resized = Image.fromarray(picture).resize((camera.width, camera.height), _FILTERS[camera.resize])
    return np.asarray(resized)


def _fit_size(found: tuple[int, int], camera: CameraSpec) -> tuple[int, int]:
    """The largest size of the same proportions within the camera's, rounded down as lerobot does."""
    ratio = max(found[1] / camera.width, found[0] / camera.height)
    return max(1, int(found[0] / ratio)), max(1, int(found[1] / ratio))


def _interpolate(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.float32]:
    """Bilinear without anti-aliasing, as torch's ``F.interpolate(mode="bilinear", align_corners=False)``."""
    top, bottom, down = _taps(image.shape[-3], size[0])
    left, right, across = _taps(image.shape[-2], size[1])
    flat = image.reshape(*image.shape[:-2], -1)  # (..., H, W * 3)
    first, last = ((taps[:, None] * 3 + np.arange(3)).ravel() for taps in (left, right))
    across = np.repeat(across, 3)

    def blend(taps: NDArray[np.int64]) -> NDArray[np.float32]:
        """These rows, interpolated along the columns."""
        rows = flat.take(taps, -2)
        values, others = rows.take(first, -1).astype(np.float32), rows.take(last, -1).astype(np.float32)
        others -= values
        others *= across
        others += values
        return others

    above, below = blend(top), blend(bottom)
    below -= above
    below *= down[:, None]
    below += above
    return below.reshape(*image.shape[:-3], *size, 3)


@lru_cache(maxsize=32)
def _taps(found: int, wanted: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """For every output position, the two input positions around it and the weight of the second.

    In float32 with a single rounding, as torch's fused multiply-add: other rounding changes pixels of large pictures by
    6e-5.
    """
    scale = np.float64(np.float32(found) / np.float32(wanted))
    place = np.maximum((scale * (np.arange(wanted) + 0.5) - 0.5).astype(np.float32), np.float32(0))
    first = np.minimum(place.astype(np.int64), found - 1)
    return first, np.minimum(first + 1, found - 1), np.clip(place - first.astype(np.float32), 0, 1)


def _pad(pixels: NDArray[np.float32], camera: CameraSpec) -> NDArray[np.float32]:
    """Puts normalised rows (..., rows, columns * C) on a black canvas of the camera's size."""
    channels = len(camera.mean)
    rows, columns = pixels.shape[-2], pixels.shape[-1] // channels
    top, left = camera.height - rows, camera.width - columns
    if camera.resize == "pad":
        top, left = top // 2, left // 2
    mean, std = _row_colours(camera.mean, camera.std, camera.width)
    canvas = np.empty((*pixels.shape[:-2], camera.height, camera.width * channels), np.float32)
    canvas[:] = -mean / std
    canvas[..., top : top + rows, left * channels : (left + columns) * channels] = pixels
    return canvas


@lru_cache(maxsize=16)
def _colour_indices(columns: int, encoders: int) -> NDArray[np.int64]:
    """For a row of repeated channels (columns * 3 * encoders,): the index of each in the row of three colours."""
    return (np.arange(columns)[:, None] * 3 + np.arange(3 * encoders) % 3).ravel()


@lru_cache(maxsize=32)
def _row_colours(
    mean: tuple[float, ...], std: tuple[float, ...], columns: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and std for a row of ``columns`` pixels."""
    return np.tile(np.asarray(mean, np.float32), columns), np.tile(np.asarray(std, np.float32), columns)
