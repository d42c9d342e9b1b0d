"""The groups that are cut together, against those that Torch-Pruning's dependency graph finds by tracing a block.

It cannot follow rotations, which take a head's halves apart and join them again (it raises a TypeError): they mix
numbers of one head only, so the blocks are traced without. Where heads share keys it says that a key's rows go with the
first head that reads them; here they stay for the others.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn

from families import FAMILIES, source_of
from rlrc.compressor.models.coupling import Group, find_groups
from rlrc.compressor.models.nn import decoder, detr, vit
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.tiny import TinyPolicy

Coupled = dict[tuple[str, int], list[int]]  # layer and dimension of its weight: indices


class Alone(nn.Module):
    """A block as a function of the residual stream x (B, T, width)."""

    def __init__(self, policy: PolicyModule, tower: str, index: int) -> None:
        super().__init__()
        self.block = policy.get_submodule(f"{tower}.layers.{index}")
        self.policy, self.tower = [policy], policy.towers[tower]  # a list: its parameters are not this module's
        self.index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.block, vit.VisionBlock):
            return self.block(x)
        if isinstance(self.block, detr.DetrBlock):
            return self.block(x, x[0], x, x[0])
        condition, past = None, None
        if self.tower.norm == "adaptive":
            block: Any = self.block
            condition = torch.randn(1, block.norm1.dense.in_features)
        if self.block.kind == "cross":
            source = self.policy[0].towers["decoder"].layers[self.index]
            past = tuple(torch.randn(1, source.kv_heads, 5, source.head_dim) for _ in range(2))
        return self.block(x, decoder.AttentionContext(x, self.tower, None, None, condition), past)[0]


def traced(policy: PolicyModule, tower: str, index: int, group: Group) -> Coupled:
    """What goes with the first part of the group, by the graph."""
    alone, prefix = Alone(policy, tower, index), f"{tower}.layers.{index}."
    x = torch.randn(1, 5, policy.towers[tower].width)
    graph = tp.DependencyGraph().build_dependency(alone, x, verbose=False)
    root = alone.block.get_submodule(group.rows[0].removeprefix(prefix))
    names = {module: f"{prefix}{name}" for name, module in alone.block.named_modules()}
    rows = group.indices(torch.tensor([0])).tolist()
    found: Coupled = {}
    for dependency, indices in graph.get_pruning_group(root, tp.prune_linear_out_channels, rows):
        if dependency.target.module in names:  # others are operations
            dimension = 0 if dependency.handler.__name__ == "prune_out_channels" else 1
            found.setdefault((names[dependency.target.module], dimension), []).extend(map(int, indices))
    return {place: sorted(set(indices)) for place, indices in found.items()}


def written(group: Group) -> Coupled:
    first = torch.tensor([0])
    rows = {(layer, 0): sorted(group.indices(first, group.fused).tolist()) for layer in group.rows}
    return rows | {(layer, 1): group.indices(first).tolist() for layer in group.columns}


def check(policy: PolicyModule) -> int:
    """How many groups were compared: one block of every kind in every tower."""
    compared, kinds = 0, set[Any]()
    for tower, spec in policy.towers.items():
        for i, layer in enumerate(spec.layers):
            if layer.kind == "half" or (tower, layer.kind) in kinds:
                continue
            kinds.add((tower, layer.kind))
            for group in find_groups(policy.towers, tower, i, policy.state_dict()):
                if group.number:
                    found = traced(policy, tower, i, group)
                    if group.rows == (f"{tower}.layers.{i}.attention.q",):  # the keys stay
                        for name in "kv":
                            assert found.pop((f"{tower}.layers.{i}.attention.{name}", 0))
                    assert found == written(group), (tower, i)
                    compared += 1
    return compared


@pytest.fixture(autouse=True)
def unrotated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "rotate", lambda x, cos, sin: x)


@pytest.mark.parametrize("name", FAMILIES)
def test_groups_are_those_of_the_dependency_graph(name: str) -> None:
    policy = source_of(name).load().requires_grad_(True)
    assert check(policy) >= {"act": 5}.get(name, 6)


def test_groups_of_the_reference_family(pupil: TinyPolicy) -> None:
    assert check(pupil) == 4
