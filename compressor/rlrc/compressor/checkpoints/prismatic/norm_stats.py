"""OpenVLA's statistics of data sets: chooses the data set, and derives the normalisation of actions and states.

``{data set: {"action": {"q01": [...], "q99": [...], "min": ..., "max": ..., "mask": ...}, "proprio": {...}}}``, in
dataset_statistics.json of a fine-tuned checkpoint, else as norm_stats of config.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from rlrc.artifact import ActionSpec, NormStats, StateSpec, TokenSpec
from rlrc.compressor.checkpoints.layout import Normalisation
from rlrc.errors import UserError

if TYPE_CHECKING:
    from rlrc.compressor.checkpoints.folder import Folder, ReadOptions

STATISTICS = "dataset_statistics.json"
UNNAMED = "(unnamed)"
BOUNDS = {"bounds_q99": ("q01", "q99"), "bounds": ("min", "max")}
NARROWEST = 1e-8  # OpenVLA-OFT adds it to a range, which may be zero

Meaning = Literal["absolute", "delta", "velocity", "gripper"]
ABSOLUTE: Meaning = "absolute"
DELTA: Meaning = "delta"
GRIPPER: Meaning = "gripper"
POSE = ("x", "y", "z", "roll", "pitch", "yaw")
POSE_UNITS = ("m", "m", "m", "rad", "rad", "rad")
ARM = (*(f"joint_{i}" for i in range(6)), "gripper")
ARMS = tuple(f"{side}_{name}" for side in ("left", "right") for name in ARM)
ARMS_UNITS = (*("rad",) * 6, "1") * 2


def data_sets(folder: Folder) -> dict[str, Any]:
    """The statistics by data set, maybe empty. Some files hold those of one data set without its name."""
    found = folder.json(STATISTICS) if STATISTICS in folder else folder.config.get("norm_stats")
    if not isinstance(found, dict):
        return {}
    alone = isinstance(action := found.get("action"), dict) and "action" not in action
    return {UNNAMED: found} if alone else found


def statistics(folder: Folder, options: ReadOptions) -> tuple[str, Mapping[str, Any]]:
    """The data set's name and its statistics. Raises UserError if the data set is missing or ambiguous."""
    found = data_sets(folder)
    if not found:
        raise UserError(
            f"expected statistics of a data set in {STATISTICS} or as norm_stats of config.json in {folder.path}, "
            f"found none; copy {STATISTICS} from the training run"
        )
    key, names = options.unnorm_key, ", ".join(sorted(found))
    if key is None and len(found) > 1:
        raise UserError(f"expected one data set in {folder.path}, found {names}; choose one with --unnorm-key")
    if key is not None and key not in found:
        raise UserError(
            f"expected one of the data sets {names} of {folder.path}, found {key!r}; give another --unnorm-key"
        )
    key = key or next(iter(found))
    if not isinstance(found[key], dict):
        raise UserError(f"expected an object as statistics of {key!r} in {folder.path}, found another; correct them")
    return key, found[key]


def describe_statistics(folder: Folder, dataset: str, what: str, kind: str) -> tuple[Normalisation, ...]:
    """The description of ``normalisation`` for ``rlrc inspect``."""
    file = STATISTICS if STATISTICS in folder else "norm_stats of config.json"
    name = what if dataset == UNNAMED else f"{dataset}.{what}"
    return (Normalisation(what, kind, f"{', '.join(BOUNDS[kind])} of {name} in {file}", dataset),)


def normalisation(
    stats: Mapping[str, Any], what: str, kind: str, slack: float = 0.0, clip: float | None = None
) -> NormStats:
    """The map of ``stats["action"]`` or ``stats["proprio"]``: [low, high + slack] to [-1, 1]. Keeps masked dimensions.

    Raises UserError for bounds that are missing, of different lengths or in the wrong order.
    """
    values = stats.get(what)
    values = values if isinstance(values, Mapping) else {}
    low, high = (_numbers(values.get(name)) for name in BOUNDS[kind])
    mask = values.get("mask") or [True] * len(low)
    mask = mask if isinstance(mask, list) else []
    fits = low and len(low) == len(high) == len(mask) and all(a <= b for a, b in zip(low, high, strict=True))
    if not fits or not all(one in (True, False) for one in mask):
        least, most = BOUNDS[kind]
        raise UserError(
            f"expected {least} and {most} of {what}, as many numbers each and no {least} above its {most}, and a mask "
            f"of as many true and false in the data set's statistics, found {low} and {high} with the mask "
            f"{values.get('mask')}; correct them"
        )
    center, scale = list[float](), list[float]()
    for bottom, top, normalised in zip(low, high, mask, strict=True):
        # A range of width zero keeps its value: NARROWEST moves it by a negligible amount.
        half = max(top - bottom + slack, NARROWEST) / 2
        center.append(bottom + half if normalised else 0.0)
        scale.append(half if normalised else 1.0)
    return NormStats(tuple(center), tuple(scale), clip)


def _numbers(values: Any) -> list[float]:
    """The list if all its entries are finite numbers, else an empty one."""
    numbers = isinstance(values, list) and all(type(x) in (int, float) and math.isfinite(x) for x in values)
    return values if numbers else []


def action_spec(horizon: int, norm: NormStats, bins: int = 0, tokens: TokenSpec | None = None) -> ActionSpec:
    """A chunk of actions. The statistics do not name the dimensions.

    Assumes that seven are a change of pose and a gripper (Open X-Embodiment), fourteen the joints and grippers of two
    arms (ALOHA), and any other number joints. Joints are absolute.
    """
    dim = len(norm.center)
    names, units, meaning = tuple(f"joint_{i}" for i in range(dim)), ("rad",) * dim, (ABSOLUTE,) * dim
    if dim == len(POSE) + 1:
        names, units, meaning = (*POSE, "gripper"), (*POSE_UNITS, "1"), (*[DELTA] * 6, GRIPPER)
    elif dim == len(ARMS):
        names, units, meaning = ARMS, ARMS_UNITS, (*[ABSOLUTE] * 6, GRIPPER) * 2
    return ActionSpec(horizon, names, meaning, units, norm, bins, tokens)


def state_spec(norm: NormStats) -> StateSpec:
    """The state. Assumes that seven are a pose and a gripper, eight LIBERO's state, fourteen ALOHA's."""
    known = {
        7: ((*POSE, "gripper"), (*POSE_UNITS, "1")),
        8: (("x", "y", "z", "axis_x", "axis_y", "axis_z", "finger_0", "finger_1"), (*POSE_UNITS, "m", "m")),
        14: (ARMS, ARMS_UNITS),
    }
    dim = len(norm.center)
    names, units = known.get(dim, (tuple(f"state_{i}" for i in range(dim)), ("1",) * dim))
    return StateSpec(names, units, norm)
