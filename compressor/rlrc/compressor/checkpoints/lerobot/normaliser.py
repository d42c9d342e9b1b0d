"""LeRobot's normalisation: its modes, the names of a feature's statistics, and the affine map that they define.

A file of statistics names them "action.mean". Policies pre-trained on several data sets, such as lerobot/smolvla_base,
name them "so100.buffer.action.mean", with a group of statistics for each data set. Folders of LeRobot before 0.4 keep
them among the weights: see buffers.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlrc.artifact import NormStats
from rlrc.errors import UserError

if TYPE_CHECKING:
    from rlrc.compressor.checkpoints.folder import Folder

IDENTITY = "IDENTITY"
# The two statistics of each mode of normalisation.
MODES = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
KINDS = ("VISUAL", "STATE", "ENV", "ACTION", "REWARD", "LANGUAGE")  # LeRobot's types of features

Values = Mapping[str, Tensor]  # of one feature, by the statistic's name


@dataclass(frozen=True)
class Statistics:
    """The statistics in one file ("": none), by the stored name of the feature, then by the statistic."""

    file: str
    values: Mapping[str, Values]

    def names(self, feature: str) -> dict[str, str]:
        """The stored names of a feature's statistics by group; "" is the group without a data set's name.

        In folders before 0.4, also migrated ones, "_" and "." may be exchanged in the names.
        """
        plain, found = _plain(feature), dict[str, str]()
        for name in sorted(self.values, key=lambda name: name != feature):  # the exact name first
            if f".{_plain(name)}".endswith(f".{plain}"):
                before = name[: len(name) - len(feature)].rstrip("._/")
                found.setdefault(re.sub(r"(^|[._/])buffer$", "", before), name)
        return found


def _plain(name: str) -> str:
    return re.sub(r"[_/]", ".", name)


def read_statistics(folder: Folder, file: str | None) -> Statistics:
    """The statistics of a step's file; empty without a file."""
    if file is None:
        return Statistics("", {})
    tensors = folder.safetensors(file)
    values: dict[str, dict[str, Tensor]] = {}
    for name in tensors:
        feature, _, statistic = name.rpartition(".")
        values.setdefault(feature, {})[statistic] = tensors.read(name)
    return Statistics(file, values)


def check_mode(kind: object, mode: object, where: str) -> None:
    """Raises UserError for a kind of feature or a mode that LeRobot does not have."""
    if kind not in KINDS:
        raise UserError(f"expected {', '.join(KINDS)} as kinds of features in {where}, found {kind!r}; correct it")
    if mode not in (IDENTITY, *MODES):
        raise UserError(
            f"expected one of the normalisation modes {IDENTITY}, {', '.join(MODES)} for {kind} in {where}, found "
            f"{mode!r}; correct it or upgrade rlrc"
        )


def affine(mode: str, values: Values, numbers: int, eps: float, what: str, inverse: bool = False) -> NormStats:
    """A mode's map for a feature of ``numbers`` values (three colours of a picture). ``what``: its name in messages.

    LeRobot adds eps to the deviation of inputs but not of outputs (``inverse``), and replaces a range of zero by eps.
    Raises UserError for statistics that are missing or do not fit.
    """
    names = MODES[mode]
    first, second = (_numbers(values, name, numbers, f"{name} of {what}, which {mode} takes") for name in names)
    wrong = [i for i in range(numbers) if (second[i] < 0 if mode == "MEAN_STD" else second[i] < first[i])]
    if wrong:
        at, order = wrong[0], "std of at least 0" if mode == "MEAN_STD" else f"{names[0]} of at most {names[1]}"
        raise UserError(
            f"expected {order} in the statistics of {what}, found {first[at]:g} and {second[at]:g} as {names[0]} and "
            f"{names[1]} of dimension {at}; compute the statistics again"
        )
    if mode == "MEAN_STD":
        # Where the deviation is zero, eps keeps the map invertible; float32 rounds its effect on an action away.
        return NormStats(first, tuple((std or eps) if inverse else std + eps for std in second))
    ranges = tuple(high - low or eps for low, high in zip(first, second, strict=True))
    centers = tuple(low + width / 2 for low, width in zip(first, ranges, strict=True))
    return NormStats(centers, tuple(width / 2 for width in ranges))


def _numbers(values: Values, name: str, numbers: int, what: str) -> tuple[float, ...]:
    tensor = values.get(name)
    if tensor is not None and tensor.is_floating_point():
        found = tensor.double().flatten()
        if len(found) == numbers and bool(torch.isfinite(found).all()):
            return tuple(found.tolist())
        listed = f"{found[:8].tolist()}{' ...' if len(found) > 8 else ''}"
        found_text = f"{len(found)}: {listed}" if len(found) != numbers else listed
    else:
        others = ", ".join(values) or "no statistics"
        found_text = f"only {others}" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} numbers"
    raise UserError(
        f"expected {numbers} finite floating-point numbers as {what}, found {found_text}; copy the folder again or "
        "compute the statistics again"
    )


def compose(first: NormStats, second: NormStats) -> NormStats:
    """One map for two normalisations in a row; ``first`` is nearer to the raw values."""
    pairs = list(zip(first.center, first.scale, second.center, second.scale, strict=True))
    return NormStats(tuple(c + s * d for c, s, d, _ in pairs), tuple(s * t for _, s, _, t in pairs))


def identity(numbers: int) -> NormStats:
    return NormStats((0.0,) * numbers, (1.0,) * numbers)
