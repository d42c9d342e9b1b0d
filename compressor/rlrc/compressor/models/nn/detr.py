"""Transformer blocks that add positions to queries and keys, not to values (DETR, arXiv 2005.12872).

The encoder has "self" blocks. Every official decoder layer is two blocks here, so that each attention has its own
geometry: a "self" block without an MLP, and a "cross" block to the encoder's output. Heads and MLPs may be absent;
attention without heads has a constant output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlrc.artifact import LayerSpec, TowerSpec
from rlrc.compressor.models.nn.decoder import attend
from rlrc.compressor.models.nn.linear import Linear, Recomputing
from rlrc.compressor.models.nn.vit import VisionMLP


class DetrAttention(nn.Module):
    def __init__(self, width: int, layer: LayerSpec) -> None:
        super().__init__()
        self.heads, self.head_dim = layer.heads, layer.head_dim
        inner = layer.heads * layer.head_dim
        if layer.heads:
            self.q, self.k, self.v = (Linear(width, inner) for _ in range(3))
        self.o = Linear(inner, width) if layer.heads else Constant(width)

    def split(self, x: Tensor) -> Tensor:
        """(B, T, heads * head_dim) -> (B, heads, T, head_dim)."""
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, T, width), (B, S, width), (B, S, width) -> (B, T, width), or (width,) if there are no heads."""
        if not self.heads:
            return self.o.bias
        return self.o(attend(self.split(self.q(query)), self.split(self.k(key)), self.split(self.v(value))))


class Constant(nn.Module):
    """The bias of a linear layer that has no inputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))


class DetrBlock(nn.Module):
    """``pre_norm``: the input of each branch is normalised, otherwise the residual stream after each branch."""

    def __init__(self, tower: TowerSpec, layer: LayerSpec, pre_norm: bool) -> None:
        super().__init__()
        self.cross, self.pre_norm = layer.kind == "cross", pre_norm
        self.norm1 = nn.LayerNorm(tower.width, tower.eps)
        self.attention = DetrAttention(tower.width, layer)
        if layer.mlp:
            self.norm2 = nn.LayerNorm(tower.width, tower.eps)
            self.mlp = VisionMLP(tower.width, layer.mlp, tower.activation or "relu")
        self.has_mlp = layer.mlp > 0

    def forward(self, x: Tensor, position: Tensor, memory: Tensor, memory_position: Tensor) -> Tensor:
        """x (B, T, width) with positions (T, width) attends to itself, or to the memory (B, S, width) if "cross"."""
        y = self.norm1(x) if self.pre_norm else x
        key, value = (memory + memory_position, memory) if self.cross else (y + position, y)
        x = x + self.attention(y + position, key, value)
        x = x if self.pre_norm else self.norm1(x)
        if not self.has_mlp:
            return x
        if self.pre_norm:
            return x + self.mlp(self.norm2(x))
        return self.norm2(x + self.mlp(x))


class Transformer(Recomputing):
    """A stack of ``DetrBlock``, with a final norm if ``normed``."""

    def __init__(self, tower: TowerSpec, pre_norm: bool, normed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DetrBlock(tower, layer, pre_norm) for layer in tower.layers)
        self.norm = nn.LayerNorm(tower.width, tower.eps) if normed else None

    def forward(
        self, x: Tensor, position: Tensor, memory: Tensor | None = None, memory_position: Tensor | None = None
    ) -> Tensor:
        """See ``DetrBlock``."""
        for layer in self.layers:
            source = (x, position) if memory is None or memory_position is None else (memory, memory_position)
            x = self.block(layer, x, position, *source)
        return x if self.norm is None else self.norm(x)
