"""A decoder-only transformer in which every block has its own geometry, so that it can hold any pruned shape.

RMSNorm (Llama's, Gemma's, or adaptive), rotary positions, grouped-query attention with a key/value cache, cross
attention to a prefix, and a gated MLP. The decoders and action experts of all families are configurations of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrc.artifact import LayerSpec, TowerSpec
from rlrc.compressor.models.nn.linear import Linear, Recomputing

KeyValue = tuple[Tensor, Tensor]  # of one block, (B, kv_heads, T, head_dim) each; keys are rotated

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu-tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467). The stored weight plus ``offset`` is the scale (Gemma: offset 1)."""

    def __init__(self, width: int, eps: float = 1e-5, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.offset if self.offset else self.weight
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)


class AdaptiveRMSNorm(nn.Module):
    """Scale, shift and residual gate computed from a condition (B, C): adaRMS of pi0.5 (arXiv 2504.16054)."""

    def __init__(self, width: int, eps: float, condition: int) -> None:
        super().__init__()
        self.dense = Linear(condition, 3 * width)
        self.eps = eps

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, width) -> the normalised x, and the gate (B, 1, width) of the branch that reads it."""
        return modulate(x, self.dense(condition), self.eps)


class TabulatedRMSNorm(nn.Module):
    """An AdaptiveRMSNorm whose modulations were computed in advance: a table (flow steps, 3 * width)."""

    def __init__(self, width: int, eps: float, steps: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(steps, 3 * width))
        self.eps = eps

    def forward(self, x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """As ``AdaptiveRMSNorm``; ``step`` (B,) is the index of the flow step."""
        return modulate(x, self.table[step], self.eps)


def modulate(x: Tensor, modulation: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x (B, T, width), modulation (B, 3 * width) -> normalised and modulated x, gate (B, 1, width)."""
    scale, shift, gate = modulation[:, None].chunk(3, -1)
    return F.rms_norm(x, (x.shape[-1],), None, eps) * (1 + scale) + shift, gate


def build_norm(tower: TowerSpec, condition: int = 0) -> nn.Module:
    """The norm of this tower. ``condition``: width of an adaptive norm's condition, or rows of a tabulated norm."""
    if tower.norm == "adaptive":
        return AdaptiveRMSNorm(tower.width, tower.eps, condition)
    if tower.tabulated:
        return TabulatedRMSNorm(tower.width, tower.eps, condition)
    return RMSNorm(tower.width, tower.eps, tower.norm_offset)


def rotary_tables(length: int, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, head_dim / 2), in the half-split (Llama) convention."""
    return rotary_at(torch.arange(length), head_dim, theta)


def rotary_at(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (..., head_dim / 2) at integer positions (...)."""
    angle = positions[..., None].float() * frequencies(head_dim, theta, positions.device)
    return angle.cos(), angle.sin()


def frequencies(head_dim: int, theta: float, device: torch.device | None = None) -> Tensor:
    """Radians per position (head_dim / 2,)."""
    return theta ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x (..., T, head_dim)."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, fused: bool = True) -> Tensor:
    """Softmax attention over (B, heads, T, head_dim); ``mask`` is additive. Returns (B, T, heads * head_dim).

    ``fused`` selects torch's kernel, which the official policies use. For the reference policy's short sequences,
    separate matmul and softmax train two to three times faster on a CPU.
    """
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if fused:
        mask = None if mask is None else mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores + mask
    mixed = torch.softmax(scores, -1).to(v.dtype) @ v
    return mixed.transpose(1, 2).flatten(2)


def causal_mask(length: int, past: int = 0, device: torch.device | None = None) -> Tensor:
    """Additive mask (length, past + length): position i attends to the past and to positions up to i."""
    allowed = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
    return additive(allowed)


def additive(allowed: Tensor) -> Tensor:
    """Boolean mask -> additive mask: 0 where attention is allowed, minus infinity elsewhere."""
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, float("-inf"))


