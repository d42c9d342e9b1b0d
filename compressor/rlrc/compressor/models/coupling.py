"""What of a block must be cut together: whole attention heads and whole MLP channels.

A head has rows of q (and of k and v where it has its own) and columns of o; a channel has rows of gate and up and
columns of down. The residual width is unchanged. Torch-Pruning's dependency graph finds the same groups in every family
(tests/test_coupling.py); here they are written down, because a policy of billions of parameters is not traced.

Query heads that share a key/value head go in equal numbers from each, and the key/value heads stay; so do those that
another tower reads (the prefix's and the expert's in flow policies).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from rlrc.artifact import LayerSpec, TowerSpec

ALIGN = 32  # widths stay whole groups of the 4-bit grid
TOWERS = ("decoder", "expert", "encoder")
VISION = ("vision", "vision2")

Towers = Mapping[str, TowerSpec]


@dataclass(frozen=True)
class Group:
    """``number`` parts of a block, each with ``size`` rows of the layers ``rows`` and columns of those ``columns``.

    Rows may be ``fused``: so many runs of all parts one after the other (q, k and v in one layer). As many parts are
    kept of each of the ``kv_groups`` equal runs that the parts form, in multiples of ``lot``.
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
        """Parts -> their rows, in each of the fused runs."""
        rows = (parts[:, None] * self.size + torch.arange(self.size)).flatten()
        return (torch.arange(fused)[:, None] * self.number * self.size + rows).flatten()

    def sum_parts(self, layer: str, importance: Tensor) -> Tensor:
        """Importance of every weight of one of the layers -> of every part (number,), in float32."""
        along, fused = (1, self.fused) if layer in self.rows else (0, 1)
        vector = importance.sum(along, dtype=torch.float32)
        return vector.unflatten(0, (fused, self.number, self.size)).sum((0, 2))

    def select_best(self, scores: Tensor, count: int) -> Tensor:
        """Which ``count`` parts are kept, in their order."""
        runs = scores.unflatten(0, (self.kv_groups, -1))
        first = torch.arange(self.kv_groups)[:, None] * runs.shape[1]
        return (runs.topk(count // self.kv_groups).indices.sort().values + first).flatten()

    def count_left(self, ratio: float) -> int:
        """How many parts remain when this part of them goes: the nearest possible number, one lot at least."""
        each = self.number // self.kv_groups
        return self.kv_groups * min(each, max(self.multiple, round(each * (1 - ratio) / self.multiple) * self.multiple))


def find_groups(
    towers: Towers, tower: str, block: int, names: Iterable[str], align: int = ALIGN
) -> tuple[Group, Group]:
    """Heads and channels of a block; ``names`` are those of the policy's tensors, or begin with its block's.

    Lots keep the columns of o and down whole multiples of ``align``, unless there is only one of them.
    """
    layer, prefix = towers[tower].layers[block], f"{tower}.layers.{block}"
    own, present = owns_keys(towers, tower, layer), set(names)
    alone = own and layer.kv_heads == layer.heads
    fused = f"{prefix}.attention.qkv.weight" in present
    rows = ("qkv",) if fused else ("q", "k", "v") if alone else ("q",)
    inputs = [name for name in ("gate", "up") if f"{prefix}.mlp.{name}.weight" in present]
    kv_groups, half = 1 if alone else layer.kv_heads, layer.kv_only
    heads = Group(
        tuple(f"{prefix}.attention.{name}" for name in rows),
        (f"{prefix}.attention.{'out' if fused else 'o'}",),
        0 if half else layer.heads,
        layer.head_dim,
        kv_groups,
        3 if fused else 1,
    )
    channels = Group(
        tuple(f"{prefix}.mlp.{name}" for name in inputs), (f"{prefix}.mlp.down",), 0 if half else layer.mlp
    )
    return replace(heads, multiple=_multiple(heads, align)), replace(channels, multiple=_multiple(channels, align))


def _multiple(group: Group, align: int) -> int:
    """The smallest number of parts of a bundle that is aligned. Narrower ones fill no group whatever is cut."""
    lot = align // gcd(align, group.kv_groups * group.size) if group.number else 1
    return lot if group.number and group.number // group.kv_groups > lot else 1


def owns_keys(towers: Towers, tower: str, layer: LayerSpec) -> bool:
    """Whether no other tower attends to this block's keys and values, or makes its own of them."""
    return tower in VISION or "expert" not in towers or (tower == "expert" and layer.kind == "cross")


def resize_layer(towers: Towers, tower: str, layer: LayerSpec, heads: int, channels: int) -> LayerSpec:
    """The block with so many heads and channels."""
    alone = owns_keys(towers, tower, layer) and layer.kv_heads == layer.heads
    return replace(layer, heads=heads, kv_heads=heads if alone else layer.kv_heads, mlp=channels)
