"""Structured pruning of a tower: whole attention heads and whole MLP channels.

As in the paper (arXiv 2506.17639, stage 1, after LLM-Pruner): what must be cut together is scored together. A head has
rows of q (and of k and v where it has its own) and columns of o; a channel has rows of gate and up and columns of down.
Its score is the sum over those weights of |weight * gradient| of the task loss (first-order Taylor importance), or of
|weight| where there are no demonstrations. The residual width is unchanged, first and last blocks are kept, what is
kept stays in its order.

Query heads that share a key/value head go in equal numbers from each, and the key/value heads stay; so do those that
another tower reads (the prefix's and the expert's in flow policies).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from rlrc.artifact import LayerSpec, TowerSpec
from rlrc.compressor.backbones import build
from rlrc.compressor.losses import chunk_loss, drawn
from rlrc.compressor.policy import Policy
from rlrc.errors import UserError

if TYPE_CHECKING:
    from rlrc.compressor.batches import Batches

ALIGN = 32  # widths stay whole groups of the 4-bit grid
SCORES = ("taylor", "magnitude", "random")
TOWERS = ("decoder", "expert", "encoder")

Towers = Mapping[str, TowerSpec]


@dataclass(frozen=True)
class PruneConfig:
    ratio: float = 0.9
    """part of the heads and MLP channels of the intermediate blocks that goes"""
    score: Literal["taylor", "magnitude", "random"] = "taylor"
    """taylor needs demonstrations (the reference family's only), magnitude none; random is the control that shows what
    a score is worth"""
    tower: Literal["decoder", "expert", "encoder"] | None = None
    """which tower is cut (default: the encoder of a policy that has one, else the decoder)"""
    keep: int = 1
    """blocks at each end that are left whole"""
    batches: int = 16
    """batches of 64 samples for the gradients"""
    demonstrations: int = 60
    """expert episodes a task to draw those batches from"""
    seed: int = 0
    lossless: bool = False
    """cut nothing but what no action depends on; the other settings do not matter then"""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UserError(f"expected prune.ratio between 0 and 1 (excluded), found {self.ratio}")
        if self.score not in SCORES:
            raise UserError(f"expected prune.score {', '.join(SCORES)}, found {self.score!r}")
        if self.tower is not None and self.tower not in TOWERS:
            raise UserError(f"expected prune.tower {', '.join(TOWERS)}, found {self.tower!r}")
        for name, least in (("keep", 0), ("batches", 1), ("demonstrations", 1)):
            if getattr(self, name) < least:
                raise UserError(f"expected prune.{name} >= {least}, found {getattr(self, name)}")


@dataclass(frozen=True)
class Group:
    """``number`` parts of a block, each with ``size`` rows of the layers ``rows`` and columns of those ``columns``.

    As many parts are kept of each of the ``bundles`` equal runs that the parts form.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    number: int
    size: int = 1
    bundles: int = 1

    def indices(self, parts: Tensor) -> Tensor:
        """Parts -> their rows."""
        return (parts[:, None] * self.size + torch.arange(self.size)).flatten()

    def sums(self, importance: Mapping[str, Tensor]) -> Tensor:
        """Importance of every weight -> of every part (number,)."""
        by_row = [importance[f"{layer}.weight"].sum(1) for layer in self.rows]
        by_column = [importance[f"{layer}.weight"].sum(0) for layer in self.columns]
        each = [x.unflatten(0, (self.number, self.size)).sum(1) for x in (*by_row, *by_column)]
        return torch.stack(each).sum(0)

    def best(self, scores: Tensor, count: int) -> Tensor:
        """Which ``count`` parts are kept, in their order."""
        runs = scores.unflatten(0, (self.bundles, -1))
        first = torch.arange(self.bundles)[:, None] * runs.shape[1]
        return (runs.topk(count // self.bundles).indices.sort().values + first).flatten()


@dataclass(frozen=True)
class Scores:
    """Of one block: heads (heads,) and channels (mlp,)."""

    heads: Tensor
    channels: Tensor


def groups(block: str, layer: LayerSpec, own: bool, names: Iterable[str]) -> tuple[Group, Group]:
    """Heads and channels of the block of this name. ``own``: see ``own_keys``; ``names`` of the policy's tensors."""
    names, attention, mlp = set(names), f"{block}.attention", f"{block}.mlp"
    alone = own and layer.kv_heads == layer.heads
    rows = ("q", "k", "v") if alone else ("q",)
    heads = Group(
        tuple(f"{attention}.{name}" for name in rows),
        (f"{attention}.o",),
        0 if layer.kind == "half" else layer.heads,
        layer.head_dim,
        1 if alone else layer.kv_heads,
    )
    inputs = tuple(f"{mlp}.{name}" for name in ("gate", "up") if f"{mlp}.{name}.weight" in names)
    return heads, Group(inputs, (f"{mlp}.down",), 0 if layer.kind == "half" else layer.mlp)


def own_keys(towers: Towers, tower: str, layer: LayerSpec) -> bool:
    """Whether no other tower attends to this block's keys and values, or makes its own of them."""
    return "expert" not in towers or (tower == "expert" and layer.kind == "cross")


def tower_name(towers: Towers, config: PruneConfig) -> str:
    """The tower to cut. Raises UserError if the policy has none of that name."""
    name = config.tower or ("encoder" if "encoder" in towers else "decoder")
    if name not in towers:
        present = ", ".join(other for other in TOWERS if other in towers)
        raise UserError(f"expected prune.tower {present}, which is what the policy has, found {name}")
    return name


def kept(layer: LayerSpec, ratio: float, own: bool = True) -> LayerSpec:
    """The shape that remains: at least one head of each key/value head, and channels in whole groups of 32."""
    if layer.kind == "half":
        return layer
    heads, kv_heads, mlp = layer.heads, layer.kv_heads, layer.mlp
    if heads and heads == kv_heads and own:
        heads = kv_heads = max(1, round(heads * (1 - ratio)))
    elif heads:
        heads = kv_heads * max(1, round(heads // kv_heads * (1 - ratio)))
    if mlp:
        align = ALIGN if mlp > ALIGN else 1  # narrower ones fill no group whatever is cut
        mlp = min(mlp, max(align, round(mlp * (1 - ratio) / align) * align))
    return replace(layer, heads=heads, kv_heads=kv_heads, mlp=mlp)


def pruned_towers(towers: Towers, config: PruneConfig) -> dict[str, TowerSpec]:
    """The policy's shape after pruning. Raises UserError if there is no such tower or it has no intermediate blocks."""
    name = tower_name(towers, config)
    tower = towers[name]
    depth, ends = len(tower.layers), config.keep
    if depth <= 2 * ends:
        raise UserError(
            f"expected intermediate blocks in the {name} ({2 * ends + 1} or more in all), found {depth} blocks; "
            "leave fewer whole at each end with --keep, or cut another --tower"
        )
    layers = [
        kept(layer, config.ratio, own_keys(towers, name, layer)) if ends <= i < depth - ends else layer
        for i, layer in enumerate(tower.layers)
    ]
    return {**towers, name: replace(tower, layers=tuple(layers))}


def scores_by(policy: Policy, config: PruneConfig, importance: Callable[[nn.Parameter], Tensor]) -> list[Scores]:
    """Scores of the tower's blocks, given the importance of a parameter's single weights."""
    name = tower_name(policy.towers, config)
    parameters = dict(policy.named_parameters())

    def sums(group: Group) -> Tensor:
        if not group.number:
            return torch.zeros(0)
        weights = [f"{layer}.weight" for layer in (*group.rows, *group.columns)]
        return group.sums({weight: importance(parameters[weight]).detach().float() for weight in weights})

    scores = []
    for i, layer in enumerate(policy.towers[name].layers):
        own = own_keys(policy.towers, name, layer)
        scores.append(Scores(*map(sums, groups(f"{name}.layers.{i}", layer, own, parameters))))
    return scores


def taylor_scores(policy: Policy, batches: Batches, config: PruneConfig) -> list[Scores]:
    """First-order Taylor importance of every block; the policy's gradients are cleared before and after."""
    policy.eval().zero_grad()
    for _ in range(config.batches):
        loss, _ = chunk_loss(policy, drawn(policy, batches.draw(64)))
        (loss / config.batches).backward()
    scores = scores_by(policy, config, taylor)
    policy.zero_grad()
    return scores


def taylor(weight: nn.Parameter) -> Tensor:
    assert weight.grad is not None
    return (weight * weight.grad).abs()


def magnitude_scores(policy: Policy, config: PruneConfig) -> list[Scores]:
    """Sums of |weight|: what can be said without demonstrations."""
    return scores_by(policy, config, torch.abs)


def random_scores(policy: Policy, config: PruneConfig) -> list[Scores]:
    generator = torch.Generator().manual_seed(config.seed)
    return [
        Scores(torch.rand(layer.heads, generator=generator), torch.rand(layer.mlp, generator=generator))
        for layer in policy.towers[tower_name(policy.towers, config)].layers
    ]


def prune(policy: Policy, scores: list[Scores], config: PruneConfig) -> tuple[Policy, dict[str, Any]]:
    """A smaller policy and a report: what went in each layer, of the tower and of the whole.

    The given policy is unchanged; tensors that nothing was cut of are shared with it. Raises UserError as
    ``pruned_towers`` does.
    """
    name, towers = tower_name(policy.towers, config), pruned_towers(policy.towers, config)
    state = dict(policy.state_dict())
    for i, score in enumerate(scores):
        before, after = policy.towers[name].layers[i], towers[name].layers[i]
        heads, channels = groups(f"{name}.layers.{i}", before, own_keys(towers, name, before), state)
        for group, values, count in ((heads, score.heads, after.heads), (channels, score.channels, after.mlp)):
            if 0 < count < group.number:
                cut(state, group, group.best(values, count))
    with torch.device("meta"):
        pruned = build(policy.spec, towers)
    pruned.load_state_dict(state, assign=True)
    return pruned.eval(), report(policy, pruned, name)


def cut(state: dict[str, Tensor], group: Group, parts: Tensor) -> None:
    """Leaves only these parts of the group in the state dict."""
    rows = group.indices(parts)
    for layer in group.rows:
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name in state:
                state[name] = state[name][rows]
    for layer in group.columns:
        state[f"{layer}.weight"] = state[f"{layer}.weight"][:, rows]


def report(dense: Policy, pruned: Policy, tower: str) -> dict[str, Any]:
    """Removed parts: per layer of the tower (heads, channels, parameters), of the tower and of the whole."""

    def count(policy: Policy, prefix: str = "") -> int:
        return sum(tensor.numel() for name, tensor in policy.named_parameters() if name.startswith(prefix))

    def removed(before: float, after: float) -> float:
        return round(1 - after / before, 4) if before else 0.0

    shapes = zip(dense.towers[tower].layers, pruned.towers[tower].layers, strict=True)
    return {
        "layers": [
            {
                "heads": removed(a.heads, b.heads),
                "mlp": removed(a.mlp, b.mlp),
                "parameters": removed(*(count(policy, f"{tower}.layers.{i}.") for policy in (dense, pruned))),
            }
            for i, (a, b) in enumerate(shapes)
        ],
        tower: removed(count(dense, f"{tower}."), count(pruned, f"{tower}.")),
        "whole": removed(count(dense), count(pruned)),
        "parameters": count(pruned),
    }
