"""MLPs widened by channels of zeros, so that all their rows fill the groups of the grid and can be quantized.

SigLIP's MLPs have 4304 channels, which is no multiple of 32: the rows of their second layers, a third of the tower,
would stay in 16 bits. With 16 channels more (0.4 %) they take 4 or 8. Where many would have to be added, those would
take more than they save, and nothing is. Every activation here is zero at zero and nothing
reads a channel of zeros, so the actions are the same.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from rlrc.artifact import TowerSpec
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.quantize.grid import GROUP, GROUPS

MOST = 1.25
"""times as many channels: at 1.29 three layers in 8 bits take what two in 8 and one in 16 did"""


def filled_towers(towers: dict[str, TowerSpec], group: int = GROUP) -> dict[str, TowerSpec]:
    """The same towers, MLPs as wide as the next multiple of the group if that is not far."""
    return {
        name: replace(tower, layers=tuple(replace(layer, mlp=_filled(layer.mlp, group)) for layer in tower.layers))
        for name, tower in towers.items()
    }


def _filled(channels: int, group: int) -> int:
    wide = -(-channels // group) * group
    return wide if wide <= MOST * channels else channels if group == GROUP else _filled(channels, group // 2)


def filled(policy: PolicyModule, group: int = GROUP) -> tuple[PolicyModule, dict[str, Any]]:
    """A policy with the same actions, and a report: channels added, by tower. Nothing to add: the policy itself."""
    towers = filled_towers(policy.towers, group)
    added = {
        name: sum(new.mlp - old.mlp for new, old in zip(tower.layers, policy.towers[name].layers, strict=True))
        for name, tower in towers.items()
    }
    added = {name: channels for name, channels in added.items() if channels}
    if not added:
        return policy, {}
    result = build_on_meta(policy.spec, towers)
    given = policy.state_dict()
    state = {
        name: given[name] if given[name].shape == wanted.shape else _padded(given[name], wanted.shape)
        for name, wanted in result.state_dict().items()
    }
    result.load_state_dict(state, assign=True)
    return result.train(policy.training), {"channels_of_zeros": added}


def _padded(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Zeros after the last entry of every dimension that is to be longer."""
    missing = [wanted - found for wanted, found in zip(shape, tensor.shape, strict=True)]
    return F.pad(tensor, [size for more in reversed(missing) for size in (0, more)])


def unfilled(policy: PolicyModule, towers: dict[str, TowerSpec]) -> PolicyModule:
    """The policy that was ``filled`` from these towers, or itself where it was not: only channels of zeros go."""
    if policy.towers == towers or policy.towers not in [filled_towers(towers, group) for group in GROUPS]:
        return policy
    result = build_on_meta(policy.spec, towers)
    given, state = policy.state_dict(), {}
    for name, wanted in result.state_dict().items():
        cut = given[name][tuple(slice(size) for size in wanted.shape)]
        if torch.count_nonzero(given[name]) != torch.count_nonzero(cut):
            return policy  # what was added has learned something since
        state[name] = cut
    result.load_state_dict(state, assign=True)
    return result.train(policy.training)
