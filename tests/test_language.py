"""The committed policy listens: the same picture with the other instruction gives the other behaviour."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlrc.envs.metaworld import MetaWorldEnv, make
from rlrc.envs.seeds import VALIDATION
from rlrc.runtime.inference.policy import LocalPolicy

POLICY = Path(__file__).parent.parent / "reference" / "compressed"
SCENES = {"drawer": "goal_slidey", "window": "window_slide", "faucet": "knob_Joint_1"}
EPISODES = 4
STEPS = 120


def final_joint(env: MetaWorldEnv, policy: LocalPolicy, joint: str, instruction: str, seed: int) -> float:
    """How far the drawer, window or faucet has moved after an episode with this instruction."""
    observation, _ = env.reset(seed=seed)
    start = float(env.simulation.data.joint(joint).qpos[0])
    for _ in range(0, STEPS, policy.spec.action.horizon):
        for action in policy.infer(observation | {"instruction": instruction})["actions"]:
            env.advance(action)
        observation = env.observe()
    return float(env.simulation.data.joint(joint).qpos[0]) - start


@pytest.mark.parametrize("scene", SCENES)
def test_swapping_the_instruction_changes_what_the_policy_does(scene: str) -> None:
    policy = LocalPolicy.load(POLICY)
    env = make(f"{scene}-open-v3/shared")
    seeds = VALIDATION[1000 : 1000 + EPISODES]
    instructions = (f"open the {scene}", f"close the {scene}")
    moved = {text: [final_joint(env, policy, SCENES[scene], text, seed) for seed in seeds] for text in instructions}
    # The same pictures at the start, opposite movements of the same joint: nothing but the words differs.
    apart = [(a > 0.01) != (b > 0.01) for a, b in zip(*moved.values(), strict=True)]
    assert sum(apart) >= EPISODES - 1, moved
