"""The graphs of pi0, pi0.5 and SmolVLA: FlowPolicy.encode_image, .prefix and .velocity.

"prefix" runs once for an action, "step" once for every Euler step. Sequences are not padded, so masks are needed in
three cases only: no other token attends to a state token at the end of the prefix; a state token at the start of the
expert's sequence does not attend to the actions; causal actions do not attend to later ones.
"""

from __future__ import annotations

import math

import numpy as np

from rlrc.artifact import PolicySpec, TowerSpec
from rlrc.compressor.models.flow import FlowGeometry, prefix_stride
from rlrc.compressor.models.policy import parse_geometry
from rlrc.exporters.graphs import blocks
from rlrc.exporters.graphs.builder import Builder

Towers = dict[str, TowerSpec]


def vision(b: Builder, policy: PolicySpec, towers: Towers) -> None:
    """``pixels`` (cameras, H, W, 3) -> ``image_tokens`` (cameras, N, decoder width)."""
    geometry, camera, tower = parse_geometry(FlowGeometry, policy), policy.cameras[0], towers["vision"]
    patch, merge = geometry.patch, geometry.merge
    rows, columns = camera.height // patch, camera.width // patch
    pixels = b.input("pixels", "float32", ("cameras", camera.height, camera.width, 3))
    pixels = blocks.crop_to_patches(b, pixels, camera, patch)
    x = blocks.vision_transformer(b, pixels, "vision", tower, (rows, columns), patch, extra=0, scaled=False)
    x = b.layer_norm(x, "vision.norm", tower.eps)
    tokens = rows * columns // merge**2
    if merge > 1:
        x = b.reshape(x, 0, rows // merge, merge, columns // merge, merge, tower.width)
        x = b.reshape(b.transpose(x, 0, 1, 3, 2, 4, 5), 0, tokens, merge**2 * tower.width)
    shape = ("cameras", tokens, towers["decoder"].width)
    b.output("image_tokens", b.linear(x, "projector", bias=geometry.bias), "float32", shape)


def state_token(b: Builder, policy: PolicySpec) -> str:
    """``state`` (batch, S) -> (batch, 1, width)."""
    assert policy.state is not None
    numbers = policy.state.width or len(policy.state.names)
    return b.linear(b.reshape(b.input("state", "float32", ("batch", numbers)), 0, 1, numbers), "state", bias=True)


def prefix(b: Builder, policy: PolicySpec, towers: Towers) -> None:
    """``image_tokens`` (batch, N, width), ``ids`` (batch, L), ``state`` -> keys and values for the expert.

    Outputs are ``key.<i>`` and ``value.<i>`` (batch, kv_heads, P, head_dim).
    """
    geometry, tower, stride = parse_geometry(FlowGeometry, policy), towers["decoder"], prefix_stride(towers)
    scale = b.scalar(tower.width**0.5)
    image_tokens = b.input("image_tokens", "float32", ("batch", "image_tokens", tower.width))
    words = b.embed(b.input("ids", "int64", ("batch", "length")), "embedding")
    parts = [b.multiply(image_tokens, scale) if geometry.scaled else image_tokens, b.multiply(words, scale)]
    if geometry.state == "prefix":
        parts.append(state_token(b, policy))
    x = b.concat(*parts)

    places, mask = blocks.positions(b, None, b.size(x, 1)), None
    if geometry.state == "prefix":
        last = b.op("Sub", b.size(x, 1), b.integers(1))
        before, own = b.op("Less", places, last), b.op("Equal", b.reshape(places, -1, 1), last)
        mask = blocks.additive(b, b.op("Or", before, own))
    context = blocks.GraphContext(blocks.rotary_tables(b, places, tower), mask)
    for i, layer in enumerate(tower.layers):
        needed = i % stride == 0
        x, source = blocks.decoder_block(b, x, f"decoder.layers.{i}", tower, layer, context, cached=needed)
        if needed:
            assert source is not None
            for part, cached in zip(("key", "value"), source, strict=True):
                b.output(f"{part}.{i}", cached, "float32", ("batch", layer.kv_heads, "length", layer.head_dim))


def step(b: Builder, policy: PolicySpec, towers: Towers) -> None:
    """The prefix's keys and values, ``state``, ``x`` (batch, horizon, width), ``t`` (batch,) -> ``velocity`` as x.

    An expert with tabulated norms takes the number ``step`` (batch,) instead of ``t``.
    """
    geometry, tower, action = parse_geometry(FlowGeometry, policy), towers["expert"], policy.action
    assert policy.flow is not None
    stride = prefix_stride(towers)
    past = [
        tuple(
            b.input(f"{part}.{i * stride}", "float32", ("batch", layer.kv_heads, "length", layer.head_dim))
            for part in ("key", "value")
        )
        for i, layer in enumerate(towers["decoder"].layers[::stride])
    ]
    shape = ("batch", action.horizon, policy.flow.width)
    x, condition = b.linear(b.input("x", "float32", shape), "action_in", bias=True), None
    if tower.tabulated:
        condition = b.input("step", "int64", ("batch",))
    else:
        time = embed_time(b, b.input("t", "float32", ("batch",)), tower.width, geometry.periods)
        if tower.norm == "adaptive":
            condition = b.linear_activated(b.linear_activated(time, "time_in", "silu"), "time_out", "silu")
        else:
            same = b.op("Expand", b.reshape(time, 0, 1, tower.width), b.integers(1, action.horizon, 1))
            x = b.linear(b.linear_activated(b.concat(x, same, axis=2), "time_in", "silu"), "time_out", bias=True)
    if geometry.state == "suffix":
        x = b.concat(state_token(b, policy), x)

    length, before = action.horizon + (geometry.state == "suffix"), b.size(past[0][0], 2)
    crossing = None
    if any(layer.kind == "cross" for layer in tower.layers):
        crossing = blocks.rotary_tables(b, b.constant(np.arange(length)), tower)
    places = b.add(b.constant(np.arange(length)), before)
    context = blocks.GraphContext(
        blocks.rotary_tables(b, places, tower), expert_mask(b, geometry, length, before), crossing, condition
    )
    for i, (layer, (key, value)) in enumerate(zip(tower.layers, past, strict=True)):
        keep = action.horizon if i == len(tower.layers) - 1 and length > action.horizon else None
        x, _ = blocks.decoder_block(b, x, f"expert.layers.{i}", tower, layer, context, (key, value), keep)
    hidden = blocks.norm(b, x, "expert.norm", tower, condition)[0]
    b.output("velocity", b.linear(hidden, "action_out", bias=True), "float32", shape)


def embed_time(b: Builder, t: str, width: int, periods: tuple[float, float]) -> str:
    """FlowPolicy.time: t (batch,) -> sines and cosines (batch, width); angles are in the engine's widest floats."""
    shortest, longest = periods
    speed = 2 * math.pi / (shortest * (longest / shortest) ** np.linspace(0, 1, width // 2))
    angle = b.multiply(b.cast(b.reshape(t, -1, 1), b.WIDE), b.constant(speed[None].astype(b.WIDE)))
    # ONNX Runtime has no cosine of float64.
    both = b.concat(angle, b.add(angle, b.constant(np.array(math.pi / 2, b.WIDE))))
    return b.cast(b.op("Sin", both), "float32")


def expert_mask(b: Builder, geometry: FlowGeometry, length: int, before: str) -> str | None:
    """Additive mask (length, P + length) of the expert's tokens, which attend to all of the prefix; None if all 0."""
    blocked = np.zeros((length, length), bool)
    if geometry.causal:
        blocked = ~np.tri(length, dtype=bool)
    elif geometry.state == "suffix":
        blocked[0, 1:] = True
    if not blocked.any():
        return None
    own = b.constant(np.where(blocked, -np.inf, 0).astype(np.float32))
    prefix = b.op("Expand", b.scalar(0.0), b.concat(b.integers(length), before, axis=0))
    return b.concat(prefix, own)


GRAPHS = {"vision": vision, "prefix": prefix, "step": step}
