"""The configuration of pruning, and the blocks and tower that it selects."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal

from rlrc.compressor.models.coupling import ALIGN, TOWERS, VISION, Towers
from rlrc.errors import UserError
from rlrc.ranges import check_range

RATIO = 0.9  # as in the paper
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
CHOICES = {
    "score": ("taylor", "magnitude", "random", "wanda"),
    "tower": (*TOWERS, *VISION, None),
    "kind": ("width", "depth", "both"),
    "scope": ("layer", "tower", "whole"),
    "to_bytes_in": ("int4", "bf16"),
    "allocation": ("uniform", "global", "sensitivity"),
}


@dataclass(frozen=True)
class PruneConfig:
    ratio: float | None = None
    """ratio to remove: see scope (default: 0.9, unless a target or the blocks to drop are given)"""
    score: Literal["taylor", "magnitude", "random", "wanda"] = "taylor"
    """taylor and wanda need demonstrations, magnitude does not; random is a control to compare the others with"""
    tower: Literal["decoder", "expert", "encoder", "vision", "vision2"] | None = None
    """tower to prune (default: the encoder if the policy has one, else the decoder)"""
    keep: int = 1
    """blocks at each end that are not pruned"""
    batches: int = 16
    """batches of samples for the scores"""
    data: str = ""
    """LeRobotDataset folder to draw the batches from; empty: the simulator's scripted experts (reference family)"""
    cameras: dict[str, str] = field(default_factory=dict)
    """camera of the policy = camera of the data set, where the names differ; none: do without it"""
    demonstrations: int = 60
    """expert episodes per task"""
    seed: int = 0
    lossless: bool = False
    """make only the lossless cuts, which no action depends on and which all pruning includes"""
    kind: Literal["width", "depth", "both"] = "width"
    """width: heads and channels; depth: whole blocks; both: blocks first, then heads and channels of the others"""
    drop: int = 0
    """drop this many blocks, the least important ones (depth without it: as many as the ratio or target requires)"""
    blocks: tuple[int, ...] = ()
    """drop these blocks instead of the least important ones"""
    scope: Literal["layer", "tower", "whole"] = "layer"
    """what the ratio refers to: every intermediate block's heads and channels (or the number of those blocks), the
    tower's parameters, or the whole policy's"""
    to_bytes: str | None = None
    """instead of a ratio: prune until the weights take at most this (2GB, 1.5GiB, 400MB)"""
    to_latency: str | None = None
    """instead of a ratio: prune until a decision takes at most this part of its time (0.4x), by a cost model; with
    to_bytes, until both hold"""
    to_bytes_in: Literal["int4", "bf16"] = "int4"
    """how to_bytes counts the weights: as rlrc quantize stores them, or in 16 bits"""
    allocation: Literal["uniform", "global", "sensitivity"] = "uniform"
    """uniform: the same ratio in every block; global: the lowest score per parameter of all blocks; sensitivity: by
    the sensitivity file"""
    sensitivity: str | None = None
    """file written by rlrc sensitivity"""
    align: int = ALIGN
    """widths above this stay multiples of it (256 for GGUF's K-quants)"""
    batch: int = 64
    """samples per batch"""

    def __post_init__(self) -> None:
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise UserError(f"expected prune.ratio between 0 and 1 (excluded), found {self.ratio}")
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"expected prune.{name} {', '.join(filter(None, choices))}, found {value!r}")
        check_range(self, "prune.", "keep", "drop", at_least=0)
        check_range(self, "prune.", "batches", "demonstrations", "align", "batch", at_least=1)
        goals = [name for name in ("to_bytes", "to_latency") if getattr(self, name) is not None]
        if goals and self.scope != "layer":
            raise UserError(
                f"expected prune.scope or to_bytes and to_latency, found scope and {' and '.join(goals)}; leave one"
            )
        number_of_bytes(self.to_bytes)
        fraction_of_time(self.to_latency)
        self._check_lossless()
        self._check_depth(goals)
        if self.allocation != "uniform" and self.kind == "depth":
            raise UserError(f"expected prune.allocation with kind width or both, found {self.allocation} with depth")
        if self.allocation == "sensitivity" and self.kind == "both":  # blocks would have other numbers than in the file
            raise UserError("expected prune.allocation sensitivity with kind width, found both; drop the blocks first")
        if (self.allocation == "sensitivity") != (self.sensitivity is not None):
            found = f"{self.allocation} {'without' if self.sensitivity is None else 'with'} one"
            raise UserError(f"expected prune.sensitivity, a file, exactly with allocation sensitivity, found {found}")

    def _check_depth(self, goals: Sequence[str]) -> None:
        given = bool(self.drop) + bool(self.blocks)
        if given > 1 or (self.kind == "width" and given) or (self.kind == "both" and not given):
            found = " and ".join(name for name in ("drop", "blocks") if getattr(self, name)) or "neither"
            raise UserError(
                f"expected prune.drop or blocks (one of them with kind both, at most one with depth, none with width), "
                f"found {found} with {self.kind}"
            )
        if self.kind == "depth" and given and (goals or self.scope != "layer"):
            raise UserError("expected prune.drop or blocks, or a target, with kind depth, found both; leave one")
        instead = [*goals, *(name for name in ("drop", "blocks") if self.kind == "depth" and getattr(self, name))]
        if self.ratio is not None and instead:
            raise UserError(f"expected prune.ratio or {' and '.join(instead)}, found both; give one of them")

    def _check_lossless(self) -> None:
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "lossless"}
        others = [one.name for one in fields(self) if one.name in own and own[one.name] != default_of(one)]
        if self.lossless and others:
            raise UserError(
                f"expected prune.lossless alone, found {', '.join(others)} with it; leave lossless out, since "
                "pruning makes the lossless cuts anyway"
            )

    @property
    def part(self) -> float:
        """The ratio to remove where neither a target nor blocks are given."""
        return RATIO if self.ratio is None else self.ratio

    @property
    def needs_data(self) -> bool:
        return self.score in NEED_DATA and not self.lossless and not (self.kind == "depth" and self.blocks)


