"""Meta-World's scripted experts: full observation in, action out.

They answer in any state, so they can relabel a policy's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from metaworld.policies import ENV_POLICY_MAP
from metaworld.policies.sawyer_window_close_v3_policy import SawyerWindowCloseV3Policy
from metaworld.policies.sawyer_window_open_v3_policy import SawyerWindowOpenV3Policy

from rlrc.envs.metaworld import MetaWorldEnv, Task

Expert = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float32]]

# The stock window experts rise 30 cm whenever the hand is 4 cm off in the plane, even while it is pushing: more than
# half of the labels in a policy's own states then say "up", and teach a cycle. Below this height the hand may stray
# further before it retries.
_LOW, _STRAY = 0.05, 0.08  # metres


def _window(stock: Any, side: float) -> type:
    """The stock window expert with hysteresis: a hand that is already low corrects sideways instead of rising again."""

    class SteadyWindowPolicy(stock):
        @staticmethod
        def _desired_pos(o_d: dict[str, npt.NDArray[np.float64]]) -> npt.NDArray[Any]:
            hand, handle = o_d["hand_pos"], o_d["wndw_pos"] + np.array([side, -0.03, -0.08])
            stray = np.linalg.norm(hand[:2] - handle[:2])
            if hand[2] - handle[2] < _LOW and 0.04 < stray < _STRAY and (hand[0] - handle[0]) * side > 0:
                return handle  # on the pushing side of the handle: go straight back to it
            return stock._desired_pos(o_d)

    return SteadyWindowPolicy


_EXPERTS: dict[str, Any] = dict(ENV_POLICY_MAP) | {
    "window-open-v3": _window(SawyerWindowOpenV3Policy, -0.03),
    "window-close-v3": _window(SawyerWindowCloseV3Policy, +0.03),
}


def expert(task: Task) -> Expert:
    """The scripted expert of a task; actions (4,) float32 in [-1, 1]."""
    policy = _EXPERTS[task.environment]()

    def act(full_observation: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "Constant(s) may be too high": we clip as the simulator does
            return np.clip(policy.get_action(full_observation), -1.0, 1.0).astype(np.float32)

    return act


def relabel(env: MetaWorldEnv, act: Expert, horizon: int) -> npt.NDArray[np.float32]:
    """The chunk (horizon, 4) that the expert would play from here; the simulation is left exactly as it was."""
    saved = env.save()
    chunk = np.empty((horizon, 4), np.float32)
    for step in range(horizon):
        chunk[step] = act(env.full_observation)
        env.advance(chunk[step])
    env.restore(saved)
    return chunk
