"""Meta-World's scripted experts: from a full observation to an action.

They work in any state, so they can relabel the states that a policy reaches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from metaworld.policies import ENV_POLICY_MAP
from metaworld.policies.sawyer_faucet_close_v3_policy import SawyerFaucetCloseV3Policy
from metaworld.policies.sawyer_faucet_open_v3_policy import SawyerFaucetOpenV3Policy
from metaworld.policies.sawyer_window_close_v3_policy import SawyerWindowCloseV3Policy
from metaworld.policies.sawyer_window_open_v3_policy import SawyerWindowOpenV3Policy

from rlrc.envs.metaworld import MetaWorldEnv, MetaWorldTask

Expert = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float32]]

# The stock window and faucet experts move up whenever the hand is 4 cm off in the horizontal plane, even while pushing.
# In states that a policy reaches, most labels are then "up", depending on a millimetre that no picture shows. DAgger
# with such labels made the tasks worse. The experts below keep pushing, and descend along a funnel.
_LOW, _STRAY = 0.05, 0.10  # metres above the pushing height, and in the plane, within which the hand keeps pushing
_FUNNEL = (0.02, 0.10)  # horizontal distance in metres of the funnel's bottom and rim

Triple = tuple[float, float, float]


def _steady(stock: Any, handle: str, offset: Triple, push: Triple, hover: float) -> type:
    """A stock expert without its jumps. ``handle``: the key of its position in the expert's parsed observation.

    ``offset`` (from the handle to where the hand descends), ``push`` and ``hover`` (height of the approach) are the
    stock expert's.
    """

    def choose_target(o_d: dict[str, npt.NDArray[np.float64]]) -> npt.NDArray[np.float64]:
        start: npt.NDArray[np.float64] = o_d[handle] + np.array(offset)
        away = o_d["hand_pos"] - start
        stray = float(np.linalg.norm(away[:2]))
        behind = away[0] * np.sign(push[0]) < 0.02
        if abs(away[2]) < _LOW and stray < _STRAY and behind:
            start += push
        else:
            start[2] += hover * np.interp(stray, _FUNNEL, (0.0, 1.0))
        return start

    return type("SteadyPolicy", (stock,), {"_desired_pos": staticmethod(choose_target)})


_EXPERTS: dict[str, Any] = dict(ENV_POLICY_MAP) | {
    "window-open-v3": _steady(SawyerWindowOpenV3Policy, "wndw_pos", (-0.03, -0.03, -0.08), (0.1, 0.0, 0.0), 0.3),
    "window-close-v3": _steady(SawyerWindowCloseV3Policy, "wndw_pos", (0.03, -0.03, -0.08), (-0.1, 0.0, 0.0), 0.25),
    "faucet-open-v3": _steady(SawyerFaucetOpenV3Policy, "faucet_pos", (-0.04, 0.0, 0.03), (0.1, 0.05, 0.0), 0.1),
    "faucet-close-v3": _steady(SawyerFaucetCloseV3Policy, "faucet_pos", (0.04, 0.0, 0.03), (-0.1, 0.05, 0.0), 0.1),
}


def expert(task: MetaWorldTask) -> Expert:
    """The scripted expert of a task; actions (4,) float32 in [-1, 1]."""
    policy = _EXPERTS[task.environment]()

    def act(full_observation: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "Constant(s) may be too high": clipped as in the simulator
            action: npt.NDArray[np.float64] = policy.get_action(full_observation)
            return np.clip(action, -1.0, 1.0).astype(np.float32)

    return act


def relabel(env: MetaWorldEnv, act: Expert, horizon: int) -> npt.NDArray[np.float32]:
    """The expert's chunk (horizon, 4) from the current state; the simulation is restored exactly afterwards."""
    saved = env.save()
    chunk = np.empty((horizon, 4), np.float32)
    for step in range(horizon):
        chunk[step] = act(env.full_observation)
        env.advance(chunk[step])
    env.restore(saved)
    return chunk
