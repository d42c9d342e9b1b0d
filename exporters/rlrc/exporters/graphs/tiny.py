"""The graphs of the reference family: what TinyPolicy computes, in a cheaper order.

- One transposition (or one per level, for engines with few dimensions) puts the pixels in the order of their image
  tokens. Every step that joins neighbours (the stem's, the merged patches) is then a reshape. Attention does not depend
  on the order; the position weights are reordered too.
- The last decoder block computes only the action tokens; of the other tokens, only keys and values.
"""

from __future__ import annotations

from math import prod

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.compressor.models.nn.decoder import rotary_tables
from rlrc.compressor.models.policy import parse_geometry
from rlrc.compressor.models.tiny import TinyGeometry
from rlrc.exporters.graphs.blocks import GraphContext, decoder_block, norm, vision_block
from rlrc.exporters.graphs.builder import Builder

Towers = dict[str, TowerSpec]


def vision(b: Builder, policy: PolicySpec, towers: Towers) -> None:
    """``pixels`` (batch, H, W, 3), normalised -> ``image_tokens`` (batch, N, decoder width): encode_image."""
    geometry = parse_geometry(TinyGeometry, policy)
    (camera,), tower, merge = policy.cameras, towers["vision"], geometry.merge
    rows, columns = image_grid(policy, geometry)
    steps = (merge, *reversed(geometry.stem_factors))  # from an image token down to a pixel

    x = b.input("pixels", "float32", ("batch", camera.height, camera.width, 3))
    x = tile_pixels(b, x, (rows, columns), steps)

    tokens, channels = camera.height * camera.width, 3
    for i, factor in enumerate(geometry.stem_factors):
        tokens, channels = tokens // factor**2, channels * factor**2
        x, step = b.reshape(x, 0, tokens, channels), f"vision.stem.steps.{i}"
        last = i == len(geometry.stem_factors) - 1
        x = b.linear(x, step) if last else b.linear_activated(x, step, "gelu")
        channels = tower.width if last else geometry.stem_widths[i]

    position = b.weights.array("vision.position").reshape(rows, merge, columns, merge, tower.width)
    positions = b.table("vision.position", position.swapaxes(1, 2).reshape(-1, tower.width))
    # Adding the last bias to the positions costs nothing: a sum of constants is computed at load.
    x = b.add(x, b.add(positions, b.weight(f"{step}.bias")))
    for i, layer in enumerate(tower.layers):
        x = vision_block(b, x, f"vision.layers.{i}", tower, layer)
    # Reshaped before the norm, so that ONNX Runtime does not fuse it with the sum (see OnnxRuntimeBuilder.layer_norm).
    x = b.layer_norm(b.reshape(x, 0, rows * columns, merge**2, tower.width), "vision.norm", tower.eps)
    x = b.reshape(x, 0, rows * columns, merge**2 * tower.width)
    shape = ("batch", rows * columns, towers["decoder"].width)
    b.output("image_tokens", b.linear(x, "projector", bias=True), "float32", shape)


def tile_pixels(b: Builder, x: str, grid: tuple[int, int], steps: tuple[int, ...]) -> str:
    """Reorder pixels (batch, H, W, 3): by ``grid`` cell, within it by its ``steps[0]`` ** 2 cells, and so on."""
    rows, columns = grid
    depth = len(steps) + 1
    if 2 * depth + 1 <= b.MAX_DIMS:
        x = b.reshape(x, 0, rows, *steps, columns, *steps[:-1], steps[-1] * 3)
        vertical = range(1, depth + 1)
        return b.transpose(x, 0, *(axis for down in vertical for axis in (down, down + depth)))
    height, width, cells = rows * prod(steps), columns * prod(steps), 1
    for down, across in (grid, *((step, step) for step in steps[:-1])):
        height, width = height // down, width // across
        x = b.transpose(b.reshape(x, 0, cells, down, height, across, width * 3), 0, 1, 2, 4, 3, 5)
        cells *= down * across
    return x


def decoder(b: Builder, policy: PolicySpec, towers: Towers) -> None:
    """Image tokens, ``ids`` (batch, L), normalised ``state`` (batch, S) -> ``logits`` (batch, horizon, dim, bins)."""
    tower, action = towers["decoder"], policy.action
    x, length = sequence(b, policy, towers)
    cos, sin = (b.constant(table.numpy()) for table in rotary_tables(length, tower.layers[0].head_dim, tower.theta))
    context = GraphContext((cos, sin))
    for i, layer in enumerate(tower.layers):
        keep = action.horizon if i == len(tower.layers) - 1 else None
        x, _ = decoder_block(b, x, f"decoder.layers.{i}", tower, layer, context, keep=keep)
    output_logits(b, norm(b, x, "decoder.norm", tower)[0], policy)


def sequence(b: Builder, policy: PolicySpec, towers: Towers) -> tuple[str, int]:
    """The input of the decoder's blocks (batch, T, width), and T."""
    tower, horizon = towers["decoder"], policy.action.horizon
    assert policy.state is not None
    assert policy.prompt is not None
    count, dimensions = prod(image_grid(policy, parse_geometry(TinyGeometry, policy))), len(policy.state.names)

    image_tokens = b.input("image_tokens", "float32", ("batch", count, tower.width))
    ids = b.input("ids", "int64", ("batch", policy.prompt.max_tokens))
    state = b.input("state", "float32", ("batch", dimensions))
    token = b.linear(b.reshape(state, 0, 1, dimensions), "state", bias=True)
    x = b.concat(image_tokens, b.embed(ids, "embedding"), token, b.repeat(b.weight("query"), batch_of=ids))
    return x, count + policy.prompt.max_tokens + 1 + horizon


def output_logits(b: Builder, hidden: str, policy: PolicySpec) -> None:
    """Normalised hidden states of the chunk (batch, horizon, width) -> ``logits``."""
    shape = (policy.action.horizon, policy.action.dim, policy.action.bins)
    b.output("logits", b.reshape(b.linear(hidden, "head"), 0, *shape), "float32", ("batch", *shape))


def embed(b: Builder, policy: PolicySpec, towers: Towers) -> None:
    """The decoder's inputs -> ``x`` (batch, T, width), for another engine to compute the blocks."""
    x, length = sequence(b, policy, towers)
    b.output("x", x, "float32", ("batch", length, towers["decoder"].width))


def head(b: Builder, policy: PolicySpec, towers: Towers) -> None:
    """``hidden`` (batch, horizon, width), the last hidden states, normalised -> ``logits``."""
    shape = ("batch", policy.action.horizon, towers["decoder"].width)
    output_logits(b, b.input("hidden", "float32", shape), policy)


def image_grid(policy: PolicySpec, geometry: TinyGeometry) -> tuple[int, int]:
    """Rows and columns of image tokens."""
    (camera,) = policy.cameras
    side = prod(geometry.stem_factors) * geometry.merge
    return camera.height // side, camera.width // side


GRAPHS = {"vision": vision, "decoder": decoder}
ENDS = {"embed": embed, "head": head}
