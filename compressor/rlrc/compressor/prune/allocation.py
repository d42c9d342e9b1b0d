"""Allocates pruning over the blocks of a tower: how many heads and channels each block keeps.

An allocation maps one number from 0 to 1 to a shape (targets.py chooses the number):

- uniform: every block loses the same ratio of its heads and channels.
- global: the heads and runs of channels of all blocks are ranked by score per parameter. Differences in size between
  the blocks' scores only partly reflect their importance, so a block's scores are divided by the square root of their
  mean.
- sensitivity: a block's ratio is inversely proportional to its measured error. This minimises the sum of errors if an
  error grows with the square of the ratio.

At least one query head per key/value head and one aligned run of channels are kept.
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
Counts = Mapping[int, tuple[int, ...]]  # block: (heads, channels)


@dataclass(frozen=True)
class PruneScope:
    """The blocks of a tower that are pruned. ``policy`` may be on the meta device."""

    policy: PolicyModule
    tower: str
    blocks: Sequence[int]
    align: int

    def groups(self) -> dict[int, tuple[Group, Group]]:
        names = self.policy.state_dict().keys()
        return {i: find_groups(self.policy.towers, self.tower, i, names, self.align) for i in self.blocks}

    def resize(self, counts: Counts) -> dict[str, TowerSpec]:
        """The policy's towers with these numbers of heads and channels."""
        towers = self.policy.towers
        layers = list(towers[self.tower].layers)
        for i, (heads, channels) in counts.items():
            if not layers[i].kv_only:
                layers[i] = resize_layer(towers, self.tower, layers[i], heads, channels)
        return {**towers, self.tower: replace(towers[self.tower], layers=tuple(layers))}


def allocate_uniformly(scope: PruneScope) -> Shape:
    return allocate_weighted(scope, dict.fromkeys(scope.blocks, 1.0))


def allocate_by_sensitivity(scope: PruneScope, errors: Mapping[int, float]) -> Shape:
    """``errors`` by block. The most sensitive block loses the given ratio, the others more."""
    most = max(errors.values())
    return allocate_weighted(scope, {i: most / max(errors[i], 1e-6 * most) for i in scope.blocks})


def allocate_weighted(scope: PruneScope, weights: Mapping[int, float]) -> Shape:
    """Every block loses the given ratio times its weight, at most everything."""
    each = scope.groups()

    def shape(x: float) -> dict[str, TowerSpec]:
        return scope.resize(
            {i: tuple(group.count_left(min(1.0, x * weights[i])) for group in both) for i, both in each.items()}
        )

    return shape


@dataclass(frozen=True)
class Removal:
    """An entry of the ranking: parts of a group that are removed together."""

    density: float
    block: int
    group: int  # 0: heads, 1: channels
    parts: int
    parameters: int


def allocate_by_score(scope: PruneScope, scores: Sequence[Scores]) -> Shape:
    """The ratio is that of all parameters in the ranking."""
    each, queue = scope.groups(), list[Removal]()
    for i, both in each.items():
        sizes = [_parameters(scope.policy, group) for group in both]
        whole = sum(float(values.sum()) for values in scores[i].each())
        mean = whole / max(1, sum(group.number * size for group, size in zip(both, sizes, strict=True)))
        for kind, (group, values, size) in enumerate(zip(both, scores[i].each(), sizes, strict=True)):
            for parts, score in _removals(group, values):
                queue.append(Removal(score / (parts * size) / (mean or 1.0) ** 0.5, i, kind, parts, parts * size))
    queue.sort(key=lambda removal: removal.density)  # stable: keeps the order within a group

    def shape(x: float) -> dict[str, TowerSpec]:
        counts = {i: [group.number for group in both] for i, both in each.items()}
        left = x * sum(removal.parameters for removal in queue)
        for removal in queue:
            if left < removal.parameters / 2:
                break
            left -= removal.parameters
            counts[removal.block][removal.group] -= removal.parts
        return scope.resize({i: tuple(values) for i, values in counts.items()})

    return shape


def _removals(group: Group, scores: torch.Tensor) -> list[tuple[int, float]]:
    """(parts, sum of their scores), in order of removal. The first one leaves a multiple of ``group.multiple``."""
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
    """Number of weights of one part."""
    if not group.number:
        return 0
    return sum(policy.get_parameter(f"{layer}.weight").numel() for layer in group.layers) // group.number


def read_sensitivity(file: Path, tower: str, blocks: Sequence[int]) -> dict[int, float]:
    """The error of each block when it alone was pruned. Raises UserError if the report lacks one of the blocks."""
    errors = errors_by_block(load_report(file), "prune", tower)
    for i in blocks:
        if i not in errors:
            raise UserError(f"expected {tower}.layers.{i} in {file}, found none; make it again with rlrc sensitivity")
    if not any(errors[i] for i in blocks):
        raise UserError(f"expected an error above 0 of a block of the {tower} in {file}, found none; make it again")
    return {i: errors[i] for i in blocks}
