"""Depth pruning: drops whole blocks, together with the blocks that depend on them.

- Flow policies: an expert block and the prefix blocks that it attends to (one or several). The last ones are kept,
  because the prefix's last block has keys and values only.
- ACT's decoder: the two blocks, self-attention and cross-attention, of an official layer.
- All others: single blocks.

Dropping a block passes the residual stream through unchanged, without norms on the stream itself (ACT's).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch

from rlrc.artifact import TowerSpec
from rlrc.compressor.models.coupling import VISION, Towers
from rlrc.compressor.models.flow import prefix_stride
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.weights import set_tensor
from rlrc.errors import UserError

Unit = Mapping[str, tuple[int, ...]]  # blocks of each tower that are dropped together


def find_units(towers: Towers, tower: str) -> list[Unit]:
    """All units of the tower, from first to last."""
    depth = len(towers[tower].layers)
    if "expert" in towers and tower not in VISION:
        stride, pairs = prefix_stride(dict(towers)), len(towers["expert"].layers)
        prefix = len(towers["decoder"].layers)
        ends = [min((i + 1) * stride, prefix) for i in range(pairs - 1)] + [prefix]
        return [{"decoder": tuple(range(i * stride, end)), "expert": (i,)} for i, end in enumerate(ends)]
    if any(layer.kind == "cross" for layer in towers[tower].layers):
        return [{tower: (i, i + 1)} for i in range(0, depth, 2)]
    return [{tower: (i,)} for i in range(depth)]


def droppable_units(towers: Towers, tower: str) -> list[Unit]:
    """The units that may be dropped: all but the last one of a prefix and its expert."""
    units = find_units(towers, tower)
    return units[:-1] if "expert" in units[0] else units


def find_unit(towers: Towers, tower: str, block: int) -> Unit:
    """The unit of a block. Raises UserError if there is no such block or it cannot be dropped."""
    for unit in droppable_units(towers, tower):
        if block in unit[tower]:
            return unit
    most = max((block for unit in droppable_units(towers, tower) for block in unit[tower]), default=-1)
    raise UserError(f"expected prune.blocks from 0 to {most} of the {tower}, found {block}; see rlrc inspect")


def drop_from_towers(towers: Towers, dropped: Collection[Unit]) -> dict[str, TowerSpec]:
    """The towers without these units. Raises UserError if no block is left, or expert and prefix no longer match."""
    after = dict(towers)
    for tower in {tower for unit in dropped for tower in unit}:
        left = tuple(towers[tower].layers[i] for i in remaining_blocks(towers, tower, dropped))
        if not left:
            raise UserError(f"expected at least one block left in the {tower}, found none; drop fewer")
        after[tower] = replace(towers[tower], layers=left)
    if after["decoder"] != towers["decoder"] and "expert" in towers:
        stride, expert = prefix_stride(dict(towers)), after["expert"].layers
        if prefix_stride(after) != stride or len(after["decoder"].layers[::stride]) != len(expert):
            raise UserError(
                f"expected a stride of {stride} prefix blocks per expert block, found {prefix_stride(after)} with "
                f"{len(after['decoder'].layers)} prefix and {len(expert)} expert blocks; drop fewer"
            )
    return after


def remaining_blocks(towers: Towers, tower: str, dropped: Collection[Unit]) -> list[int]:
    """Numbers of the tower's blocks that are kept."""
    lost = {block for unit in dropped for block in unit.get(tower, ())}
    return [i for i in range(len(towers[tower].layers)) if i not in lost]


def drop_blocks(policy: PolicyModule, dropped: Sequence[Unit]) -> PolicyModule:
    """The policy without these blocks. It shares its tensors with the given policy."""
    towers, state = drop_from_towers(policy.towers, dropped), dict(policy.state_dict())
    for tower in (name for name, spec in towers.items() if spec != policy.towers[name]):
        numbers = {old: new for new, old in enumerate(remaining_blocks(policy.towers, tower, dropped))}
        prefix = f"{tower}.layers."
        for name in [name for name in state if name.startswith(prefix)]:
            tensor, (old, rest) = state.pop(name), name.removeprefix(prefix).split(".", 1)
            if int(old) in numbers:
                state[f"{prefix}{numbers[int(old)]}.{rest}"] = tensor
    return assemble(policy, towers, state)


def assemble(policy: PolicyModule, towers: Mapping[str, TowerSpec], state: Mapping[str, torch.Tensor]) -> PolicyModule:
    result = build_on_meta(policy.spec, towers)
    for name in result.state_dict():
        set_tensor(result, name, state[name])
    return result
