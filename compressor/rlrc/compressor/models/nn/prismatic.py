"""What OpenVLA and OpenVLA-OFT share: vision transformers, projector, embeddings, and a Llama decoder."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.compressor.models.nn.decoder import Decoder
from rlrc.compressor.models.nn.linear import Embedding, Linear
from rlrc.compressor.models.nn.vit import VisionTransformer
from rlrc.compressor.models.policy import PolicyModule, parse_geometry

TRANSFORMERS = ("vision", "vision2")  # in the order of their channels


@dataclass(frozen=True)
class PrismaticGeometry:
    """What the towers do not specify. ``extra`` and ``scaled`` have an entry for every vision transformer."""

    vocabulary: int
    patch: int  # pixels of a side
    extra: tuple[int, ...]  # class and register tokens before the patches
    scaled: tuple[bool, ...]  # whether it has LayerScale
    projector: tuple[int, ...]  # outputs of its linear layers
    state: int = 0  # width of the state's projector; 0: no state
    head: int = 0  # width of the regression head; 0: tokens
    head_blocks: int = 0


class PrismaticPolicy(PolicyModule):
    """The policy without its head."""

    def __init__(self, spec: PolicySpec, towers: dict[str, TowerSpec]) -> None:
        super().__init__(spec, towers)
        self.geometry, camera = parse_geometry(PrismaticGeometry, spec), spec.cameras[0]
        self.grid = (camera.height // self.geometry.patch, camera.width // self.geometry.patch)
        self.vision = self._transformer(0)
        self.vision2 = self._transformer(1) if TRANSFORMERS[1] in towers else None
        width = sum(towers[name].width for name in TRANSFORMERS if name in towers)
        self.projector = gelu_mlp(width, *self.geometry.projector)
        self.embedding = Embedding(self.geometry.vocabulary, towers["decoder"].width)
        self.decoder = Decoder(towers["decoder"])

    def _transformer(self, i: int) -> VisionTransformer:
        tower, geometry = self.towers[TRANSFORMERS[i]], self.geometry
        extra, scaled, factors = geometry.extra[i], geometry.scaled[i], (geometry.patch,)
        return VisionTransformer(tower, self.grid, factors, extra=extra, scaled=scaled, normed=False)

    def features(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3 for every vision transformer) -> their features side by side, (B, N, sum of their widths)."""
        rows, columns = (patches * self.geometry.patch for patches in self.grid)
        # Pixels that do not fill a patch are dropped: 384 pixels are 27 patches of 14.
        pixels = pixels[:, :rows, :columns].to(self.vision.position.dtype)
        found = [self.vision(pixels[..., :3])]
        if self.vision2 is not None:
            found.append(self.vision2(pixels[..., 3:]))
        return torch.cat(found, -1).flatten(1, 2)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.projector(self.features(pixels))


def gelu_mlp(*widths: int) -> nn.Sequential:
    """Linear layers from width to width with GELU between them."""
    layers: list[nn.Module] = [Linear(widths[0], widths[1])]
    for before, after in pairwise(widths[1:]):
        layers += [nn.GELU(), Linear(before, after)]
    return nn.Sequential(*layers)
