"""The graphs of OpenVLA and OpenVLA-OFT: PrismaticPolicy.encode_image, OpenVLAPolicy.step and OFTPolicy.decode.

The last block computes only the rows that the head reads; of the other rows, only keys and values.
"""

from __future__ import annotations

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.compressor.models.nn.decoder import rotary_tables
from rlrc.compressor.models.nn.prismatic import TRANSFORMERS, PrismaticGeometry
from rlrc.compressor.models.oft import STOP
from rlrc.compressor.models.policy import parse_geometry
from rlrc.exporters.graphs import blocks
from rlrc.exporters.graphs.builder import Builder

Towers = dict[str, TowerSpec]


def vision(b: Builder, policy: PolicySpec, towers: Towers) -> None:
    """``pixels`` (cameras, H, W, 3 for every vision transformer) -> ``image_tokens`` (cameras, N, decoder width)."""
    geometry, camera = parse_geometry(PrismaticGeometry, policy), policy.cameras[0]
    names = [name for name in TRANSFORMERS if name in towers]
    rows, columns = camera.height // geometry.patch, camera.width // geometry.patch
    pixels = b.input("pixels", "float32", ("cameras", camera.height, camera.width, 3 * len(names)))
    pixels = blocks.crop_to_patches(b, pixels, camera, geometry.patch)
    colours = b.split(pixels, *[3] * len(names)) if len(names) > 1 else [pixels]
    features = [
        blocks.vision_transformer(b, x, name, towers[name], (rows, columns), geometry.patch, extra, scaled)
        for name, x, extra, scaled in zip(names, colours, geometry.extra, geometry.scaled, strict=True)
    ]
    x = b.concat(*features, axis=2) if len(features) > 1 else features[0]
    tokens = gelu_mlp(b, x, "projector", len(geometry.projector))
    b.output("image_tokens", tokens, "float32", ("cameras", rows * columns, towers["decoder"].width))


def gelu_mlp(b: Builder, x: str, name: str, linears: int) -> str:
    """Linear layers with GELU between them."""
    for i in range(linears - 1):
        x = b.linear_activated(x, f"{name}.{2 * i}", "gelu")
    return b.linear(x, f"{name}.{2 * (linears - 1)}", bias=True)


def step(b: Builder, policy: PolicySpec, towers: Towers) -> None:
    """``image_tokens`` (batch, N, width), ``ids`` (batch, L), the past -> ``logits`` (batch, rows) of the last.

    The sequence is the first id, the image tokens (if any), then the other ids. Attention is causal, from the position
    ``start`` on. Keys and values are written into the past's buffers if the builder has an attention for that.
    """
    tower = towers["decoder"]
    x = embed_sequence(b, tower)
    in_place = b.has_cached_attention(tower.layers[0].head_dim)
    lengths = {"past": "capacity", "present": "capacity"} if in_place else {"past": "past", "present": "present"}
    past = [
        tuple(
            b.input(f"past.{i}.{part}", "float32", ("batch", layer.kv_heads, lengths["past"], layer.head_dim))
            for part in ("key", "value")
        )
        for i, layer in enumerate(tower.layers)
    ]
    context = capacity_context(b, policy, tower) if in_place else past_context(b, tower, past[0][0], b.size(x, 1))
    for i, (layer, (key, value)) in enumerate(zip(tower.layers, past, strict=True)):
        keep = 1 if i == len(tower.layers) - 1 else None
        x, present = blocks.decoder_block(
            b, x, f"decoder.layers.{i}", tower, layer, context, (key, value), keep, cached=True
        )
        assert present is not None
        for part, kept in zip(("key", "value"), present, strict=True):
            shape = ("batch", layer.kv_heads, lengths["present"], layer.head_dim)
            b.output(f"present.{i}.{part}", kept, "float32", shape)
    output_logits(b, blocks.norm(b, x, "decoder.norm", tower)[0], policy)


def embed_sequence(b: Builder, tower: TowerSpec) -> str:
    """The embedding of the first id, the image tokens, the embeddings of the other ids: (batch, T, width)."""
    image_tokens = b.input("image_tokens", "float32", ("batch", "image_tokens", tower.width))
    words = b.embed(b.input("ids", "int64", ("batch", "length")), "embedding")
    return b.concat(b.slice(words, 0, 1), image_tokens, b.slice(words, 1, None))


def output_logits(b: Builder, hidden: str, policy: PolicySpec) -> None:
    """Normalised hidden state of the last position (batch, 1, width) -> ``logits``."""
    assert policy.action.tokens is not None
    rows = policy.action.tokens.rows
    b.output("logits", b.reshape(b.linear(hidden, "head"), 0, rows), "float32", ("batch", rows))


def step_embed(b: Builder, policy: PolicySpec, towers: Towers) -> None:
    """The inputs of ``step`` without the past -> ``x`` (batch, T, width), for another engine to compute the blocks."""
    tower = towers["decoder"]
    b.output("x", embed_sequence(b, tower), "float32", ("batch", "x", tower.width))


def step_head(b: Builder, policy: PolicySpec, towers: Towers) -> None:
    """``hidden`` (batch, 1, width) of the last position, normalised -> ``logits`` (batch, rows)."""
    output_logits(b, b.input("hidden", "float32", ("batch", 1, towers["decoder"].width)), policy)


