"""A vision transformer in which every block has its own geometry: pixels -> patch tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrc.artifact import LayerSpec, TowerSpec
from rlrc.compressor.models.nn.decoder import ACTIVATIONS, attend
from rlrc.compressor.models.nn.linear import Linear, Recomputing


class PatchStem(nn.Module):
    """Patch embedding in steps: each merges ``factor`` x ``factor`` neighbours by a linear layer, with GELU in between.

    This is a stem of strided convolutions as linear layers, whose bf16 backward pass is fast on CPUs. With one step it
    is the usual patch embedding; the weight's columns are ordered (row, column, colour).
    """

    def __init__(self, factors: tuple[int, ...], widths: tuple[int, ...]) -> None:
        super().__init__()
        self.factors = factors
        inputs = (3, *widths)
        self.steps = nn.ModuleList(Linear(inputs[i] * factor**2, widths[i]) for i, factor in enumerate(factors))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, 3) -> (B, H', W', width)."""
        if len(self.factors) == 1:  # a convolution, as in the official policies: bit-identical
            (factor,), step = self.factors, self.steps[0]
            assert isinstance(step, Linear)
            kernel = step.read().to(x.device, x.dtype).unflatten(1, (factor, factor, -1))
            kernel = kernel.permute(0, 3, 1, 2).contiguous()
            return F.conv2d(x.permute(0, 3, 1, 2), kernel, step.bias, factor).permute(0, 2, 3, 1)
        for i, (factor, step) in enumerate(zip(self.factors, self.steps, strict=True)):
            x = step(merge_patches(F.gelu(x) if i else x, factor))
        return x


def merge_patches(x: Tensor, factor: int) -> Tensor:
    """Space to depth: (B, H, W, C) -> (B, H / factor, W / factor, factor * factor * C)."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // factor, factor, width // factor, factor, channels)
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3)


class VisionAttention(nn.Module):
    def __init__(self, width: int, layer: LayerSpec, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.head_dim, self.fused = layer.heads, layer.head_dim, fused
        self.qkv = Linear(width, 3 * layer.heads * layer.head_dim)
        self.out = Linear(layer.heads * layer.head_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v, fused=self.fused))


class VisionMLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str = "gelu") -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class VisionBlock(nn.Module):
    """A pre-norm block. ``scaled``: LayerScale on both branches, as in DINOv2. ``fused``: see ``attend``."""

    def __init__(self, tower: TowerSpec, layer: LayerSpec, scaled: bool = False, fused: bool = True) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(tower.width, tower.eps)
        self.attention = VisionAttention(tower.width, layer, fused)
        self.norm2 = nn.LayerNorm(tower.width, tower.eps)
        self.mlp = VisionMLP(tower.width, layer.mlp, tower.activation or "gelu")
        self.scaled = scaled
        if scaled:
            self.scale1, self.scale2 = (nn.Parameter(torch.ones(tower.width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(self.norm1(x))
        x = x + (self.scale1 * y if self.scaled else y)
        y = self.mlp(self.norm2(x))
        return x + (self.scale2 * y if self.scaled else y)


class VisionTransformer(Recomputing):
    """Stem, learned positions, blocks, final norm: (B, H, W, 3) -> (B, H', W', width).

    ``extra`` tokens (class, registers) precede the patches, have no positions, and are dropped at the end.
    """

    def __init__(
        self,
        tower: TowerSpec,
        grid: tuple[int, int],
        factors: tuple[int, ...],
        stem: tuple[int, ...] = (),
        extra: int = 0,
        scaled: bool = False,
        normed: bool = True,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.grid = grid
        self.stem = PatchStem(factors, (*stem, tower.width))
        self.position = nn.Parameter(nn.init.normal_(torch.empty(grid[0] * grid[1], tower.width), std=0.02))
        self.extra = nn.Parameter(torch.zeros(extra, tower.width)) if extra else None
        self.layers = nn.ModuleList(VisionBlock(tower, layer, scaled, fused) for layer in tower.layers)
        self.norm = nn.LayerNorm(tower.width, tower.eps) if normed else None

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels).flatten(1, 2) + self.position
        if self.extra is not None:
            x = torch.cat([self.extra.expand(len(x), -1, -1), x], 1)
        for layer in self.layers:
            x = self.block(layer, x)
        if self.extra is not None:
            x = x[:, len(self.extra) :]
        return (x if self.norm is None else self.norm(x)).unflatten(1, self.grid)
