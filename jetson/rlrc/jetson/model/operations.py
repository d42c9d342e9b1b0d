"""The operations of a policy's modules, from their geometry: the input of the roofline.

An operation counts floating-point operations (two for a multiply-add), weights read, activations read and written, and
kernels launched. Attention is counted as fused: its scores never leave the chip. Biases are left out, and so are masks
and rotary tables, which are computed once for a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

from rlrc.artifact import LayerSpec, TowerSpec


@dataclass(frozen=True)
class Op:
    """``side``: cube root of the multiply-adds of a matrix product; 0 for any other operation.

    ``inputs`` of each output: rlrc quantize leaves weights in 16 bits where they fill no whole groups. ``scores``:
    numbers of attention scores, which are in memory only if the kernel is not fused.
    """

    flops: float
    weights: int = 0
    activations: int = 0
    kernels: int = 1
    side: float = 0.0
    inputs: int = 0
    scores: int = 0

    def ungrouped(self, group: int) -> int:
        """Weights that fill no whole groups of so many inputs; 0 without groups."""
        return self.weights if group and self.inputs % group else 0


def linear(rows: int, inputs: int, outputs: int) -> Op:
    products, weights = rows * inputs * outputs, inputs * outputs
    return Op(2.0 * products, weights, rows * (inputs + outputs), side=products ** (1 / 3), inputs=inputs)


def elementwise(rows: int, width: int, weights: int = 0) -> Op:
    """Norms, activations, sums: each row is read and written once."""
    return Op(5.0 * rows * width, weights, 2 * rows * width, inputs=1)


def attention(layer: LayerSpec, rows: int, keys: int, times: int = 1) -> Op:
    """Scores and mixture of ``rows`` queries over ``keys`` positions, in ``times`` independent sequences."""
    queries, sources = rows * layer.heads * layer.head_dim, keys * layer.kv_heads * layer.head_dim
    side = (rows * keys * layer.head_dim) ** (1 / 3)
    scores = times * layer.heads * rows * keys
    return Op(times * 4.0 * queries * keys, 0, times * 2 * (queries + sources), side=side, scores=scores)


def vision_block(tower: TowerSpec, layer: LayerSpec, rows: int, pictures: int) -> Iterator[Op]:
    """``rows`` patches for each of ``pictures``."""
    width, heads, every = tower.width, layer.heads * layer.head_dim, rows * pictures
    if heads:
        yield elementwise(every, width, 2 * width)
        yield linear(every, width, 3 * heads)
        yield attention(layer, rows, rows, pictures)
        yield linear(every, heads, width)
        yield elementwise(every, width)
    if layer.mlp:
        yield elementwise(every, width, 2 * width)
        yield linear(every, width, layer.mlp)
        yield elementwise(every, layer.mlp)
        yield linear(every, layer.mlp, width)
        yield elementwise(every, width)


def decoder_block(tower: TowerSpec, layer: LayerSpec, rows: int, keys: int, keep: int, source: int = 0) -> Iterator[Op]:
    """``rows`` positions attend to ``keys``; after keys and values are made, only the last ``keep`` rows are computed.

    A cross block projects the prefix's keys and values, which are ``source`` numbers wide.
    """
    width, heads, kv = tower.width, layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    modulation = [linear(1, width, 3 * width)] if tower.norm == "adaptive" else []
    yield elementwise(rows, width, width)
    yield from modulation
    if layer.kv_only:
        yield linear(rows, width, 2 * kv)
        yield elementwise(rows, kv)
        return
    if heads and layer.kind == "cross":
        yield linear(keep, width, heads)
        yield elementwise(keep, heads)
        yield linear(keys, source, kv)
        yield linear(keys, source, kv)
    elif heads and keep < rows:
        yield linear(keep, width, heads)
        yield linear(rows, width, 2 * kv)
        yield elementwise(rows, heads + kv)
    elif heads:
        yield linear(rows, width, heads + 2 * kv)
        yield elementwise(rows, heads + kv)
    if heads:
        yield attention(layer, keep, keys)
        yield linear(keep, heads, width)
        yield elementwise(keep, width)
    if layer.mlp:
        yield elementwise(keep, width, width)
        yield from modulation
        yield linear(keep, width, 2 * layer.mlp)
        yield elementwise(keep, 2 * layer.mlp)
        yield linear(keep, layer.mlp, width)
        yield elementwise(keep, width)


def resnet(g: dict[str, Any], height: int, width: int) -> tuple[list[Op], tuple[int, int]]:
    """Convolutions of one picture, each with a norm and a ReLU; -> operations, (rows, columns) of the feature map."""

    def convolution(inputs: int, outputs: int, kernel: int, stride: int) -> Op:
        rows, columns = -(-size[0] // stride), -(-size[1] // stride)
        weights = inputs * outputs * kernel**2
        moved = inputs * prod(size) + outputs * rows * columns
        products = weights * rows * columns
        return Op(2.0 * products, weights, moved, side=products ** (1 / 3), inputs=1)

    def half_size() -> tuple[int, int]:
        return -(-size[0] // 2), -(-size[1] // 2)

    size = (height, width)
    ops, channels = [convolution(3, g["stem"], 7, 2)], g["stem"]
    size = half_size()
    ops.append(elementwise(prod(size), channels))
    size = half_size()
    for stage, (count, inner, out) in enumerate(zip(g["blocks"], g["widths"], g["outputs"], strict=True)):
        for i in range(count):
            spread = g["dilated"] and stage == len(g["blocks"]) - 1
            stride = 2 if i == 0 and stage > 0 and not spread else 1
            if i == 0 and (stage > 0 or channels != out):
                ops.append(convolution(channels, out, 1, stride))
            if g["bottleneck"]:
                ops.append(convolution(channels, inner, 1, 1))
                ops.append(convolution(inner, inner, 3, stride))
            else:
                ops.append(convolution(channels, inner, 3, stride))
            size = half_size() if stride == 2 else size
            ops.append(convolution(inner, out, 1 if g["bottleneck"] else 3, 1))
            ops.append(elementwise(prod(size), out))
            channels = out
    return ops, size


def detr_block(tower: TowerSpec, layer: LayerSpec, rows: int, keys: int) -> Iterator[Op]:
    width, heads = tower.width, layer.heads * layer.head_dim
    yield elementwise(rows, width, 2 * width)
    if heads:
        yield linear(rows, width, heads)
        yield linear(keys, width, heads)
        yield linear(keys, width, heads)
        yield attention(layer, rows, keys)
        yield linear(rows, heads, width)
        yield elementwise(rows, width)
    if layer.mlp:
        yield elementwise(rows, width, 2 * width)
        yield linear(rows, width, layer.mlp)
        yield elementwise(rows, layer.mlp)
        yield linear(rows, layer.mlp, width)
        yield elementwise(rows, width)


def stack(tower: TowerSpec, rows: int, keys: int, keep: int) -> Iterator[Op]:
    """All blocks of a decoder and the norm after them; the last block computes only the ``keep`` rows that are read."""
    for i, layer in enumerate(tower.layers):
        yield from decoder_block(tower, layer, rows, keys, keep if i == len(tower.layers) - 1 else rows)
    if not tower.layers[-1].kv_only:
        yield elementwise(keep, tower.width, tower.width)


def mlp(rows: int, widths: list[int]) -> list[Op]:
    """Linear layers from width to width."""
    return [linear(rows, a, b) for a, b in pairwise(widths)]