class Attention(nn.Module):
    """Grouped-query attention. ``source`` is the width that keys and values are projected from.

    In a "self" block that is the residual stream; in a "cross" block, the flattened keys (or values) of a prefix block.
    """

    def __init__(self, width: int, layer: LayerSpec, source: int, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = layer.heads, layer.kv_heads, layer.head_dim
        self.fused = fused
        if not layer.kv_only:
            self.q = Linear(width, layer.heads * layer.head_dim, bias=False)
        self.k = Linear(source, layer.kv_heads * layer.head_dim, bias=False)
        self.v = Linear(source, layer.kv_heads * layer.head_dim, bias=False)
        if not layer.kv_only:
            self.o = Linear(layer.heads * layer.head_dim, width, bias=False)

    def split(self, y: Tensor, heads: int) -> Tensor:
        """(B, T, heads * head_dim) -> (B, heads, T, head_dim)."""
        return y.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor, past: KeyValue | None) -> KeyValue:
        """Keys and values of x, appended to those of the past."""
        k, v = rotate(self.split(self.k(x), self.kv_heads), cos, sin), self.split(self.v(x), self.kv_heads)
        return (k, v) if past is None else (torch.cat([past[0], k], 2), torch.cat([past[1], v], 2))

    def reproject(self, past: KeyValue) -> KeyValue:
        """Project the prefix's keys (rotated already) and values once more, without another rotation (SmolVLA)."""
        k, v = (y.transpose(1, 2).flatten(2) for y in past)
        return self.split(self.k(k), self.kv_heads), self.split(self.v(v), self.kv_heads)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, source: KeyValue) -> Tensor:
        q = rotate(self.split(self.q(x), self.heads), cos, sin)
        return self.o(attend(q, *source, mask, self.fused))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str = "silu") -> None:
        super().__init__()
        self.gate = Linear(width, hidden, bias=False)
        self.up = Linear(width, hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class AttentionContext:
    """What all blocks share in one forward pass: rotary tables, masks, and the condition of adaptive norms."""

    def __init__(
        self,
        x: Tensor,
        tower: TowerSpec,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> None:
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        self.rotary = self._rotary(positions, x, tower)
        self.mask, self.condition = mask, condition
        self.cross_rotary, self.cross_mask = self.rotary, mask
        if any(layer.kind == "cross" for layer in tower.layers):
            # Query positions of a cross block count from zero, and only the prefix is attended to.
            self.cross_rotary = self._rotary(positions - positions.amin(-1, keepdim=True), x, tower)
            self.cross_mask = None if mask is None else mask[..., : mask.shape[-1] - x.shape[1]]

    @staticmethod
    def _rotary(positions: Tensor, x: Tensor, tower: TowerSpec) -> tuple[Tensor, Tensor]:
        cos, sin = rotary_at(positions, tower.layers[0].head_dim, tower.theta)
        if positions.ndim == 2:  # positions differ per sequence: (B, T, .) -> (B, 1, T, .)
            cos, sin = cos[:, None], sin[:, None]
        return cos.to(x.dtype), sin.to(x.dtype)


class Block(nn.Module):
    """One pre-norm block: attention, then the MLP, each added to the residual stream.

    ``source``: see Attention; ``condition``: see ``build_norm``; ``fused``: see ``attend``.
    """

    def __init__(
        self, tower: TowerSpec, layer: LayerSpec, source: int | None = None, condition: int = 0, fused: bool = True
    ) -> None:
        super().__init__()
        self.kind, self.kv_only = layer.kind, layer.kv_only
        self.norm1 = build_norm(tower, condition)
        self.attention = Attention(tower.width, layer, tower.width if source is None else source, fused)
        if not layer.kv_only:
            self.norm2 = build_norm(tower, condition)
            self.mlp = MLP(tower.width, layer.mlp, tower.activation or "silu")

    def forward(self, x: Tensor, context: AttentionContext, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """-> the residual stream after the block, and the keys and values it attended to."""
        y = self.norm1(x)
        source = self.keys_values(y, context, past)
        if self.kv_only:
            return x, source
        x = x + self.attend(y, context, source)
        return x + self.mlp(self.norm2(x)), source

    def keys_values(self, y: Tensor, context: AttentionContext, past: KeyValue | None) -> KeyValue:
        """What the normalised input y attends to."""
        if self.kind == "cross":
            assert past is not None
            return self.attention.reproject(past)
        return self.attention.keys_values(y, *context.rotary, past)

    def attend(self, y: Tensor, context: AttentionContext, source: KeyValue) -> Tensor:
        if self.kind == "cross":
            return self.attention(y, *context.cross_rotary, context.cross_mask, source)
        return self.attention(y, *context.rotary, context.mask, source)


class AdaptiveBlock(Block):
    """A block whose norms depend on a condition and gate what its branches add (pi0.5's action expert)."""

    def forward(self, x: Tensor, context: AttentionContext, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        y, gate = self.norm1(x, context.condition)
        source = self.keys_values(y, context, past)
        x = x + gate * self.attend(y, context, source)
        y, gate = self.norm2(x, context.condition)
        return x + gate * self.mlp(y), source


class Decoder(Recomputing):
    """Blocks, then the final norm (none after a key/value-only block). Bidirectional unless a mask is given.

    ``prefix`` is the tower whose keys and values cross blocks attend to, block by block; ``condition``: see
    ``build_norm``; ``fused``: see ``attend``. Raises ValueError for blocks of different head size.
    """

    def __init__(
        self, tower: TowerSpec, prefix: TowerSpec | None = None, condition: int = 0, fused: bool = True
    ) -> None:
        super().__init__()
        head_dims = {layer.head_dim for layer in tower.layers}
        if len(head_dims) != 1:
            raise ValueError(f"expected one head size in all blocks of the decoder, found {sorted(head_dims)}")
        self.tower = tower
        block = Block if tower.norm == "rms" else AdaptiveBlock
        self.layers = nn.ModuleList()
        for i, layer in enumerate(tower.layers):
            source = None
            if layer.kind == "cross":
                assert prefix is not None
                source = prefix.layers[i].kv_heads * prefix.layers[i].head_dim
            self.layers.append(block(tower, layer, source, condition, fused))
        self.norm = None if tower.layers[-1].kv_only else build_norm(tower, condition)

    def blocks(self) -> list[Block]:
        return [layer for layer in self.layers if isinstance(layer, Block)]

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        past: list[KeyValue] | None = None,
        condition: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """(B, T, width) -> normalised hidden states (B, T, width), and every block's keys and values, past included.

        ``mask`` is additive and broadcasts to (B, heads, T, P + T); ``positions`` are integers (T,) or (B, T); ``past``
        holds keys and values of every block, P long; ``condition`` is the adaptive norms'. After a key/value-only block
        the hidden states are its input, not normalised.
        """
        context = AttentionContext(x, self.tower, positions, mask, condition)
        present = list[KeyValue]()
        for i, block in enumerate(self.layers):
            x, keys_values = self.block(block, x, context, None if past is None else past[i])
            present.append(keys_values)
        if self.norm is None:
            return x, present
        return (self.norm(x) if self.tower.norm == "rms" else self.norm(x, condition)[0]), present
