"""Disjoint ranges of episode seeds, so that no policy is ever evaluated on a scene it was trained on.

A seed draws one scene of a task (object position, and where the joint of a shared scene starts).
"""

from __future__ import annotations

DEMONSTRATION = range(0, 1_000_000)  # expert-driven episodes and DAgger
REINFORCEMENT = range(1_000_000, 2_000_000)  # PPO's rollouts
VALIDATION = range(2_000_000, 2_100_000)  # choosing checkpoints and settings
EVALUATION = range(3_000_000, 3_100_000)  # reported figures only


def scene(seeds: range, number: int) -> int:
    """The seed with this number; beyond the last one they begin again, so that none leaves its range."""
    return seeds[number % len(seeds)]
