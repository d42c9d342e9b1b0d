"""A ResNet without pooling and classifier: pixels -> a feature map (arXiv 1512.03385).

Batch norms are frozen: their statistics are buffers that are never updated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 32  # pixels per feature; half as many if the last stage is dilated


class FrozenBatchNorm(nn.Module):
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the channels of (B, C, H, W)."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("mean", 0.0), ("variance", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.affine()
        return x * weight[:, None, None] + bias[:, None, None]

    def affine(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the equivalent ``x * weight + bias``, which a convolution before it can absorb."""
        scale = self.weight * (self.variance + self.eps).rsqrt()
        return scale, self.bias - self.mean * scale


class ConvNorm(nn.Module):
    """A convolution without bias, and its norm. Stride 1 keeps the size."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = kernel // 2 * dilation
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
        self.norm = FrozenBatchNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions, or 1 x 1, 3 x 3, 1 x 1 (``bottleneck``); the first 3 x 3 one has the stride."""

    def __init__(
        self, inputs: int, width: int, outputs: int, stride: int, dilation: int, bottleneck: bool, projected: bool
    ) -> None:
        super().__init__()
        if bottleneck:
            middle = ConvNorm(width, width, 3, stride, dilation)
            convs = [ConvNorm(inputs, width, 1), middle, ConvNorm(width, outputs, 1)]
        else:
            convs = [ConvNorm(inputs, width, 3, stride), ConvNorm(width, outputs, 3)]
        self.convs = nn.ModuleList(convs)
        self.skip = ConvNorm(inputs, outputs, 1, stride) if projected else None

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, conv in enumerate(self.convs):
            y = conv(F.relu(y) if i else y)
        return F.relu(y + (x if self.skip is None else self.skip(x)))


class ResNet(nn.Module):
    """Stem and four stages of ``blocks`` blocks, with ``widths`` channels inside a block and ``outputs`` after it.

    All stages but the first halve the resolution; with ``dilated``, the last dilates its 3 x 3 convolutions instead.
    """

    def __init__(
        self,
        stem: int,
        blocks: Sequence[int],
        widths: Sequence[int],
        outputs: Sequence[int],
        bottleneck: bool,
        dilated: bool,
    ) -> None:
        super().__init__()
        self.stem = ConvNorm(3, stem, 7, stride=2)
        self.stages = nn.ModuleList()
        channels = stem
        for stage, (count, width, out) in enumerate(zip(blocks, widths, outputs, strict=True)):
            spread = dilated and stage == len(blocks) - 1
            halves = stage > 0
            members = []
            for i in range(count):
                stride = 2 if halves and not spread and i == 0 else 1
                dilation = 2 if spread and i > 0 else 1
                projected = i == 0 and (halves or channels != out)
                members.append(ResidualBlock(channels, width, out, stride, dilation, bottleneck, projected))
                channels = out
            self.stages.append(nn.ModuleList(members))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) -> (B, H', W', channels), see ``feature_size``."""
        # Contiguous, since torch's channels-last convolutions round differently from the official policy's.
        x = F.relu(self.stem(pixels.permute(0, 3, 1, 2).contiguous()))
        x = F.max_pool2d(x, 3, 2, 1)
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                x = block(x)
        return x.permute(0, 2, 3, 1)


def feature_size(height: int, width: int, dilated: bool) -> tuple[int, int]:
    """Rows and columns of a picture's feature map: every halving rounds up."""
    stride = STRIDE // 2 if dilated else STRIDE
    return -(-height // stride), -(-width // stride)
