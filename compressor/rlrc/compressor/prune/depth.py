"""Whole blocks that go, with what must go with them.

- Flow policies: an expert's block goes with the blocks of the prefix that it attends to, which are one or several. The
  last ones stay: of the prefix's last block nothing but keys and values is left.
- ACT's decoder: an official layer is two blocks here, self-attention and cross-attention.
- All others: every block by itself.

A block that goes is one whose branches add nothing: the residual stream passes. (Where norms stand on the stream
itself, as in ACT, those go too.)
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
from rlrc.errors import UserError

Unit = Mapping[str, tuple[int, ...]]  # blocks of each tower that go together


def units(towers: Towers, tower: str) -> list[Unit]:
    """All of the tower's, from the first to the last."""
    depth = len(towers[tower].layers)
    if "expert" in towers and tower not in VISION:
        stride, pairs = prefix_stride(dict(towers)), len(towers["expert"].layers)
        prefix = len(towers["decoder"].layers)
        ends = [min((i + 1) * stride, prefix) for i in range(pairs - 1)] + [prefix]
        return [{"decoder": tuple(range(i * stride, end)), "expert": (i,)} for i, end in enumerate(ends)]
    if any(layer.kind == "cross" for layer in towers[tower].layers):
        return [{tower: (i, i + 1)} for i in range(0, depth, 2)]
    return [{tower: (i,)} for i in range(depth)]


def droppable(towers: Towers, tower: str) -> list[Unit]:
    """All that may go: not the last of those that a prefix ends with."""
    found = units(towers, tower)
    return found[:-1] if "expert" in found[0] else found


def unit_of(towers: Towers, tower: str, block: int) -> Unit:
    """Raises UserError for a block that is not there or cannot go."""
    for unit in droppable(towers, tower):
        if block in unit[tower]:
            return unit
    most = max((block for unit in droppable(towers, tower) for block in unit[tower]), default=-1)
    raise UserError(f"expected prune.blocks from 0 to {most} of the {tower}, found {block}; see rlrc inspect")


def dropped(towers: Towers, gone: Collection[Unit]) -> dict[str, TowerSpec]:
    """The shape without these. Raises UserError if nothing is left, or an expert's blocks lose their prefix's."""
    after = dict(towers)
    for tower in {tower for unit in gone for tower in unit}:
        left = tuple(towers[tower].layers[i] for i in remaining(towers, tower, gone))
        if not left:
            raise UserError(f"expected a block that stays in the {tower}, found none; drop fewer")
        after[tower] = replace(towers[tower], layers=left)
    if after["decoder"] != towers["decoder"] and "expert" in towers:
        stride, expert = prefix_stride(dict(towers)), after["expert"].layers
        if prefix_stride(after) != stride or len(after["decoder"].layers[::stride]) != len(expert):
            raise UserError(
                f"expected so many expert blocks that every one has its {stride} of the prefix, found {len(expert)} "
                f"with {len(after['decoder'].layers)}; drop fewer"
            )
    return after


def remaining(towers: Towers, tower: str, gone: Collection[Unit]) -> list[int]:
    lost = {block for unit in gone for block in unit.get(tower, ())}
    return [i for i in range(len(towers[tower].layers)) if i not in lost]


def without(policy: PolicyModule, gone: Sequence[Unit]) -> PolicyModule:
    """The policy without these blocks; its tensors are shared with the given one."""
    towers, state = dropped(policy.towers, gone), dict(policy.state_dict())
    for tower in (name for name, spec in towers.items() if spec != policy.towers[name]):
        numbers = {old: new for new, old in enumerate(remaining(policy.towers, tower, gone))}
        prefix = f"{tower}.layers."
        for name in [name for name in state if name.startswith(prefix)]:
            tensor, (old, rest) = state.pop(name), name.removeprefix(prefix).split(".", 1)
            if int(old) in numbers:
                state[f"{prefix}{numbers[int(old)]}.{rest}"] = tensor
    return assembled(policy, towers, state)


def assembled(policy: PolicyModule, towers: Mapping[str, TowerSpec], state: Mapping[str, torch.Tensor]) -> PolicyModule:
    result = build_on_meta(policy.spec, towers)
    result.load_state_dict(state, assign=True)
    return result.eval()
