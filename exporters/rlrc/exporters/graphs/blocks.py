"""Blocks that the graphs of several families share; comments name the torch modules that they compute.

Values are (batch, rows, channels). ``tower`` gives the epsilon, the activation and the kind of norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlrc.artifact import CameraSpec, LayerSpec, TowerSpec
from rlrc.compressor.models.nn.decoder import frequencies
from rlrc.exporters.graphs.builder import Activation, Builder

KeyValue = tuple[str, str]  # (batch, kv_heads, T, head_dim) each, keys rotated


# rlrc.compressor.models.nn.vit


def vision_transformer(
    b: Builder, pixels: str, name: str, tower: TowerSpec, grid: tuple[int, int], patch: int, extra: int, scaled: bool
) -> str:
    """VisionTransformer with a one-step stem: (pictures, rows * patch, columns * patch, 3) -> (pictures, N, W).

    Without the final norm.
    """
    rows, columns = grid
    x = b.transpose(b.reshape(pixels, 0, rows, patch, columns, patch, 3), 0, 1, 3, 2, 4, 5)
    x = b.linear(b.reshape(x, 0, rows * columns, patch * patch * 3), f"{name}.stem.steps.0")
    # Adding the bias to the positions costs nothing: a sum of constants is computed at load.
    x = b.add(x, b.add(b.weight(f"{name}.position"), b.weight(f"{name}.stem.steps.0.bias")))
    if extra:
        x = b.concat(b.repeat(b.weight(f"{name}.extra"), batch_of=pixels), x)
    for i, layer in enumerate(tower.layers):
        x = vision_block(b, x, f"{name}.layers.{i}", tower, layer, scaled)
    return b.slice(x, extra, None) if extra else x


def crop_to_patches(b: Builder, pixels: str, camera: CameraSpec, patch: int) -> str:
    """Drop the last rows and columns that do not fill a patch, as a convolution does."""
    for axis, size in ((1, camera.height), (2, camera.width)):
        if size % patch:
            pixels = b.slice(pixels, 0, size - size % patch, axis)
    return pixels


def vision_block(b: Builder, x: str, name: str, tower: TowerSpec, layer: LayerSpec, scaled: bool = False) -> str:
    attention, mlp = f"{name}.attention", f"{name}.mlp"

    def out(y: str, module: str, scale: str) -> str:
        return b.linear_scaled(y, module, f"{name}.{scale}") if scaled else b.linear(y, module, bias=True)

    def constant(module: str, scale: str) -> str:
        """What a branch that was pruned away entirely still adds."""
        bias = b.weight(f"{module}.bias")
        return b.multiply(bias, b.weight(f"{name}.{scale}")) if scaled else bias

    if layer.heads:
        width = layer.heads * layer.head_dim
        y = b.linear(b.layer_norm(x, f"{name}.norm1", tower.eps), f"{attention}.qkv", bias=True)
        q, k, v = b.split(y, width, width, width)
        mixed = b.attention(q, k, v, layer.heads, layer.heads, layer.head_dim)
        x = b.add(x, out(mixed, f"{attention}.out", "scale1"))
    else:
        x = b.add(x, constant(f"{attention}.out", "scale1"))
    if layer.mlp:
        y = b.layer_norm(x, f"{name}.norm2", tower.eps)
        return b.add(x, out(b.linear_activated(y, f"{mlp}.up", tower.activation or "gelu"), f"{mlp}.down", "scale2"))
    return b.add(x, constant(f"{mlp}.down", "scale2"))


# rlrc.compressor.models.nn.decoder


@dataclass(frozen=True)
class GraphContext:
    """The values that all blocks of one pass share.

    ``rotary``: cosines and sines (T, head_dim / 2), ``cross_rotary``: those of cross blocks' queries. ``mask``:
    additive, (T, P + T). ``condition``: the input of adaptive norms (batch, C), or of tabulated ones the step's number
    (batch,). With ``start``, the first position (1,), attention is causal, keys and values are written into the past's
    buffers, and ``rotary`` covers all positions.
    """

    rotary: tuple[str, str]
    mask: str | None = None
    cross_rotary: tuple[str, str] | None = None
    condition: str | None = None
    start: str | None = None


def decoder_block(
    b: Builder,
    x: str,
    name: str,
    tower: TowerSpec,
    layer: LayerSpec,
    context: GraphContext,
    past: KeyValue | None = None,
    keep: int | None = None,
    cached: bool = False,
) -> tuple[str, KeyValue | None]:
    """Block: x (batch, T, width) -> the last ``keep`` rows of the output (None: all); keys and values if ``cached``.

    A block of the kind "half" (keys and values only) returns x. All observations of a batch have the same T and
    positions.
    """
    y, gate = norm(b, x, f"{name}.norm1", tower, context.condition)
    rotary, mask, source = context.rotary, context.mask, None
    if layer.kind == "half":
        return x, heads_first(b, *keys_values(b, y, name, layer, rotary), layer)
    if keep is not None:
        x = b.last_rows(x, keep)
        mask = None if mask is None else b.last_rows(mask, keep, axis=0)
    if layer.kind == "cross":
        assert past is not None
        assert context.cross_rotary is not None
        source = reproject(b, past, name, layer)
        q = b.rotary(b.linear(y, f"{name}.attention.q"), layer.heads, context.cross_rotary)
        mixed = attend(b, q, source, layer, None)
    elif layer.heads and context.start is not None:
        assert past is not None
        qkv = b.linear(y, *(f"{name}.attention.{part}" for part in "qkv"))
        mixed, source = b.cached_attention(qkv, past, context.start, rotary, layer.heads, layer.kv_heads)
        mixed = mixed if keep is None else b.last_rows(mixed, keep)
    elif layer.heads:
        q, k, v = queries_keys_values(b, y, name, layer, rotary, keep)
        if past is not None or mask is not None or cached:
            source = heads_first(b, k, v, layer)
        if past is not None and source is not None:
            source = b.concat(past[0], source[0], axis=2), b.concat(past[1], source[1], axis=2)
        if past is not None or mask is not None:
            assert source is not None
            mixed = attend(b, q, source, layer, mask)
        else:
            mixed = b.attention(q, k, v, layer.heads, layer.kv_heads, layer.head_dim)
    if layer.heads:
        x = branch(b, x, b.linear(mixed, f"{name}.attention.o"), gate)
    if layer.mlp:
        y, gate = norm(b, x, f"{name}.norm2", tower, context.condition)
        x = branch(b, x, gated_mlp(b, y, f"{name}.mlp", tower.activation or "silu"), gate)
    return x, source


def queries_keys_values(
    b: Builder, y: str, name: str, layer: LayerSpec, rotary: tuple[str, str], keep: int | None
) -> tuple[str, str, str]:
    """Queries, keys and values of y in as few products as possible; queries of its last ``keep`` rows only."""
    if keep is not None:
        last = (b.last_rows(rotary[0], keep, axis=0), b.last_rows(rotary[1], keep, axis=0))
        q = b.linear(b.last_rows(y, keep), f"{name}.attention.q")
        return b.rotary(q, layer.heads, last), *keys_values(b, y, name, layer, rotary)
    wide, narrow = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    q, k, v = b.split(b.linear(y, *(f"{name}.attention.{part}" for part in "qkv")), wide, narrow, narrow)
    return b.rotary(q, layer.heads, rotary), b.rotary(k, layer.kv_heads, rotary), v


def keys_values(b: Builder, y: str, name: str, layer: LayerSpec, rotary: tuple[str, str]) -> KeyValue:
    """(batch, T, kv_heads * head_dim) each, keys rotated."""
    width = layer.kv_heads * layer.head_dim
    k, v = b.split(b.linear(y, f"{name}.attention.k", f"{name}.attention.v"), width, width)
    return b.rotary(k, layer.kv_heads, rotary), v


def reproject(b: Builder, past: KeyValue, name: str, layer: LayerSpec) -> KeyValue:
    """Project the prefix's keys and values once more, as the torch Attention does."""

    def flat(y: str, part: str) -> str:
        module = f"{name}.attention.{part}"
        rows = b.reshape(b.transpose(y, 0, 2, 1, 3), 0, 0, b.weights.shape(f"{module}.weight")[1])
        return b.linear(rows, module)

    return heads_first(b, flat(past[0], "k"), flat(past[1], "v"), layer)


