"""A vision transformer: pixels to patch tokens, with per-layer geometry."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrc.artifact import LayerSpec, TowerSpec
from rlrc.compressor.nn.decoder import attend


class PatchStem(nn.Module):
    """Embeds patches in steps: each joins ``factor`` x ``factor`` neighbours in one linear layer, with GELU between.

    A strided convolution stem written with linear layers, whose bf16 backward pass is fast on CPUs.
    """

    def __init__(self, factors: tuple[int, ...], widths: tuple[int, ...]) -> None:
        super().__init__()
        self.factors = factors
        inputs = (3, *widths)
        self.steps = nn.ModuleList(nn.Linear(inputs[i] * factor**2, widths[i]) for i, factor in enumerate(factors))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, 3) -> (B, H', W', width)."""
        for i, (factor, step) in enumerate(zip(self.factors, self.steps, strict=True)):
            x = step(merge_patches(F.gelu(x) if i else x, factor))
        return x


def merge_patches(x: Tensor, factor: int) -> Tensor:
    """Space to depth: (B, H, W, C) -> (B, H / factor, W / factor, factor * factor * C)."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // factor, factor, width // factor, factor, channels)
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3)


class Attention(nn.Module):
    def __init__(self, width: int, layer: LayerSpec) -> None:
        super().__init__()
        self.heads, self.head_dim = layer.heads, layer.head_dim
        self.qkv = nn.Linear(width, 3 * layer.heads * layer.head_dim)
        self.out = nn.Linear(layer.heads * layer.head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int, layer: LayerSpec) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, layer)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, layer.mlp)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Stem, learned positions, blocks, final norm: (B, H, W, 3) -> (B, H', W', width)."""

    def __init__(
        self, tower: TowerSpec, grid: tuple[int, int], factors: tuple[int, ...], stem: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.grid = grid
        self.stem = PatchStem(factors, (*stem, tower.width))
        self.position = nn.Parameter(torch.randn(grid[0] * grid[1], tower.width) * 0.02)
        self.layers = nn.ModuleList(Block(tower.width, layer) for layer in tower.layers)
        self.norm = nn.LayerNorm(tower.width)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels).flatten(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).unflatten(1, self.grid)
