"""OpenVLA (arXiv 2406.09246) in Hugging Face's format: one picture, an instruction, a token for each action dimension.

Sequence: first token, the picture's patches, the rest of the prompt; causal. Each token is the likeliest of the whole
vocabulary and maps to one of 255 bins. Not replicated: the JPEG round trip, Lanczos resizing and centre crop of the
LIBERO evaluation, and that generation stops at </s>. Folders of OpenVLA-OFT have the same format: see oft.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.compressor.models import decode
from rlrc.compressor.models.nn.decoder import KeyValue, causal_mask
from rlrc.compressor.models.nn.linear import Linear
from rlrc.compressor.models.nn.prismatic import PrismaticPolicy
from rlrc.compressor.models.policy import Inputs, Outputs

FAMILY = "openvla"


class OpenVLAPolicy(PrismaticPolicy):
    """(picture, ids) -> tokens, one after the other."""

    def __init__(self, spec: PolicySpec, towers: dict[str, TowerSpec]) -> None:
        super().__init__(spec, towers)
        assert spec.action.tokens is not None
        self.head = Linear(towers["decoder"].width, spec.action.tokens.rows, bias=False)

    def step(
        self, image_tokens: Tensor | None, ids: Tensor, past: list[KeyValue] | None
    ) -> tuple[Tensor, list[KeyValue]]:
        """See ``decode.Autoregressive``. The past holds every block's keys and values."""
        x = self.embedding(ids)
        if image_tokens is not None:
            x = torch.cat([x[:, :1], image_tokens.to(x.dtype), x[:, 1:]], 1)
        before, length = past[0][0].shape[2] if past else 0, x.shape[1]
        positions = torch.arange(before, before + length, device=x.device)
        hidden, present = self.decoder(x, causal_mask(length, before, x.device).to(x), positions, past)
        return self.head(hidden[:, -1]).float(), present

    def last_logits(self, image_tokens: Tensor, ids: Tensor, count: int) -> Tensor:
        """See ``decode.Autoregressive``."""
        words = self.embedding(ids)
        x = torch.cat([words[:, :1], image_tokens.to(words.dtype), words[:, 1:]], 1)
        hidden, _ = self.decoder(x, causal_mask(x.shape[1], device=x.device).to(x))
        return self.head(hidden[:, -count:]).float()

    def act(self, inputs: Inputs) -> Outputs:
        return decode.autoregressive(self, inputs)
