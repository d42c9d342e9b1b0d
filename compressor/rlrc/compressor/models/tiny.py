"""The reference family "tiny": a small vision-language-action policy with OpenVLA-OFT's architecture.

Vision transformer, merged patches, projector; instruction tokens; one state token; one query token per step of the
chunk; a bidirectional Llama-style decoder, which has most of the parameters; a head with logits over bins for every
step and action dimension. The whole chunk is decoded in one parallel pass (OpenVLA-OFT, arXiv 2502.19645, section 4).
The logits give reinforcement learning its log-probabilities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.compressor.models import decode
from rlrc.compressor.models.nn.decoder import Decoder
from rlrc.compressor.models.nn.linear import Embedding, Linear
from rlrc.compressor.models.nn.vit import VisionTransformer, merge_patches
from rlrc.compressor.models.policy import Inputs, Outputs, PolicyModule, parse_geometry

FAMILY = "tiny"


@dataclass(frozen=True)
class TinyGeometry:
    """What the towers do not specify. ``stem_factors`` multiply to the patch size in pixels."""

    vocabulary: int
    stem_factors: tuple[int, ...]
    stem_widths: tuple[int, ...]
    merge: int  # merge x merge patches become one decoder token


class TinyPolicy(PolicyModule):
    """(pictures, token ids, state) -> logits over action bins."""

    def __init__(self, spec: PolicySpec, towers: dict[str, TowerSpec]) -> None:
        super().__init__(spec, towers)
        geometry = parse_geometry(TinyGeometry, spec)
        vision, decoder = towers["vision"], towers["decoder"]
        (camera,) = spec.cameras
        assert spec.state is not None
        patch = math.prod(geometry.stem_factors)
        grid = (camera.height // patch, camera.width // patch)
        self.merge = geometry.merge
        self.image_tokens = grid[0] * grid[1] // geometry.merge**2

        self.vision = VisionTransformer(vision, grid, geometry.stem_factors, geometry.stem_widths, fused=False)
        self.projector = Linear(vision.width * geometry.merge**2, decoder.width)
        self.embedding = Embedding(geometry.vocabulary, decoder.width)
        self.state = Linear(len(spec.state.names), decoder.width)
        self.query = nn.Parameter(nn.init.normal_(torch.empty(spec.action.horizon, decoder.width), std=0.02))
        self.decoder = Decoder(decoder, fused=False)
        self.head = Linear(decoder.width, spec.action.dim * spec.action.bins, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        nn.init.normal_(self.embedding.weight, std=0.1)
        nn.init.normal_(self.head.weight, std=0.01)
        for layer in self.decoder.blocks():
            # Small residual branches at initialisation, as in GPT-2.
            for branch in (layer.attention.o, layer.mlp.down):
                nn.init.normal_(branch.weight, std=0.02 / (2 * len(self.decoder.layers)) ** 0.5)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised pictures (B, H, W, 3) -> image tokens (B, N, decoder width). The exporters' graph "vision"."""
        return self.projector(merge_patches(self.vision(pixels), self.merge).flatten(1, 2))

    def hidden(self, image_tokens: Tensor, ids: Tensor, state: Tensor) -> Tensor:
        """Hidden states of the query tokens (B, horizon, decoder width)."""
        parts = [image_tokens, self.embedding(ids), self.state(state)[:, None], self.query.expand(len(ids), -1, -1)]
        # Under autocast, too, the residual stream has the parameters' precision.
        sequence = torch.cat([part.to(self.query.dtype) for part in parts], 1)
        hidden, _ = self.decoder(sequence)
        return hidden[:, -self.spec.action.horizon :]

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, horizon, width) -> (B, horizon, dim, bins) in float32."""
        action = self.spec.action
        return self.head(hidden).float().unflatten(-1, (action.dim, action.bins))

    def act(self, inputs: Inputs) -> Outputs:
        return decode.parallel(self, inputs)

    def decode(self, image_tokens: Tensor, ids: Tensor | None, mask: Tensor | None, state: Tensor | None) -> Tensor:
        """See ``decode.Parallel``. Padding is read as tokens, so the mask is ignored."""
        assert ids is not None
        assert state is not None
        return self.logits(self.hidden(image_tokens, ids, state))

    def forward(self, pixels: Tensor, ids: Tensor, state: Tensor) -> Tensor:
        """For training: pixels (B, H, W, 3), ids (B, L), state (B, S) -> logits (B, horizon, dim, bins)."""
        return self.logits(self.hidden(self.encode_image(pixels), ids, state))
