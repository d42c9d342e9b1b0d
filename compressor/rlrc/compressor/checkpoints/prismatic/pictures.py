"""The preparation of pictures by OpenVLA's PrismaticImageProcessor: preprocessor_config.json and config.json.

It resizes to a square, ignoring proportions ("resize-naive"), then normalises for every vision transformer. The file
holds the settings and the transforms derived from them (tvf_*). The original code uses the latter, which in published
checkpoints are the settings rounded to bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlrc.artifact import CameraSpec
from rlrc.compressor.checkpoints import settings
from rlrc.compressor.checkpoints.layout import Normalisation
from rlrc.errors import UserError

if TYPE_CHECKING:
    from rlrc.compressor.checkpoints.folder import Folder, ReadOptions

PREPROCESSOR = "preprocessor_config.json"
NAIVE = "resize-naive"

# Pixels on a side, by vision backbone.
PIXELS = {
    "dinov2-vit-l": 224,
    "siglip-vit-so400m": 224,
    "siglip-vit-so400m-384px": 384,
    "dinosiglip-vit-so-224px": 224,
    "dinosiglip-vit-so-384px": 384,
}
MEANS = {"dinov2": [0.485, 0.456, 0.406], "siglip": [0.5, 0.5, 0.5]}
DEVIATIONS = {"dinov2": [0.229, 0.224, 0.225], "siglip": [0.5, 0.5, 0.5]}
BICUBIC = 3  # PIL's number
ROUNDING = 2.0**-8  # of bfloat16


def camera(folder: Folder, options: ReadOptions, kinds: list[str]) -> CameraSpec:
    """The camera. ``kinds``: of the vision transformers, keys of MEANS. Raises UserError for unsupported settings."""
    processor = _processor(folder)
    settings.check(processor, settings.IMAGE_PROCESSOR, PREPROCESSOR, options)
    strategies = [values.get("image_resize_strategy", NAIVE) for values in (processor, folder.config)]
    methods = _read_list(processor, "interpolations")
    if strategies != [NAIVE, NAIVE] or any(method != "bicubic" for method in methods):
        raise UserError(
            f'expected image_resize_strategy "{NAIVE}" and interpolations "bicubic" in {folder.path}, found '
            f"{' and '.join(map(repr, strategies))} with {methods}; rlrc does not support that"
        )
    backbone = str(folder.config.get("vision_backbone_id"))
    sizes = folder.config.get("image_sizes") or PIXELS.get(backbone) or options.hints.get("image_size")
    listed: list[Any] = sizes if isinstance(sizes, list) else [sizes]
    if any(type(size) is not int or size < 1 or size != listed[0] for size in listed):
        raise UserError(
            f"expected one size in pixels as image_sizes of config.json in {folder.path}, found {sizes!r}; give "
            "image_size with --hints"
        )
    means, deviations = (_colours(processor, *keys, kinds) for keys in (("means", "mean"), ("stds", "std")))
    return CameraSpec("image0", listed[0], listed[0], "bicubic", means, deviations, "HWC")


def describe_pictures(folder: Folder, cameras: Sequence[CameraSpec]) -> dict[str, tuple[Normalisation, ...]]:
    """The description of the pictures' normalisation for ``rlrc inspect``."""
    processor = _processor(folder)
    keys = ("tvf_normalize_params",) if processor.get("tvf_normalize_params") else ("means", "stds")
    given = [key for key in keys if key in processor]
    origin = f"{', '.join(given)} of {PREPROCESSOR}" if given else f"the vision backbones, for {PREPROCESSOR} has none"
    return {f"image.{camera.name}": (Normalisation(camera.name, "MEAN_STD", origin),) for camera in cameras}


def check_sizes(folder: Folder, camera: CameraSpec) -> None:
    """Raises UserError if the derived transforms have another size, or crop or smooth differently."""
    processor, square = _processor(folder), [camera.height, camera.width]
    wanted: dict[str, Any] = {
        "input_sizes": [3, *square],
        "tvf_resize_params": {"antialias": True, "interpolation": BICUBIC, "max_size": None, "size": square},
        "tvf_crop_params": {"output_size": square},
    }
    for key, expected in wanted.items():
        for entry in _read_list(processor, key):
            if entry != expected:
                raise UserError(
                    f"expected {key} {expected} in {PREPROCESSOR}, as for the vision backbones, found {entry}; "
                    "rlrc does not support that"
                )


def _processor(folder: Folder) -> dict[str, Any]:
    values = folder.json(PREPROCESSOR) if PREPROCESSOR in folder else {}
    if not isinstance(values, dict):
        raise UserError(f"expected an object in {folder.path / PREPROCESSOR}, found {values!r:.80}; correct it")
    return values


def _read_list(processor: Mapping[str, Any], key: str) -> list[Any]:
    """A setting with one entry for each vision transformer; empty if it is missing."""
    values = processor.get(key) or []
    if not isinstance(values, list):
        raise UserError(f"expected a list as {key} of {PREPROCESSOR}, found {values!r:.80}; correct it")
    return values


def _colours(processor: Mapping[str, Any], key: str, derived: str, kinds: list[str]) -> tuple[float, ...]:
    """Three numbers for every vision transformer, from the derived transforms, which must match the settings."""
    defaults = MEANS if key == "means" else DEVIATIONS
    values = processor.get(key, [defaults[kind] for kind in kinds])
    transforms = _read_list(processor, "tvf_normalize_params")
    found = [entry.get(derived) for entry in transforms if isinstance(entry, Mapping)] or values
    for listed in (values, found):
        if not _is_three_each(listed, len(kinds)):
            raise UserError(
                f"expected three {key} for each of {len(kinds)} vision backbones in {PREPROCESSOR}, found {listed}; "
                "correct it"
            )
    pairs = [pair for both in zip(values, found, strict=True) for pair in zip(*both, strict=True)]
    if any(abs(x - rounded) > ROUNDING * abs(x) for x, rounded in pairs):
        raise UserError(
            f"expected one set of {key} in {PREPROCESSOR}, found {values}, and {found} as tvf_normalize_params; "
            "keep the one that the policy was trained with"
        )
    return tuple(float(rounded) for _, rounded in pairs)


def _is_three_each(values: Any, count: int) -> bool:
    lists = isinstance(values, list) and len(values) == count and all(isinstance(value, list) for value in values)
    return lists and all(len(value) == 3 and all(isinstance(x, (int, float)) for x in value) for value in values)
