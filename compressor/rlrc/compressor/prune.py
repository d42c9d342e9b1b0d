"""Structured pruning of the decoder: whole attention heads and whole MLP channels, by first-order Taylor importance.

As in the paper (arXiv 2506.17639, stage 1, after LLM-Pruner): a group is everything that must be cut together (a head's
rows of q, k, v and columns of o; a channel's rows of gate and up and column of down); its score is the sum of |weight *
gradient| of the task loss over the group. The residual width is unchanged, first and last blocks are kept, kept groups
stay in their order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlrc.artifact import LayerSpec, TowerSpec
from rlrc.compressor.backbones.tiny import TinyPolicy
from rlrc.compressor.data import Batches
from rlrc.compressor.nn.decoder import Block
from rlrc.errors import UserError

ALIGN = 32  # widths stay whole groups of the 4-bit grid


@dataclass(frozen=True)
class PruneConfig:
    ratio: float = 0.9
    """part of the heads and MLP channels of the intermediate decoder blocks that goes"""
    score: Literal["taylor", "random"] = "taylor"
    """random is the control that shows what the score is worth"""
    batches: int = 16
    """batches of 64 samples for the gradients"""
    demonstrations: int = 60
    """expert episodes a task to draw those batches from"""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UserError(f"expected prune.ratio between 0 and 1 (excluded), found {self.ratio}")
        if self.score not in ("taylor", "random"):
            raise UserError(f"expected prune.score taylor or random, found {self.score!r}")
        for name in ("batches", "demonstrations"):
            if getattr(self, name) < 1:
                raise UserError(f"expected prune.{name} >= 1, found {getattr(self, name)}")


@dataclass(frozen=True)
class Scores:
    """Of one block: heads (heads,) and channels (mlp,)."""

    heads: Tensor
    channels: Tensor


def taylor_scores(policy: TinyPolicy, batches: Batches, config: PruneConfig, smoothing: float) -> list[Scores]:
    """First-order Taylor importance of every decoder block; the policy's gradients are cleared before and after."""
    from rlrc.compressor.sft import smoothed_cross_entropy

    policy.eval().zero_grad()
    for _ in range(config.batches):
        pixels, ids, state, chunk = batches.draw(64)
        loss = smoothed_cross_entropy(policy(pixels, ids, state), chunk, smoothing)
        (loss / config.batches).backward()
    scores = [block_scores(block) for block in policy.decoder.blocks()]
    policy.zero_grad()
    return scores


def block_scores(block: Block) -> Scores:
    attention, mlp = block.attention, block.mlp

    def importance(layer: nn.Linear) -> Tensor:
        assert layer.weight.grad is not None
        return (layer.weight * layer.weight.grad).detach().abs()

    per_head = (attention.heads, -1)
    heads = importance(attention.o).sum(0).view(per_head).sum(1)
    for layer in (attention.q, attention.k, attention.v):
        heads = heads + importance(layer).sum(1).view(per_head).sum(1)
    channels = importance(mlp.gate).sum(1) + importance(mlp.up).sum(1) + importance(mlp.down).sum(0)
    return Scores(heads, channels)


def random_scores(policy: TinyPolicy, seed: int) -> list[Scores]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Scores(torch.rand(x.heads, generator=generator), torch.rand(x.mlp, generator=generator))
        for x in policy.towers["decoder"].layers
    ]


def kept(layer: LayerSpec, ratio: float) -> LayerSpec:
    """The shape that remains: at least one head, and channels rounded to a multiple of 32, at least 32."""
    heads = max(1, round(layer.heads * (1 - ratio)))
    mlp = max(ALIGN, round(layer.mlp * (1 - ratio) / ALIGN) * ALIGN)
    return replace(layer, heads=heads, kv_heads=heads, mlp=min(mlp, layer.mlp))


def top(scores: Tensor, count: int) -> Tensor:
    return scores.topk(count).indices.sort().values


def cut_block(block: Block, layer: LayerSpec, heads: Tensor, channels: Tensor, width: int) -> Block:
    """A block of shape ``layer`` with the named heads and channels of ``block``."""
    rows = (heads[:, None] * layer.head_dim + torch.arange(layer.head_dim)).flatten()
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    for name in ("q", "k", "v"):
        state[f"attention.{name}.weight"] = state[f"attention.{name}.weight"][rows]
    state["attention.o.weight"] = state["attention.o.weight"][:, rows]
    for name in ("gate", "up"):
        state[f"mlp.{name}.weight"] = state[f"mlp.{name}.weight"][channels]
    state["mlp.down.weight"] = state["mlp.down.weight"][:, channels]
    result = Block(width, layer)
    result.load_state_dict(state)
    return result


def pruned_tower(tower: TowerSpec, config: PruneConfig) -> TowerSpec:
    """The decoder's shape after pruning.

    Raises UserError if the decoder has no intermediate blocks or shares key/value heads between query heads.
    """
    if len(tower.layers) < 3:
        raise UserError(f"expected a decoder with intermediate blocks (3 or more in all), found {len(tower.layers)}")
    if any(layer.kv_heads != layer.heads for layer in tower.layers):
        raise UserError(
            "expected as many key/value heads as query heads in every block, found fewer; "
            "grouped-query decoders are not supported yet"
        )
    first, *intermediate, last = tower.layers
    return TowerSpec(tower.width, (first, *(kept(layer, config.ratio) for layer in intermediate), last))


def prune(policy: TinyPolicy, scores: list[Scores], config: PruneConfig) -> tuple[TinyPolicy, dict[str, Any]]:
    """A smaller policy and a report: what went in each layer, of the decoder and of the whole.

    The given policy is unchanged. Raises UserError as ``pruned_tower`` does.
    """
    tower = pruned_tower(policy.towers["decoder"], config)
    pruned = TinyPolicy(policy.spec, {**policy.towers, "decoder": tower})
    state = {name: tensor for name, tensor in policy.state_dict().items() if not name.startswith("decoder.layers.")}
    pruned.load_state_dict(state, strict=False)
    for i, (layer, score) in enumerate(zip(tower.layers, scores, strict=True)):
        block = policy.decoder.blocks()[i]
        pruned.decoder.layers[i] = cut_block(
            block, layer, top(score.heads, layer.heads), top(score.channels, layer.mlp), tower.width
        )
    return pruned.eval(), report(policy, pruned)


def report(dense: TinyPolicy, pruned: TinyPolicy) -> dict[str, Any]:
    """Removed parts: per layer (heads, channels, parameters), of the decoder ("language model") and of the whole."""

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    def removed(before: float, after: float) -> float:
        return round(1 - after / before, 4)

    shapes = zip(dense.towers["decoder"].layers, pruned.towers["decoder"].layers, strict=True)
    blocks = zip(dense.decoder.layers, pruned.decoder.layers, strict=True)
    return {
        "layers": [
            {
                "heads": removed(a.heads, b.heads),
                "mlp": removed(a.mlp, b.mlp),
                "parameters": removed(count(c), count(d)),
            }
            for (a, b), (c, d) in zip(shapes, blocks, strict=True)
        ],
        "decoder": removed(count(dense.decoder), count(pruned.decoder)),
        "whole": removed(count(dense), count(pruned)),
        "parameters": count(pruned),
    }
