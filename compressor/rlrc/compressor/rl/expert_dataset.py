"""Record a data set of scripted experts in the simulator, one frame per control step.

As in rlrc.compressor.rl.demonstrations, noise is added to the executed actions but not to the recorded ones: a frame's
action is the expert's in that state. A chunk thus has the expert's actions along the disturbed path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlrc.compressor.rl.demonstrations import NOISE
from rlrc.datasets.meta import ACTION, PICTURES, STATE, Feature
from rlrc.datasets.writer import Recording, write
from rlrc.envs.experts import expert
from rlrc.envs.metaworld import ACTION_NAMES, HORIZON, PICTURE, STATE_NAMES, MetaWorldEnv, find_task
from rlrc.envs.seeds import DEMONSTRATION, scene
from rlrc.errors import UserError

HELD = 5  # steps for which half of the noise is held constant: the reference policy's chunk
_CAMERA = PICTURES + PICTURE.removeprefix("image.")


def record(
    out: Path,
    tasks: Sequence[str],
    episodes_per_task: int,
    size: int = 96,
    as_video: bool = False,
    horizon: int = HORIZON,
    report: Callable[[str, int, bool], None] = lambda task, steps, success: None,
) -> None:
    """Write a new data set with square pictures of ``size`` pixels.

    An episode ends with success, or after ``horizon`` steps. ``report`` is called after each episode.
    """
    if episodes_per_task < 1 or size < 1:
        raise UserError(
            f"expected at least one episode a task and a size of at least 1, found {episodes_per_task} and {size}"
        )
    features = {
        _CAMERA: Feature("video" if as_video else "image", (size, size, 3)),
        STATE: Feature("float32", (len(STATE_NAMES),), STATE_NAMES),
        ACTION: Feature("float32", (len(ACTION_NAMES),), ACTION_NAMES),
    }
    names = [find_task(task).name for task in tasks]

    def episodes() -> Iterator[Recording]:
        for name in names:
            env = MetaWorldEnv(find_task(name), size)
            for number in range(episodes_per_task):
                yield Recording(env.task.instruction, play(env, number, horizon))
                report(name, env.steps, env.success)
            env.close()

    write(out, MetaWorldEnv.metadata["render_fps"], features, episodes(), "sawyer")


def play(env: MetaWorldEnv, number: int, horizon: int = HORIZON) -> Iterator[dict[str, Any]]:
    """The frames of one demonstration; its number determines scene and noise, as in demonstrations."""
    seed, noise = scene(DEMONSTRATION, number), NOISE[number % len(NOISE)]
    env.reset(seed=seed)
    act, rng, held = expert(env.task), np.random.default_rng(seed + 1), np.zeros(len(ACTION_NAMES))
    while env.steps < horizon and not env.success:
        sigma = noise * 0.5**0.5
        if env.steps % HELD == 0:
            held = rng.normal(0, sigma, len(ACTION_NAMES))
        action = act(env.full_observation)
        disturbance = held + rng.normal(0, sigma, len(ACTION_NAMES))
        disturbance[ACTION_NAMES.index("gripper")] = 0  # no noise on the gripper
        yield {_CAMERA: env.render(), STATE: env.state(), ACTION: action}
        env.advance(action + disturbance)
