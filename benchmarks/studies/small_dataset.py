"""A small LeRobotDataset that fits a policy: random pictures, smooth random motion. And a single observation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import PolicySpec
from rlrc.datasets.meta import ACTION, PICTURES, STATE, Feature
from rlrc.datasets.writer import Recording, write
from rlrc.npz import write_npz

TASKS = ("pick up the red block", "put the spoon into the drawer")
HEIGHT, WIDTH = 240, 320
RATE = 10.0  # frames a second
STATE_WIDTH = 7  # of policies that take none: robots record theirs anyway
BLOCKS = (12, 16)  # of one colour: pictures of single random pixels would average out


def write_dataset(spec: PolicySpec, out: Path, frames: int = 32) -> None:
    """Two episodes of together ``frames`` frames. Raises UserError if ``out`` exists."""
    random = np.random.default_rng(0)
    names = None if spec.state is None else spec.state.names
    width = STATE_WIDTH if names is None else len(names)
    features = {f"{PICTURES}{camera.name}": Feature("image", (HEIGHT, WIDTH, 3)) for camera in spec.cameras}
    features |= {STATE: Feature("float32", (width,), names)}
    features |= {ACTION: Feature("float32", (spec.action.dim,), spec.action.names)}
    center, scale = np.array(spec.action.norm.center), np.array(spec.action.norm.scale)

    def episode(length: int) -> Iterator[dict[str, Any]]:
        states, actions = move(random, length, width), move(random, length, spec.action.dim)
        for state, action in zip(states, actions, strict=True):
            frame: dict[str, Any] = {name: picture(random) for name, one in features.items() if one.camera}
            yield frame | {STATE: state, ACTION: (center + scale * action).astype(np.float32)}

    lengths = (frames // 2, frames - frames // 2)
    recordings = (Recording(task, episode(length)) for task, length in zip(TASKS, lengths, strict=True))
    write(out, RATE, features, recordings, robot_type="random")


def write_observation(spec: PolicySpec, out: Path) -> None:
    """An observation for `rlrc infer`."""
    random = np.random.default_rng(1)
    values: dict[str, NDArray[Any]] = {f"image.{camera.name}": picture(random) for camera in spec.cameras}
    if spec.state is not None:
        values["state"] = move(random, 1, len(spec.state.names))[0]
    if spec.prompt is not None:
        values["instruction"] = np.array(TASKS[0])
    write_npz(out, **values)


def picture(random: np.random.Generator) -> NDArray[np.uint8]:
    blocks = random.integers(0, 256, (*BLOCKS, 3), np.uint8)
    return blocks.repeat(HEIGHT // BLOCKS[0], axis=0).repeat(WIDTH // BLOCKS[1], axis=1)


def move(random: np.random.Generator, length: int, width: int) -> NDArray[np.float32]:
    """Sines of random phases and periods, within [-0.9, 0.9]: (length, width)."""
    phase, period = random.uniform(0, 2 * np.pi, width), random.uniform(8, 40, width)
    time = np.arange(length)[:, None]
    return (0.9 * np.sin(phase + 2 * np.pi * time / period)).astype(np.float32)
