"""LeRobot's normalisation: its modes, where a feature's statistics are stored, and the affine map of both.

A file of statistics names them "action.mean". Policies that were pre-trained on several data sets, such as
lerobot/smolvla_base, name them "so100.buffer.action.mean": one group of statistics for each data set. Folders of
LeRobot before 0.4 have them among the weights: see buffers.py.
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
# The two statistics that a mode of normalisation takes.
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
    """Of one file ("" if a step has none): by the stored name of a feature, then by the statistic."""

    file: str
    values: Mapping[str, Values]

    def names(self, feature: str) -> dict[str, str]:
        """The stored names of a feature's statistics by their group; "" is the group of those of no named data set.

        Before 0.4, and after LeRobot's migration from it, names have "_" or "." where the feature has the other.
        """
        plain, found = _plain(feature), dict[str, str]()
        for name in sorted(self.values, key=lambda name: name != feature):  # its own name first
            if f".{_plain(name)}".endswith(f".{plain}"):
                before = name[: len(name) - len(feature)].rstrip("._/")
                found.setdefault(re.sub(r"(^|[._/])buffer$", "", before), name)
        return found


def _plain(name: str) -> str:
    return re.sub(r"[_/]", ".", name)


def read_statistics(folder: Folder, file: str | None) -> Statistics:
    """The statistics of a step's file; none without one."""
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
    """The map of a mode for a feature of so many numbers (three of a picture's colours). ``what``: in messages.

    LeRobot adds eps to the deviation on the way in and not on the way out (``inverse``), and puts eps in the place of a
    range of zero. Raises UserError for statistics that are missing or do not fit.
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
        # Where nothing varies, eps keeps the way out invertible; it moves an action by less than float32 can tell.
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
        shown = f"{len(found)}: {listed}" if len(found) != numbers else listed
    else:
        others = ", ".join(values) or "no statistics"
        shown = f"only {others}" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} numbers"
    raise UserError(
        f"expected {numbers} finite floating-point numbers as {what}, found {shown}; copy the folder again or compute "
        "the statistics again"
    )


def compose(first: NormStats, second: NormStats) -> NormStats:
    """One map for two normalisations, the first of which is nearer to the raw values."""
    pairs = list(zip(first.center, first.scale, second.center, second.scale, strict=True))
    return NormStats(tuple(c + s * d for c, s, d, _ in pairs), tuple(s * t for _, s, _, t in pairs))


def identity(numbers: int) -> NormStats:
    return NormStats((0.0,) * numbers, (1.0,) * numbers)
