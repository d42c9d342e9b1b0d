"""Optimization profiles: the input shapes that the decode drivers give the graphs, from the policy's description."""

from __future__ import annotations

from dataclasses import dataclass

from rlrc.artifact import GraphSpec, PolicySpec
from rlrc.artifact.build_plan import Bounds
from rlrc.compressor.models.act import ACTGeometry
from rlrc.compressor.models.nn.resnet import feature_size
from rlrc.compressor.models.policy import parse_geometry

Sizes = dict[str, tuple[int, int, int]]
"""Minimum, usual and maximum of every dynamic dimension, by its name."""
BATCH = (1, 1, 1)  # a robot has one observation; a larger batch would reserve memory all the time


@dataclass(frozen=True)
class Lengths:
    """The numbers of ids in a prompt."""

    usual: int
    largest: int


def make_profiles(
    policy: PolicySpec, graph: GraphSpec, vision: GraphSpec, prompt: Lengths
) -> tuple[dict[str, Bounds], ...]:
    """One profile for every kind of pass, in the order of an action's passes."""
    return tuple(
        {tensor.name: make_bounds(tensor.shape, sizes) for tensor in graph.inputs}
        for sizes in list_passes(policy, graph.name, count_image_tokens(policy, vision), prompt)
    )


def make_bounds(shape: tuple[int | str, ...], sizes: Sizes) -> Bounds:
    each = [(size, size, size) if isinstance(size, int) else sizes[size] for size in shape]
    return Bounds(*(tuple(dimension[i] for dimension in each) for i in range(3)))


def list_passes(policy: PolicySpec, graph: str, image_tokens: list[int], prompt: Lengths) -> list[Sizes]:
    """``image_tokens``: their number for every camera."""
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
    needed = [count for camera, count in zip(cameras, image_tokens, strict=True) if not camera.optional]
    least, most = sum(needed) or min(image_tokens), sum(image_tokens)
    if policy.decode == "autoregressive":
        first = {"image_tokens": (least, most, most), "length": (1, prompt.usual, prompt.largest), "past": (0, 0, 0)}
        usual, longest = most + prompt.usual, most + prompt.largest + action.horizon * action.dim
        later = {"image_tokens": (0, 0, 0), "length": (1, 1, 1), "past": (1, usual, longest)}
        return [{**sizes, "batch": BATCH} for sizes in (first, later)]
    if graph == "step":  # of the prefix, with the state's token or without
        return [{"length": (least + 1, most + prompt.usual + 1, most + prompt.largest + 1), "batch": BATCH}]
    return [{"image_tokens": (least, most, most), "length": (1, prompt.usual, prompt.largest), "batch": BATCH}]


def count_image_tokens(policy: PolicySpec, vision: GraphSpec) -> list[int]:
    """The number of image tokens of every camera."""
    count = vision.outputs[0].shape[1]
    if isinstance(count, int):
        return [count] * len(policy.cameras)
    dilated = parse_geometry(ACTGeometry, policy).dilated  # ACT with cameras of different sizes
    grids = [feature_size(camera.height, camera.width, dilated) for camera in policy.cameras]
    return [rows * columns for rows, columns in grids]
