"""Optimisation profiles: the shapes that the decode drivers give the graphs, from the policy's description."""

from __future__ import annotations

from dataclasses import dataclass

from rlrc.artifact import GraphSpec, PolicySpec
from rlrc.artifact.build_plan import Bounds
from rlrc.compressor.models.act import ACTGeometry
from rlrc.compressor.models.nn.resnet import feature_size
from rlrc.compressor.models.policy import parse_geometry

Sizes = dict[str, tuple[int, int, int]]
"""Least, usual and largest value of a dynamic dimension by its name."""
BATCH = (1, 1, 1)  # a robot has one observation; memory for more would have to be there all the time


@dataclass(frozen=True)
class Lengths:
    """How many ids a prompt has."""

    usual: int
    largest: int


def profiles(policy: PolicySpec, graph: GraphSpec, vision: GraphSpec, prompt: Lengths) -> tuple[dict[str, Bounds], ...]:
    """One for every kind of pass, in the order in which an action needs them."""
    return tuple(
        {tensor.name: bounds(tensor.shape, sizes) for tensor in graph.inputs}
        for sizes in passes(policy, graph.name, tokens(policy, vision), prompt)
    )


def bounds(shape: tuple[int | str, ...], sizes: Sizes) -> Bounds:
    each = [(size, size, size) if isinstance(size, int) else sizes[size] for size in shape]
    return Bounds(*(tuple(dimension[i] for dimension in each) for i in range(3)))


def passes(policy: PolicySpec, graph: str, seen: list[int], prompt: Lengths) -> list[Sizes]:
    """``seen``: image tokens of every camera."""
    cameras, action = policy.cameras, policy.action
    if graph == "vision":
        heights, widths = ([getattr(camera, side) for camera in cameras] for side in ("height", "width"))
        return [
            {
                "cameras": (1, len(cameras), len(cameras)),
                "height": (min(heights), max(heights), max(heights)),
                "width": (min(widths), max(widths), max(widths)),
                "batch": BATCH,
            }
        ]
    needed = [count for camera, count in zip(cameras, seen, strict=True) if not camera.optional]
    least, most = sum(needed) or min(seen), sum(seen)
    if policy.decode == "autoregressive":
        first = {"image_tokens": (least, most, most), "length": (1, prompt.usual, prompt.largest), "past": (0, 0, 0)}
        told, longest = most + prompt.usual, most + prompt.largest + action.horizon * action.dim
        later = {"image_tokens": (0, 0, 0), "length": (1, 1, 1), "past": (1, told, longest)}
        return [{**sizes, "batch": BATCH} for sizes in (first, later)]
    if graph == "step":  # the prefix's keys, among which the state may be
        return [{"length": (least + 1, most + prompt.usual + 1, most + prompt.largest + 1), "batch": BATCH}]
    return [
        {
            "image_tokens": (least, most, most),
            "length": (1, prompt.usual, prompt.largest),
            "batch": BATCH,
        }
    ]


def tokens(policy: PolicySpec, vision: GraphSpec) -> list[int]:
    """Image tokens of every camera."""
    count = vision.outputs[0].shape[1]
    if isinstance(count, int):
        return [count] * len(policy.cameras)
    dilated = parse_geometry(ACTGeometry, policy).dilated  # cameras of different sizes: ACT's
    grids = [feature_size(camera.height, camera.width, dilated) for camera in policy.cameras]
    return [rows * columns for rows, columns in grids]
