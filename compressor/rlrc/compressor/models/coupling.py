"""The parts of a block that must be pruned together: whole attention heads and whole MLP channels.

A head has rows of q (and of k and v, unless it shares them) and columns of o; a channel has rows of gate and up and a
column of down. The residual width is unchanged. Torch-Pruning's dependency graph finds the same groups in every family
(tests/test_coupling.py); they are written down here to avoid tracing policies of billions of parameters.

Key/value heads that several query heads share are kept, and the same number of query heads is removed from each. Also
kept are key/value heads that another tower reads (the prefix's and the expert's in flow policies).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from rlrc.artifact import LayerSpec, TowerSpec

ALIGN = 32  # default alignment of widths: whole groups of the 4-bit grid
TOWERS = ("decoder", "expert", "encoder")
VISION = ("vision", "vision2")

Towers = Mapping[str, TowerSpec]


@dataclass(frozen=True)
class Group:
    """``number`` parts of a block, each ``size`` rows of the layers ``rows`` and ``size`` columns of ``columns``.

    ``fused``: how many layers are stacked in one along the rows (3 for q, k and v in one). The parts form ``kv_groups``
    runs of equal length; pruning keeps the same number of parts in each run, a multiple of ``multiple``.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    number: int
    size: int = 1
    kv_groups: int = 1
    fused: int = 1
    multiple: int = 1

    @property
    def layers(self) -> tuple[str, ...]:
        return (*self.rows, *self.columns)

    def indices(self, parts: Tensor, fused: int = 1) -> Tensor:
        """Indices of the parts' rows in each of the fused layers (with ``fused`` 1: also their columns)."""
        own, stacked = (torch.arange(count, device=parts.device) for count in (self.size, fused))
        rows = (parts[:, None] * self.size + own).flatten()
        return (stacked[:, None] * self.number * self.size + rows).flatten()

    def sum_parts(self, layer: str, importance: Tensor) -> Tensor:
        """Importance of the weights of one layer, summed for every part (number,), in float32."""
        along, fused = (1, self.fused) if layer in self.rows else (0, 1)
        vector = importance.sum(along, dtype=torch.float32)
        return vector.unflatten(0, (fused, self.number, self.size)).sum((0, 2))

    def select_best(self, scores: Tensor, count: int) -> Tensor:
        """Indices of the ``count`` parts to keep, by score, in ascending order."""
        runs = scores.unflatten(0, (self.kv_groups, -1))
        first = torch.arange(self.kv_groups, device=scores.device)[:, None] * runs.shape[1]
        return (runs.topk(count // self.kv_groups).indices.sort().values + first).flatten()

    def count_left(self, ratio: float) -> int:
        """How many parts are left when this ratio of them is removed: the nearest allowed number, at least one."""
        each = self.number // self.kv_groups
        return self.kv_groups * min(each, max(self.multiple, round(each * (1 - ratio) / self.multiple) * self.multiple))


def find_groups(
    towers: Towers, tower: str, block: int, names: Iterable[str], align: int = ALIGN
) -> tuple[Group, Group]:
    """The block's heads and channels. ``names`` are the policy's tensors.

    ``multiple`` keeps the numbers of columns of o and down multiples of ``align``, where the layer is wide enough.
    """
    layer, prefix = towers[tower].layers[block], f"{tower}.layers.{block}"
    own, present = owns_keys(towers, tower, layer), set(names)
    alone = own and layer.kv_heads == layer.heads
    fused = f"{prefix}.attention.qkv.weight" in present
    rows = ("qkv",) if fused else ("q", "k", "v") if alone else ("q",)
    inputs = [name for name in ("gate", "up") if f"{prefix}.mlp.{name}.weight" in present]
    kv_groups = 1 if alone else layer.kv_heads
    heads = Group(
        tuple(f"{prefix}.attention.{name}" for name in rows),
        (f"{prefix}.attention.{'out' if fused else 'o'}",),
        0 if layer.kv_only else layer.heads,
        layer.head_dim,
        kv_groups,
        3 if fused else 1,
    )
    channels = Group(
        tuple(f"{prefix}.mlp.{name}" for name in inputs), (f"{prefix}.mlp.down",), 0 if layer.kv_only else layer.mlp
    )
    return replace(heads, multiple=_multiple(heads, align)), replace(channels, multiple=_multiple(channels, align))


def _multiple(group: Group, align: int) -> int:
    """The smallest aligned number of parts per run, or 1 if the runs are not longer than that."""
    multiple = align // gcd(align, group.kv_groups * group.size) if group.number else 1
    return multiple if group.number and group.number // group.kv_groups > multiple else 1


def owns_keys(towers: Towers, tower: str, layer: LayerSpec) -> bool:
    """Whether no other tower reads this block's keys and values."""
    return tower in VISION or "expert" not in towers or (tower == "expert" and layer.kind == "cross")


def resize_layer(towers: Towers, tower: str, layer: LayerSpec, heads: int, channels: int) -> LayerSpec:
    """The block's geometry with this many heads and channels."""
    alone = owns_keys(towers, tower, layer) and layer.kv_heads == layer.heads
    return replace(layer, heads=heads, kv_heads=heads if alone else layer.kv_heads, mlp=channels)
