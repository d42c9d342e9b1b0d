"""OpenVLA-OFT (arXiv 2502.19645): OpenVLA fine-tuned to give a whole chunk from one pass over several pictures.

Sequence: first token, the patches of all pictures, the state if there is one, the rest of the prompt, a zero vector for
every number of the chunk, </s>; attention is bidirectional. As in next-token prediction, each number is decoded from
the hidden state one position before its own: by an MLP over all hidden states of a time step (trained with an L1 loss),
or as a token. FiLM and diffusion heads are recognised and refused.

Neither config.json nor the weights contain the number of pictures or the length of the chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.compressor.models import decode
from rlrc.compressor.models.nn.decoder import additive
from rlrc.compressor.models.nn.linear import Linear
from rlrc.compressor.models.nn.prismatic import PrismaticPolicy, gelu_mlp
from rlrc.compressor.models.policy import Inputs, Outputs

FAMILY = "openvla-oft"
STOP = 2  # </s>


class RegressionHead(nn.Module):
    """Hidden states of a time step (..., inputs) -> its action (..., dim): an MLP with residual blocks."""

    def __init__(self, inputs: int, width: int, blocks: int, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(inputs)
        self.input = Linear(inputs, width)
        block = [nn.Sequential(nn.LayerNorm(width), Linear(width, width), nn.ReLU()) for _ in range(blocks)]
        self.blocks = nn.ModuleList(block)
        self.norm2 = nn.LayerNorm(width)
        self.output = Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.input(self.norm1(x)))
        for block in self.blocks:
            x = x + block(x)
        return self.output(self.norm2(x))


class OFTPolicy(PrismaticPolicy):
    """(pictures, ids, state) -> a chunk, in one pass."""

    def __init__(self, spec: PolicySpec, towers: dict[str, TowerSpec]) -> None:
        super().__init__(spec, towers)
        action, width, geometry = spec.action, towers["decoder"].width, self.geometry
        self.state = gelu_mlp(len(spec.state.names), geometry.state, width) if spec.state else None
        if action.tokens is None:
            self.head: nn.Module = RegressionHead(action.dim * width, geometry.head, geometry.head_blocks, action.dim)
        else:
            self.head = Linear(width, action.tokens.rows, bias=False)

    def sequence(self, image_tokens: Tensor, ids: Tensor, state: Tensor | None) -> Tensor:
        """The decoder's input (B, T, width). The chunk's positions are the last ones before </s>."""
        words, chunk = self.embedding(ids), self.spec.action.horizon * self.spec.action.dim
        parts = [words[:, :1], image_tokens]
        if self.state is not None:
            assert state is not None
            parts.append(self.state(state.to(words.dtype))[:, None])
        empty = words.new_zeros(len(ids), chunk, words.shape[-1])
        parts += [words[:, 1:], empty, self.embedding(ids.new_full((len(ids), 1), STOP))]
        return torch.cat([part.to(words.dtype) for part in parts], 1)

    def hidden(self, image_tokens: Tensor, ids: Tensor, mask: Tensor | None, state: Tensor | None) -> Tensor:
        """Hidden states of the chunk's numbers (B, horizon * dim, width)."""
        x, chunk = self.sequence(image_tokens, ids, state), self.spec.action.horizon * self.spec.action.dim
        first = x.shape[1] - 1 - chunk  # the chunk's first position
        if mask is None:
            return self.decoder(x)[0][:, first - 1 : first - 1 + chunk]
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        real[:, first - ids.shape[1] + 1 : first] = mask[:, 1:]
        y, _ = self.decoder(x, additive(real)[:, None, None].to(x), real.cumsum(1) - 1)
        # Padding lies between the prompt's last token and the chunk's positions.
        last = y[torch.arange(len(y), device=y.device), first - 1 - (~mask).sum(1)]
        return torch.cat([last[:, None], y[:, first : first + chunk - 1]], 1)

    def decode(self, image_tokens: Tensor, ids: Tensor | None, mask: Tensor | None, state: Tensor | None) -> Tensor:
        """See ``decode.Parallel``."""
        assert ids is not None
        action, hidden = self.spec.action, self.hidden(image_tokens, ids, mask, state)
        if action.tokens is None:
            return self.head(hidden.unflatten(1, (action.horizon, action.dim)).flatten(2)).float()
        return self.head(hidden).float().unflatten(1, (action.horizon, action.dim))

    def act(self, inputs: Inputs) -> Outputs:
        return decode.parallel(self, inputs)
