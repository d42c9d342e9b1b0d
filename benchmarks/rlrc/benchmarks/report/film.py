"""Film strips: what a policy saw during one episode, and the scene that shows best what recovery changed."""

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
    """One episode in evenly spaced pictures, uint8 (F, H, W, 3); ``steps`` says at which control step each was
    taken."""

    name: str
    episode: ScoredEpisode
    frames: NDArray[np.uint8]
    steps: tuple[int, ...]


def film_strip(
    name: str, policy: Policy, environment: Environment, seed: int, frames: int = 8, horizon: int = 200
) -> Strip:
    """Play one episode and keep ``frames`` of the pictures the policy saw (fewer if it saw fewer), the first and last
    included."""
    seen: list[tuple[int, NDArray[np.uint8]]] = []

    def watch(step: int, observation: dict[str, Any]) -> None:
        (picture,) = (value for key, value in observation.items() if key.startswith("image."))
        seen.append((step, picture))

    episode = play(policy, environment, seed, horizon, watch)
    chosen = np.unique(np.linspace(0, len(seen) - 1, frames).round().astype(int))
    return Strip(name, episode, np.stack([seen[i][1] for i in chosen]), tuple(seen[i][0] for i in chosen))


def before_and_after(
    before: tuple[str, Policy],
    after: tuple[str, Policy],
    environment: Environment,
    seeds: Sequence[int],
    horizon: int = 200,
) -> tuple[list[Strip], str]:
    """Both policies on the first of ``seeds`` in which only the second succeeds, or else on the first.

    Returns the two strips and a caption that says how the scene was chosen.
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
