"""Pads MLPs with channels of zeros, so that their rows fill the groups of the grid and can be quantized.

SigLIP's MLPs have 4304 channels, which is no multiple of 32: their second layers, a third of the tower, would stay in
16 bits. 16 more channels (0.4 %) let them take 4 or 8. MLPs that would need many more channels are not padded: these
would take more than they save. All activations map zero to zero and no layer reads a channel of zeros, so the actions
stay the same.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from rlrc.artifact import TowerSpec
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.nn.linear import Rows
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.storage.scratch import Allocate, keep
from rlrc.compressor.models.weights import set_source, set_tensor, tensors_of
from rlrc.compressor.quantize.grid import GROUP, GROUPS

MOST = 1.25
"""times the channels, at most: at 1.29, three layers in 8 bits take as much as two in 8 and one in 16 before"""


def pad_towers(towers: dict[str, TowerSpec], group: int = GROUP) -> dict[str, TowerSpec]:
    """The towers with every MLP's width rounded up to a multiple of the group, where that adds few channels."""
    return {
        name: replace(
            tower, layers=tuple(replace(layer, mlp=_pad_channels(layer.mlp, group)) for layer in tower.layers)
        )
        for name, tower in towers.items()
    }


def _pad_channels(channels: int, group: int) -> int:
    wide = -(-channels // group) * group
    return wide if wide <= MOST * channels else channels if group == GROUP else _pad_channels(channels, group // 2)


def pad_policy(
    policy: PolicyModule, group: int = GROUP, allocate: Allocate | None = None
) -> tuple[PolicyModule, dict[str, Any]]:
    """A policy with the same actions, and a report (channels added, by tower). The policy itself if none are added.

    ``allocate`` makes room for the wider tensors.
    """
    towers = pad_towers(policy.towers, group)
    added = {
        name: sum(new.mlp - old.mlp for new, old in zip(tower.layers, policy.towers[name].layers, strict=True))
        for name, tower in towers.items()
    }
    added = {name: channels for name, channels in added.items() if channels}
    if not added:
        return policy, {}
    result = build_on_meta(policy.spec, towers)
    given = policy.state_dict()
    for name, wanted in result.state_dict().items():
        tensor = given[name]
        if tensor.shape != wanted.shape:
            tensor = keep(_pad_tensor(tensor, wanted.shape), allocate)
        set_tensor(result, name, tensor)
    return result.train(policy.training), {"channels_of_zeros": added}


def _pad_tensor(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Append zeros along every dimension, up to this shape."""
    missing = [wanted - found for wanted, found in zip(shape, tensor.shape, strict=True)]
    return F.pad(tensor, [size for more in reversed(missing) for size in (0, more)])


def unpad_policy(policy: PolicyModule, towers: dict[str, TowerSpec]) -> PolicyModule:
    """Undo ``pad_policy`` for a policy of these towers. Returns the policy itself if it was not padded."""
    if policy.towers == towers or policy.towers not in [pad_towers(towers, group) for group in GROUPS]:
        return policy
    result = build_on_meta(policy.spec, towers)
    given = tensors_of(policy)
    for name, wanted in result.state_dict().items():
        tensor = given[name]
        cut = tensor[tuple(slice(size) for size in wanted.shape)]
        if torch.count_nonzero(tensor) != torch.count_nonzero(cut):
            return policy  # the added channels have been trained since
        if name in given.computed:
            set_source(result, name, wanted.shape, partial(_cut, given.computed[name], wanted.shape))
        else:
            set_tensor(result, name, cut)
    return result.train(policy.training)


def _cut(source: Rows, shape: torch.Size, rows: slice | torch.Tensor) -> torch.Tensor:
    """These of the first ``shape[0]`` rows, and their first columns."""
    if isinstance(rows, slice):
        rows = slice(*rows.indices(shape[0]))
    return source(rows)[:, : shape[1]]