def default_of(one: Field[Any]) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def number_of_bytes(text: str | None) -> float:
    match = re.fullmatch(r"(\d+\.?\d*) *([kmg]i?|)b?", text.lower()) if text is not None else None
    if text is not None and (match is None or not float(match[1])):
        raise UserError(f"expected prune.to_bytes such as 2GB, 1.5GiB or 400MB, found {text!r}")
    return float(match[1]) * UNITS[match[2]] if match else 0.0


def fraction_of_time(text: str | None) -> float:
    match = re.fullmatch(r"(0?\.\d+)x?", text) if text is not None else None
    if text is not None and (match is None or not float(match[1])):
        raise UserError(f"expected prune.to_latency between 0x and 1x (excluded) such as 0.4x, found {text!r}")
    return float(match[1]) if match else 0.0


def tower_name(towers: Towers, config: PruneConfig) -> str:
    """The tower to prune. Raises UserError if the policy does not have it."""
    name = config.tower or ("encoder" if "encoder" in towers else "decoder")
    if name not in towers:
        present = ", ".join(other for other in (*TOWERS, *VISION) if other in towers)
        raise UserError(f"expected prune.tower {present} (the towers of this policy), found {name}")
    return name


def intermediate_blocks(towers: Towers, name: str, config: PruneConfig) -> range:
    """The blocks that may be pruned. Raises UserError if there are none."""
    blocks, ends = len(towers[name].layers), config.keep
    if blocks <= 2 * ends:
        raise UserError(
            f"expected intermediate blocks in the {name} ({2 * ends + 1} or more in all), found {blocks} blocks; "
            "keep fewer at each end with --keep, or prune another --tower"
        )
    return range(ends, blocks - ends)


NEED_DATA = ("taylor", "wanda")
