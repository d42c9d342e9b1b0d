"""ACT as lerobot saves it (arXiv 2304.13705): ResNet features of every camera, a DETR encoder and decoder, no language.

The encoder's sequence is the latent, the robot's state, the environment's state if there is one, then the pixels of
the cameras' feature maps. The decoder turns one learned query per step of the chunk into an action, starting from
zeros. At inference the latent is zero, so only the bias of its projection is kept and the VAE's encoder is not loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.compressor.models import decode
from rlrc.compressor.models.nn.detr import Transformer
from rlrc.compressor.models.nn.linear import Linear
from rlrc.compressor.models.nn.resnet import ResNet, feature_size
from rlrc.compressor.models.policy import Inputs, Outputs, PolicyModule, parse_geometry

FAMILY = "act"


@dataclass(frozen=True)
class ACTGeometry:
    """What the towers do not specify: the ResNet (see ``ResNet``), the position of the norms, and the state's parts."""

    stem: int
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    outputs: tuple[int, ...]
    bottleneck: bool
    dilated: bool
    pre_norm: bool
    state: int  # first numbers of the state: the robot's
    environment: int  # the numbers after them: the environment's


class ACTPolicy(PolicyModule):
    """(pictures, state) -> actions, in one pass."""

    def __init__(self, spec: PolicySpec, towers: dict[str, TowerSpec]) -> None:
        super().__init__(spec, towers)
        self.geometry = g = parse_geometry(ACTGeometry, spec)
        width = towers["encoder"].width
        self.vision = ResNet(g.stem, g.blocks, g.widths, g.outputs, g.bottleneck, g.dilated)
        self.projector = Linear(g.outputs[-1], width)
        self.latent = nn.Parameter(torch.zeros(width))
        self.state = Linear(g.state, width) if g.state else None
        self.environment = Linear(g.environment, width) if g.environment else None
        self.position = nn.Parameter(torch.zeros(1 + bool(g.state) + bool(g.environment), width))
        self.query = nn.Parameter(torch.zeros(spec.action.horizon, width))
        self.encoder = Transformer(towers["encoder"], g.pre_norm, normed=g.pre_norm)
        self.decoder = Transformer(towers["decoder"], g.pre_norm, normed=True)
        self.head = Linear(width, spec.action.dim)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.projector(self.vision(pixels)).flatten(1, 2)

    def positions(self) -> Tensor:
        """Positions of the encoder's sequence (T, width): learned ones, then those of every camera's feature map."""
        grids = [feature_size(c.height, c.width, self.geometry.dilated) for c in self.spec.cameras]
        maps = [sinusoidal(rows, columns, self.position.shape[1], self.position.device) for rows, columns in grids]
        return torch.cat([self.position, *(grid.to(self.position.dtype) for grid in maps)])

    def encode(self, image_tokens: Tensor, state: Tensor | None) -> Tensor:
        """Image tokens (B, N, width), state (B, S) or None -> the encoder's output (B, T, width)."""
        tokens = [self.latent.expand(len(image_tokens), 1, -1)]
        if state is not None:
            own, other = state[:, : self.geometry.state], state[:, self.geometry.state :]
            tokens += [layer(x)[:, None] for layer, x in ((self.state, own), (self.environment, other)) if layer]
        return self.encoder(torch.cat([*tokens, image_tokens], 1), self.positions())

    def decode(self, image_tokens: Tensor, ids: Tensor | None, mask: Tensor | None, state: Tensor | None) -> Tensor:
        """Tokens of all cameras (B, N, width), normalised state (B, S) -> normalised actions (B, horizon, dim)."""
        memory = self.encode(image_tokens, state)
        start = torch.zeros_like(self.query).expand(len(memory), -1, -1)
        return self.head(self.decoder(start, self.query, memory, self.positions()))

    def act(self, inputs: Inputs) -> Outputs:
        return decode.parallel(self, inputs)


def sinusoidal(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Positions of a grid (rows * columns, width): the first half encodes the row, the second the column.

    Rows and columns count from 1; the last one is at 2 pi. Sines and cosines alternate (DETR, arXiv 2005.12872).
    """
    channels = width // 2
    pairs = torch.arange(channels, dtype=torch.float32, device=device) // 2
    wavelength = 10_000 ** (2 * pairs / channels)

    def along(length: int) -> Tensor:
        place = torch.arange(1, length + 1, dtype=torch.float32, device=device)
        angle = (place / (length + 1e-6) * (2 * math.pi))[:, None] / wavelength
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], -1).flatten(1)

    vertical, horizontal = along(rows)[:, None], along(columns)[None]
    grid = [part.expand(rows, columns, channels) for part in (vertical, horizontal)]
    return torch.cat(grid, -1).flatten(0, 1)
