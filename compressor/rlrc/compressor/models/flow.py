"""pi0 (arXiv 2410.24164), pi0.5 (2504.16054) and SmolVLA (2506.01844): a vision-language prefix and an action expert.

The prefix (pictures and prompt) is encoded once. The expert attends to its keys and values, block by block, while it
turns noise into a chunk of actions in a few flow steps. The families differ by configuration: the position of the
state's token, whether the time enters with the actions or through adaptive norms, whether actions attend to later ones,
and the expert's cross blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.compressor.models import decode
from rlrc.compressor.models.device import widest_float
from rlrc.compressor.models.nn.decoder import Decoder, KeyValue
from rlrc.compressor.models.nn.linear import Embedding, Linear
from rlrc.compressor.models.nn.vit import VisionTransformer, merge_patches
from rlrc.compressor.models.policy import Inputs, Outputs, PolicyModule, parse_geometry


@dataclass(frozen=True)
class FlowGeometry:
    """What the towers do not specify.

    ``patch`` in pixels; ``merge`` x ``merge`` patches become one token; ``bias`` of the projector; ``scaled``: image
    tokens are multiplied by the square root of their width, as prompt tokens always are. ``state``: its token ends the
    prefix ("prefix"), starts the expert's sequence ("suffix"), or the state is part of the prompt's text ("prompt").
    ``causal``: actions do not attend to later ones. ``periods``: shortest and longest period of the time's sines.
    """

    vocabulary: int
    patch: int
    merge: int
    bias: bool
    scaled: bool
    state: Literal["prefix", "suffix", "prompt"]
    causal: bool
    periods: tuple[float, float]


def prefix_stride(towers: dict[str, TowerSpec]) -> int:
    """Expert block i attends to prefix block i * stride."""
    return max((len(towers["decoder"].layers) - 1) // max(len(towers["expert"].layers) - 1, 1), 1)


class FlowPolicy(PolicyModule):
    """(pictures, token ids, state, noise) -> a chunk of actions."""

    def __init__(self, spec: PolicySpec, towers: dict[str, TowerSpec]) -> None:
        super().__init__(spec, towers)
        assert spec.flow is not None
        self.geometry = geometry = parse_geometry(FlowGeometry, spec)
        vision, decoder, expert = towers["vision"], towers["decoder"], towers["expert"]
        width = expert.width

        self.grid = (spec.cameras[0].height // geometry.patch, spec.cameras[0].width // geometry.patch)
        self.vision = VisionTransformer(vision, self.grid, (geometry.patch,))
        self.projector = Linear(vision.width * geometry.merge**2, decoder.width, bias=geometry.bias)
        self.embedding = Embedding(geometry.vocabulary, decoder.width)
        self.decoder = Decoder(decoder)
        self.stride = prefix_stride(towers)
        attended = replace(decoder, layers=decoder.layers[:: self.stride])
        self.expert = Decoder(expert, attended, spec.flow.steps if expert.tabulated else width)
        if geometry.state != "prompt":
            assert spec.state is not None
            numbers = spec.state.width or len(spec.state.names)
            self.state = Linear(numbers, decoder.width if geometry.state == "prefix" else width)
        self.action_in = Linear(spec.flow.width, width)
        self.action_out = Linear(width, spec.flow.width)
        if not expert.tabulated:
            self.time_in = Linear(width if expert.norm == "adaptive" else 2 * width, width)
            self.time_out = Linear(width, width)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised pictures of one camera (B, H, W, 3) -> image tokens (B, N, prefix width)."""
        rows, columns = (patches * self.geometry.patch for patches in self.grid)
        # Pixels that do not fill a patch are dropped, as a convolution does.
        features = self.vision(pixels[:, :rows, :columns])
        return self.projector(merge_patches(features, self.geometry.merge).flatten(1, 2))

    def embed(self, image_tokens: Tensor, ids: Tensor, state: Tensor | None = None) -> Tensor:
        """Image tokens (B, N, width), prompt (B, L), state (B, S) -> the prefix's input (B, N + L [+ 1], width)."""
        scale = image_tokens.shape[-1] ** 0.5
        parts = [image_tokens * scale if self.geometry.scaled else image_tokens, self.embedding(ids) * scale]
        if self.geometry.state == "prefix":
            assert state is not None
            parts.append(self.state(state)[:, None])
        return torch.cat(parts, 1)

    def prefix(
        self, image_tokens: Tensor, ids: Tensor | None, mask: Tensor | None = None, state: Tensor | None = None
    ) -> tuple[list[KeyValue], Tensor | None]:
        """Keys and values of every block, and a mask (B, P) that is false at padding (None: no padding).

        ``mask`` (B, L) is false where the prompt is padded: padding is not attended to and takes no position.
        """
        assert ids is not None
        sequence = self.embed(image_tokens, ids, state)
        length = sequence.shape[1]
        index = torch.arange(length, device=sequence.device)
        blocked, positions = None, index
        if self.geometry.state == "prefix":  # only the state's token attends to itself
            blocked = (index == length - 1) & (index[:, None] != length - 1)
        if mask is not None:
            mask = F.pad(mask, (image_tokens.shape[1], length - image_tokens.shape[1] - ids.shape[1]), value=True)
            positions = mask.cumsum(1) - 1
            padded = ~mask[:, None, None]
            blocked = padded if blocked is None else padded | blocked
        _, present = self.decoder(sequence, None if blocked is None else _minus(blocked, sequence), positions)
        return present, mask

    def velocity(self, past: list[KeyValue], mask: Tensor | None, state: Tensor | None, x: Tensor, t: Tensor) -> Tensor:
        """Velocity of x (B, horizon, width) at the times t (B,), in the same shape.

        ``past`` and ``mask`` come from ``prefix``. Integer t are indices of flow steps.
        """
        sequence, condition = self.suffix(state, x, t)
        sequence = sequence.to(self.action_in.bias.dtype)  # under autocast too
        length, before = sequence.shape[1], past[0][0].shape[2]
        index = torch.arange(length, device=x.device)
        blocked, positions = self._later(index), index + before
        if blocked is not None or mask is not None:
            own = torch.zeros(length, length, dtype=torch.bool, device=x.device) if blocked is None else blocked
            padded = own.new_zeros(1, 1, 1, before) if mask is None else ~mask[:, None, None]
            shapes = (len(padded), 1, length, -1)
            blocked = torch.cat([padded.expand(shapes), own.expand(shapes)], -1)
        if mask is not None:
            positions = mask.sum(1, keepdim=True) + index
        additive_mask = None if blocked is None else _minus(blocked, sequence)
        hidden, _ = self.expert(sequence, additive_mask, positions, past[:: self.stride], condition)
        return self.action_out(hidden[:, -x.shape[1] :])

    def suffix(self, state: Tensor | None, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The expert's input (B, [1 +] horizon, width), and the condition of its norms."""
        actions, condition = self.action_in(x), None
        if self.towers["expert"].norm == "rms":
            time = self.time(t).to(actions.dtype)[:, None].expand_as(actions)
            actions = self.time_out(F.silu(self.time_in(torch.cat([actions, time], -1))))
        else:
            condition = self.condition(t)
        if self.geometry.state != "suffix":
            return actions, condition
        assert state is not None
        return torch.cat([self.state(state)[:, None], actions], 1), condition

    def condition(self, t: Tensor) -> Tensor:
        """The condition of the expert's norms at the times t (B,): channels (B, width), or step indices (B,)."""
        assert self.spec.flow is not None
        if self.towers["expert"].tabulated:
            return ((1 - t) * self.spec.flow.steps).round().long() if t.is_floating_point() else t
        return F.silu(self.time_out(F.silu(self.time_in(self.time(t).to(self.time_in.bias.dtype)))))

    def time(self, t: Tensor) -> Tensor:
        """Sines and cosines (B, expert width) of times (B,) in [0, 1]; integers are indices of flow steps.

        Computed in float64, where there is one: at the shortest period, 1 / 250, float32 would be off by 1e-4.
        """
        assert self.spec.flow is not None
        shortest, longest = self.geometry.periods
        wide = widest_float(t.device)
        fraction = torch.linspace(0, 1, self.towers["expert"].width // 2, dtype=wide, device=t.device)
        # The drivers pass times in float32.
        t = t if t.is_floating_point() else (1 - t.to(wide) / self.spec.flow.steps).float()
        angle = t[:, None].to(wide) * (2 * math.pi / (shortest * (longest / shortest) ** fraction))
        return torch.cat([angle.sin(), angle.cos()], -1)

    def _later(self, index: Tensor) -> Tensor | None:
        """Boolean (T, T): where a position of the expert's sequence must not attend to a later one."""
        if self.geometry.causal:
            return index > index[:, None]
        if self.geometry.state == "suffix":  # the state does not attend to the actions
            return (index > 0) & (index[:, None] == 0)
        return None

    def act(self, inputs: Inputs) -> Outputs:
        return decode.flow(self, inputs)


def _minus(blocked: Tensor, like: Tensor) -> Tensor:
    """Boolean mask -> additive mask, minus infinity where blocked."""
    return torch.zeros(blocked.shape, dtype=like.dtype, device=like.device).masked_fill(blocked, float("-inf"))
