"""Film strips: the camera pictures of one episode, and the choice of a scene that shows the effect of recovery."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlrc.benchmarks.measure.success import ScoredEpisode, play

if TYPE_CHECKING:
    from rlrc.envs.environment import Environment
    from rlrc.runtime.inference.policy import Policy


@dataclass(frozen=True)
class Strip:
    """One episode as evenly spaced pictures, uint8 (F, H, W, 3); ``steps``: control step of each picture."""

    name: str
    episode: ScoredEpisode
    frames: NDArray[np.uint8]
    steps: tuple[int, ...]


def film_strip(
    name: str, policy: Policy, environment: Environment, seed: int, frames: int = 8, horizon: int = 200
) -> Strip:
    """Play one episode and keep at most ``frames`` of the policy's input pictures, including the first and last."""
    pictures: list[tuple[int, NDArray[np.uint8]]] = []

    def watch(step: int, observation: dict[str, Any]) -> None:
        (picture,) = (value for key, value in observation.items() if key.startswith("image."))
        pictures.append((step, picture))

    episode = play(policy, environment, seed, horizon, watch)
    chosen = np.unique(np.linspace(0, len(pictures) - 1, frames).round().astype(int))
    return Strip(name, episode, np.stack([pictures[i][1] for i in chosen]), tuple(pictures[i][0] for i in chosen))


def before_and_after(
    before: tuple[str, Policy],
    after: tuple[str, Policy],
    environment: Environment,
    seeds: Sequence[int],
    horizon: int = 200,
) -> tuple[list[Strip], str]:
    """Film both policies on the first seed where only ``after`` succeeds; if there is none, on the first seed.

    Returns the two strips and a caption that states how the scene was chosen.
    """
    first: list[Strip] = []
    for tried, seed in enumerate(seeds, 1):
        strips = [film_strip(name, policy, environment, seed, horizon=horizon) for name, policy in (before, after)]
        if not strips[0].episode.success and strips[1].episode.success:
            chosen = f"the first scene, out of {tried} tried, in which {before[0]} fails and {after[0]} succeeds"
            return strips, f"seed {seed}: {chosen}"
        first = first or strips
    none = f"the first of {len(seeds)} scenes; in none did {before[0]} fail and {after[0]} succeed"
    return first, f"seed {seeds[0]}: {none}"