def heads_first(b: Builder, k: str, v: str, layer: LayerSpec) -> KeyValue:
    """(batch, T, kv_heads * head_dim) -> (batch, kv_heads, T, head_dim), each."""
    k, v = (b.transpose(b.reshape(x, 0, 0, layer.kv_heads, layer.head_dim), 0, 2, 1, 3) for x in (k, v))
    return k, v


def attend(b: Builder, q: str, source: KeyValue, layer: LayerSpec, mask: str | None) -> str:
    """q (batch, T, heads * head_dim), keys and values (batch, kv_heads, P, head_dim) -> as q."""
    return b.attend(q, *source, layer.heads, layer.kv_heads, layer.head_dim, mask)


def branch(b: Builder, x: str, y: str, gate: str | None) -> str:
    return b.add(x, y if gate is None else b.multiply(gate, y))


def gated_mlp(b: Builder, x: str, name: str, activation: Activation) -> str:
    gate, up = b.linears(x, f"{name}.gate", f"{name}.up")
    return b.linear(b.multiply(b.activation(gate, activation), up), f"{name}.down")


def norm(b: Builder, x: str, name: str, tower: TowerSpec, condition: str | None = None) -> tuple[str, str | None]:
    """Normalise x as the tower does; also returns the gate of the branch, if the norm has one."""
    if tower.norm == "rms":
        weight = b.weight(f"{name}.weight")
        if tower.norm_offset:
            weight = b.add(weight, b.scalar(tower.norm_offset))
        return b.rms_norm(x, weight, tower.eps), None
    assert condition is not None
    if tower.norm == "adaptive":
        modulation = b.linear(condition, f"{name}.dense", bias=True)
    else:
        modulation = b.op("Gather", b.weight(f"{name}.table"), condition)
    modulation = b.reshape(modulation, 0, 1, 3 * tower.width)  # the same for all rows of an observation
    scale, shift, gate = b.split(modulation, tower.width, tower.width, tower.width)
    ones = b.constant(np.ones(tower.width, np.float32))
    return b.add(b.multiply(b.rms_norm(x, ones, tower.eps), b.add(scale, b.scalar(1.0))), shift), gate


