"""Reads input features, output features and numbers in config.json of lerobot's policies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from rlrc.compressor.checkpoints.lerobot.normaliser import KINDS
from rlrc.errors import UserError

LARGEST = 1_000_000  # larger than every size of a policy, and small enough for a tuple


@dataclass(frozen=True)
class PolicyFeature:
    """One entry of config.json's input_features or output_features."""

    name: str
    kind: str  # VISUAL, STATE, ENV or ACTION
    shape: tuple[int, ...]

    @property
    def dim(self) -> int:
        if len(self.shape) != 1:
            raise UserError(
                f"expected one dimension in the shape of {self.name} in config.json, found {list(self.shape)}; "
                "rlrc supports states and actions that are vectors"
            )
        return self.shape[0]


def short_name(name: str) -> str:
    """ "front" of "observation.images.front", "state" of "observation.state"."""
    return name.removeprefix("observation.").removeprefix("images.")


def dimension_names(names: Any, dim: int) -> tuple[str, ...]:
    """The names if they are ``dim`` different strings, else joint_0, joint_1, ..."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(one, str) for one in names):
        names = ()
    return tuple(names) if len(set(names)) == len(names) == dim else tuple(f"joint_{i}" for i in range(dim))


def meanings(names: tuple[str, ...]) -> tuple[Literal["absolute", "gripper"], ...]:
    return tuple("gripper" if "gripper" in name else "absolute" for name in names)


def features(config: dict[str, Any], which: Literal["input_features", "output_features"]) -> list[PolicyFeature]:
    """The features in the order of config.json. Raises UserError for malformed entries."""
    entries = config.get(which)
    try:
        if not isinstance(entries, dict):
            raise TypeError(entries)
        found = [PolicyFeature(name, entry["type"], tuple(entry["shape"])) for name, entry in entries.items()]
    except (KeyError, TypeError):
        raise UserError(
            f"expected names with type and shape as {which} in config.json, found {entries!r:.80}; copy that file again"
        ) from None
    for one in found:
        if one.kind not in KINDS:
            raise UserError(
                f"expected {', '.join(KINDS)} as the type of {one.name} in {which} of config.json, found {one.kind!r}; "
                "correct it"
            )
        if not all(type(size) is int and 0 < size <= LARGEST for size in one.shape):
            raise UserError(
                f"expected positive whole numbers up to {LARGEST:,} as the shape of {one.name} in {which} of "
                f"config.json, found {config[which][one.name]['shape']!r:.80}; correct it"
            )
    return found


def number(config: dict[str, Any], name: str, default: int | None = None) -> int:
    """A positive integer of config.json. Raises UserError for anything else."""
    value = config.get(name, default)
    if type(value) is not int or not 0 < value <= LARGEST:
        raise UserError(
            f"expected a positive whole number up to {LARGEST:,} as {name} in config.json, found {value!r}; correct it"
        )
    return value


def real(values: Mapping[str, Any], name: str, default: float) -> float:
    """A finite number of config.json or the hints. Raises UserError for anything else."""
    value = values.get(name, default)
    if type(value) not in (int, float) or not isfinite(value):
        raise UserError(f"expected a number as {name}, found {value!r}; correct config.json or the hints")
    return float(value)
