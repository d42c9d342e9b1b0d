"""Disjoint ranges of episode seeds, so that no policy is evaluated on a scene that it was trained on.

A seed determines a scene of a task: the object's position, and the start of the joint of a shared scene.
"""

from __future__ import annotations

DEMONSTRATION = range(0, 1_000_000)  # expert-driven episodes and DAgger
REINFORCEMENT = range(1_000_000, 2_000_000)  # PPO's rollouts
VALIDATION = range(2_000_000, 2_100_000)  # choosing checkpoints and settings
EVALUATION = range(3_000_000, 3_100_000)  # reported figures only


def scene(seeds: range, number: int) -> int:
    """The seed with this number; numbers beyond the range start again from its beginning."""
    return seeds[number % len(seeds)]