# Positions and masks of dynamic length


def positions(b: Builder, start: str | None, length: str) -> str:
    """The positions from ``start`` (None: 0) on; both arguments int64 (1,) -> (length,)."""
    first = b.integers(0) if start is None else start
    ends = (b.op("Squeeze", value, b.integers(0)) for value in (first, b.add(first, length), b.integers(1)))
    return b.op("Range", *ends)


def rotary_tables(b: Builder, places: str, tower: TowerSpec) -> tuple[str, str]:
    """rotary_at: cosines and sines (T, head_dim / 2) at these positions (T,)."""
    head_dim = tower.layers[0].head_dim
    column = b.reshape(b.cast(places, "float32"), -1, 1)
    angle = b.multiply(column, b.constant(frequencies(head_dim, tower.theta).numpy()))
    return b.op("Cos", angle), b.op("Sin", angle)


def additive(b: Builder, allowed: str) -> str:
    """An additive mask: 0 where attention is allowed, minus infinity elsewhere."""
    return b.op("Where", allowed, b.scalar(0.0), b.scalar(-np.inf))


def causal_mask(b: Builder, places: str, columns: str) -> str:
    """Additive mask (T, S): rows at ``places`` (T,) attend to the ``columns`` (S,) up to their own position."""
    return additive(b, b.op("GreaterOrEqual", b.reshape(places, -1, 1), columns))