def capacity_context(b: Builder, policy: PolicySpec, tower: TowerSpec) -> blocks.GraphContext:
    """The context of blocks that write keys and values into the past's buffers: rotations of all possible positions."""
    camera, patch = policy.cameras[0], parse_geometry(PrismaticGeometry, policy).patch
    assert policy.prompt is not None
    prefix = (camera.height // patch) * (camera.width // patch) + policy.prompt.max_tokens
    length = prefix + policy.action.horizon * policy.action.dim
    tables = rotary_tables(length, tower.layers[0].head_dim, tower.theta)
    cos, sin = (b.constant(table.numpy()) for table in tables)
    return blocks.GraphContext((cos, sin), start=b.input("start", "int64", (1,)))


def past_context(b: Builder, tower: TowerSpec, past: str, length: str) -> blocks.GraphContext:
    """The context of blocks that append their keys and values to the past's."""
    before = b.size(past, 2)
    places = blocks.positions(b, before, length)
    mask = blocks.causal_mask(b, places, blocks.positions(b, None, b.add(before, length)))
    return blocks.GraphContext(blocks.rotary_tables(b, places, tower), mask)


def chunk(b: Builder, policy: PolicySpec, towers: Towers) -> None:
    """``image_tokens`` (batch, N, width), ``ids`` (batch, L), ``state`` (batch, S) -> ``logits`` or ``actions``."""
    tower = towers["decoder"]
    x = chunk_sequence(b, policy, tower)
    context = blocks.GraphContext(blocks.rotary_tables(b, blocks.positions(b, None, b.size(x, 1)), tower))
    for i, layer in enumerate(tower.layers):
        keep = count_rows_read(policy) if i == len(tower.layers) - 1 else None
        x, _ = blocks.decoder_block(b, x, f"decoder.layers.{i}", tower, layer, context, keep=keep)
    x = blocks.norm(b, b.slice(x, 0, policy.action.horizon * policy.action.dim), "decoder.norm", tower)[0]
    output_actions(b, x, policy, tower.width)


def chunk_sequence(b: Builder, policy: PolicySpec, tower: TowerSpec) -> str:
    """The input of the decoder's blocks, OFTPolicy.sequence: (batch, T, width)."""
    numbers = policy.action.horizon * policy.action.dim
    image_tokens = b.input("image_tokens", "float32", ("batch", "image_tokens", tower.width))
    ids = b.input("ids", "int64", ("batch", "length"))
    words = b.embed(ids, "embedding")
    parts = [b.slice(words, 0, 1), image_tokens]
    if policy.state is not None:
        dimensions = len(policy.state.names)
        state = b.input("state", "float32", ("batch", dimensions))
        parts.append(gelu_mlp(b, b.reshape(state, 0, 1, dimensions), "state", 2))
    empty = b.op("ConstantOfShape", b.integers(numbers, tower.width))
    stop = b.embed(b.reshape(b.integers(STOP), 1, 1), "embedding")
    end = (b.repeat(rows, batch_of=ids) for rows in (empty, stop))
    return b.concat(*parts, b.slice(words, 1, None), *end)


def count_rows_read(policy: PolicySpec) -> int:
    """How many of the last positions the head reads: the chunk's, one position earlier, and </s> behind them."""
    return policy.action.horizon * policy.action.dim + 2


def output_actions(b: Builder, hidden: str, policy: PolicySpec, width: int) -> None:
    """Normalised hidden states of the chunk (batch, horizon * dim, width) -> ``logits`` or ``actions``."""
    action, geometry = policy.action, parse_geometry(PrismaticGeometry, policy)
    if action.tokens is not None:
        shape = (action.horizon, action.dim, action.tokens.rows)
        b.output("logits", b.reshape(b.linear(hidden, "head"), 0, *shape), "float32", ("batch", *shape))
        return
    x = b.reshape(hidden, 0, action.horizon, action.dim * width)
    b.output("actions", regression(b, x, geometry.head_blocks), "float32", ("batch", action.horizon, action.dim))


def chunk_embed(b: Builder, policy: PolicySpec, towers: Towers) -> None:
    """The inputs of ``chunk`` -> ``x`` (batch, T, width), for another engine to compute the blocks."""
    tower = towers["decoder"]
    b.output("x", chunk_sequence(b, policy, tower), "float32", ("batch", "x", tower.width))


def chunk_head(b: Builder, policy: PolicySpec, towers: Towers) -> None:
    """``hidden``, the normalised hidden states of the positions that the head reads -> ``logits`` or ``actions``."""
    width = towers["decoder"].width
    hidden = b.input("hidden", "float32", ("batch", count_rows_read(policy), width))
    output_actions(b, b.slice(hidden, 0, policy.action.horizon * policy.action.dim), policy, width)


def regression(b: Builder, x: str, count: int) -> str:
    """RegressionHead; its norms have torch's default epsilon."""
    x = b.linear_activated(b.layer_norm(x, "head.norm1", 1e-5), "head.input", "relu")
    for i in range(count):
        y = b.layer_norm(x, f"head.blocks.{i}.0", 1e-5)
        x = b.add(x, b.linear_activated(y, f"head.blocks.{i}.1", "relu"))
    return b.linear(b.layer_norm(x, "head.norm2", 1e-5), "head.output", bias=True)


GRAPHS = {"vision": vision, "decoder": step}
OFT_GRAPHS = {"vision": vision, "decoder": chunk}
ENDS = {"embed": step_embed, "head": step_head}
OFT_ENDS = {"embed": chunk_embed, "head": chunk_head}
