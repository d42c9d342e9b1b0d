"""From one number to that of heads and channels of every block.

A way of allocating makes a shape from one number from 0 to 1 (see targets.py for how that is chosen):

- uniform: the same part of every block's heads and channels.
- global: all blocks' heads and runs of channels in one ranking by score per parameter. How much the blocks' scores
  differ in size says something about their worth, but not all: those of a block are divided by the root of its mean.
- sensitivity: a block loses a part that is inversely proportional to its measured error. If an error grows with the
  square of the part, that is where the sum of all errors is smallest.

At least one head of each key/value head and one aligned run of channels stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rlrc.artifact import TowerSpec
from rlrc.compressor.models.coupling import Group, find_groups, resize_layer
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.prune.importance import Scores
from rlrc.compressor.prune.sensitivity_report import errors_by_block, load_report
from rlrc.errors import UserError

Shape = Callable[[float], dict[str, TowerSpec]]
Counts = Mapping[int, tuple[int, ...]]  # of a block: heads, channels


@dataclass(frozen=True)
class PruneScope:
    """Where is cut: these blocks of a tower. ``policy`` may be on the meta device."""

    policy: PolicyModule
    tower: str
    blocks: Sequence[int]
    align: int

    def groups(self) -> dict[int, tuple[Group, Group]]:
        names = self.policy.state_dict().keys()
        return {i: find_groups(self.policy.towers, self.tower, i, names, self.align) for i in self.blocks}

    def resize(self, counts: Counts) -> dict[str, TowerSpec]:
        """The policy's shape when its blocks have so many heads and channels."""
        towers = self.policy.towers
        layers = list(towers[self.tower].layers)
        for i, (heads, channels) in counts.items():
            if not layers[i].kv_only:
                layers[i] = resize_layer(towers, self.tower, layers[i], heads, channels)
        return {**towers, self.tower: replace(towers[self.tower], layers=tuple(layers))}


def allocate_uniformly(place: PruneScope) -> Shape:
    return allocate_weighted(place, dict.fromkeys(place.blocks, 1.0))


def allocate_by_sensitivity(place: PruneScope, errors: Mapping[int, float]) -> Shape:
    """``errors`` by block. The most sensitive block loses what the number says, the others more."""
    most = max(errors.values())
    return allocate_weighted(place, {i: most / max(errors[i], 1e-6 * most) for i in place.blocks})


def allocate_weighted(place: PruneScope, weights: Mapping[int, float]) -> Shape:
    """Every block loses its weight's multiple of the number, all of it at most."""
    each = place.groups()

    def shape(x: float) -> dict[str, TowerSpec]:
        return place.resize(
            {i: tuple(group.count_left(min(1.0, x * weights[i])) for group in both) for i, both in each.items()}
        )

    return shape


@dataclass(frozen=True)
class Removal:
    """One lot of a group's parts of every bundle: the next to go there."""

    density: float
    block: int
    group: int  # 0: heads, 1: channels
    parts: int
    parameters: int


def allocate_by_score(place: PruneScope, scores: Sequence[Scores]) -> Shape:
    """The number is the part of all parameters in the ranking that goes."""
    each, queue = place.groups(), list[Removal]()
    for i, both in each.items():
        sizes = [_parameters(place.policy, group) for group in both]
        whole = sum(float(values.sum()) for values in scores[i].each())
        mean = whole / max(1, sum(group.number * size for group, size in zip(both, sizes, strict=True)))
        for kind, (group, values, size) in enumerate(zip(both, scores[i].each(), sizes, strict=True)):
            for parts, worth in _removals(group, values):
                queue.append(Removal(worth / (parts * size) / (mean or 1.0) ** 0.5, i, kind, parts, parts * size))
    queue.sort(key=lambda step: step.density)  # stable: within a group the order stays

    def shape(x: float) -> dict[str, TowerSpec]:
        counts = {i: [group.number for group in both] for i, both in each.items()}
        left = x * sum(step.parameters for step in queue)
        for step in queue:
            if left < step.parameters / 2:
                break
            left -= step.parameters
            counts[step.block][step.group] -= step.parts
        return place.resize({i: tuple(values) for i, values in counts.items()})

    return shape


def _removals(group: Group, scores: torch.Tensor) -> list[tuple[int, float]]:
    """In the order in which they go: how many parts, and what they are worth. The first fills up to whole lots."""
    if not group.number:
        return []
    per, found = group.number // group.kv_groups, list[tuple[int, float]]()
    rising = scores.unflatten(0, (group.kv_groups, per)).sort(1).values
    taken = 0
    while per - taken > group.multiple:
        count = (per - taken) % group.multiple or group.multiple
        found.append((count * group.kv_groups, float(rising[:, taken : taken + count].sum())))
        taken += count
    return found


def _parameters(policy: PolicyModule, group: Group) -> int:
    """Weights of one part."""
    if not group.number:
        return 0
    return sum(policy.get_parameter(f"{layer}.weight").numel() for layer in group.layers) // group.number


def read_sensitivity(file: Path, tower: str, blocks: Sequence[int]) -> dict[int, float]:
    """The errors of the blocks when they were pruned alone. Raises UserError for one that the report lacks."""
    errors = errors_by_block(load_report(file), "prune", tower)
    for i in blocks:
        if i not in errors:
            raise UserError(f"expected {tower}.layers.{i} in {file}, found none; make it again with rlrc sensitivity")
    if not any(errors[i] for i in blocks):
        raise UserError(f"expected an error above 0 of a block of the {tower} in {file}, found none; make it again")
    return {i: errors[i] for i in blocks}
