"""How OpenVLA's PrismaticImageProcessor prepares pictures, from preprocessor_config.json and config.json.

Resized to a square without regard to proportions ("resize-naive"), then normalised for every vision transformer. The
file says most of it twice: the settings, and the transforms that were derived from them (tvf_*). The latter rule in the
official code, and those of published checkpoints are the settings rounded to bfloat16.
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

# The official backbones: pixels of a side.
PIXELS = {
    "dinov2-vit-l": 224,
    "siglip-vit-so400m": 224,
    "siglip-vit-so400m-384px": 384,
    "dinosiglip-vit-so-224px": 224,
    "dinosiglip-vit-so-384px": 384,
}
MEANS = {"dinov2": [0.485, 0.456, 0.406], "siglip": [0.5, 0.5, 0.5]}
DEVIATIONS = {"dinov2": [0.229, 0.224, 0.225], "siglip": [0.5, 0.5, 0.5]}
BICUBIC = 3  # as PIL counts
ROUNDING = 2.0**-8  # of bfloat16


def camera(folder: Folder, options: ReadOptions, kinds: list[str]) -> CameraSpec:
    """``kinds``: of the vision transformers, keys of MEANS. Raises UserError for what rlrc does not do."""
    processor = _processor(folder)
    settings.check(processor, settings.IMAGE_PROCESSOR, PREPROCESSOR, options)
    strategies = [values.get("image_resize_strategy", NAIVE) for values in (processor, folder.config)]
    methods = _read_list(processor, "interpolations")
    if strategies != [NAIVE, NAIVE] or any(method != "bicubic" for method in methods):
        raise UserError(
            f'expected image_resize_strategy "{NAIVE}" and interpolations "bicubic" in {folder.path}, found '
            f"{' and '.join(map(repr, strategies))} with {methods}; rlrc does not resize in that way"
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
    """What ``rlrc inspect`` shows of how these pictures are normalised."""
    processor = _processor(folder)
    keys = ("tvf_normalize_params",) if processor.get("tvf_normalize_params") else ("means", "stds")
    given = [key for key in keys if key in processor]
    origin = f"{', '.join(given)} of {PREPROCESSOR}" if given else f"the vision backbones, for {PREPROCESSOR} has none"
    return {f"image.{camera.name}": (Normalisation(camera.name, "MEAN_STD", origin),) for camera in cameras}


def check_sizes(folder: Folder, seen: CameraSpec) -> None:
    """Raises UserError where the derived transforms are of another size, or cut or smooth otherwise."""
    processor, square = _processor(folder), [seen.height, seen.width]
    wanted: dict[str, Any] = {
        "input_sizes": [3, *square],
        "tvf_resize_params": {"antialias": True, "interpolation": BICUBIC, "max_size": None, "size": square},
        "tvf_crop_params": {"output_size": square},
    }
    for key, expected in wanted.items():
        for entry in _read_list(processor, key):
            if entry != expected:
                raise UserError(
                    f"expected {key} {expected} in {PREPROCESSOR}, as the vision backbones are, found {entry}; rlrc "
                    "does not prepare pictures in that way"
                )


def _processor(folder: Folder) -> dict[str, Any]:
    values = folder.json(PREPROCESSOR) if PREPROCESSOR in folder else {}
    if not isinstance(values, dict):
        raise UserError(f"expected an object in {folder.path / PREPROCESSOR}, found {values!r:.80}; correct it")
    return values


def _read_list(processor: Mapping[str, Any], key: str) -> list[Any]:
    """Of a setting that has one entry for each vision transformer; empty without it."""
    values = processor.get(key) or []
    if not isinstance(values, list):
        raise UserError(f"expected a list as {key} of {PREPROCESSOR}, found {values!r:.80}; correct it")
    return values


def _colours(processor: Mapping[str, Any], key: str, derived: str, kinds: list[str]) -> tuple[float, ...]:
    """Three numbers for every vision transformer: those of the derived transforms, which must be the settings'."""
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
            "correct it: which was the policy trained with?"
        )
    return tuple(float(rounded) for _, rounded in pairs)


def _is_three_each(values: Any, count: int) -> bool:
    lists = isinstance(values, list) and len(values) == count and all(isinstance(value, list) for value in values)
    return lists and all(len(value) == 3 and all(isinstance(x, (int, float)) for x in value) for value in values)
