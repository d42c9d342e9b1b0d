"""Meta-World tasks as Gymnasium environments with a picture, proprioception, an instruction and success.

Goals are visible objects. In the shared-scene variants (``drawer-open-v3/shared``) the drawer or window starts half
open at random, and the faucet turns both ways. One picture then goes with two instructions, and only the instruction
tells which task it is.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium
import metaworld.env_dict
import mujoco
import numpy as np
import numpy.typing as npt

from rlrc.artifact import PolicySpec
from rlrc.envs.environment import check_fits
from rlrc.envs.render import CAMERA, get_renderer
from rlrc.errors import UserError

PICTURE = f"image.{CAMERA}"
STATE_NAMES = ("hand_x", "hand_y", "hand_z", "gripper_opening", "hand_dx", "hand_dy", "hand_dz")
STATE_UNITS = ("m", "m", "m", "1", "m/step", "m/step", "m/step")
ACTION_NAMES = ("dx", "dy", "dz", "gripper")
PREFIX = "metaworld:"
HORIZON = 200  # steps of an episode
HZ = 20


@dataclass(frozen=True)
class MetaWorldTask:
    """``hard``: all tasks but the closing ones, which even a collapsed policy solves after pruning."""

    name: str
    instruction: str
    hard: bool
    shared: bool = False

    @property
    def environment(self) -> str:
        return self.name.removesuffix("/shared")


@dataclass(frozen=True)
class SharedScene:
    """The start of two opposite tasks: the range of the object's position, a joint and the range of its start."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    joint: str
    start: tuple[float, float]


_BASE = {
    "button-press-topdown-v3": MetaWorldTask("button-press-topdown-v3", "press the button from the top", hard=True),
    "drawer-open-v3": MetaWorldTask("drawer-open-v3", "open the drawer", hard=True),
    "drawer-close-v3": MetaWorldTask("drawer-close-v3", "close the drawer", hard=False),
    "window-open-v3": MetaWorldTask("window-open-v3", "open the window", hard=True),
    "window-close-v3": MetaWorldTask("window-close-v3", "close the window", hard=False),
    "faucet-open-v3": MetaWorldTask("faucet-open-v3", "open the faucet", hard=True),
    "faucet-close-v3": MetaWorldTask("faucet-close-v3", "close the faucet", hard=False),
}
_SHARED_SCENES = {
    "drawer": SharedScene((-0.1, 0.9, 0.0), (0.1, 0.9, 0.0), "goal_slidey", (-0.11, -0.06)),
    "window": SharedScene((-0.05, 0.75, 0.16), (0.05, 0.9, 0.16), "window_slide", (0.08, 0.12)),
    "faucet": SharedScene((-0.05, 0.8, 0.0), (0.05, 0.85, 0.0), "knob_Joint_1", (0.0, 0.0)),
}
TASKS: dict[str, MetaWorldTask] = _BASE | {
    f"{name}/shared": MetaWorldTask(f"{name}/shared", task.instruction, task.hard, shared=True)
    for name, task in _BASE.items()
    if name.split("-")[0] in _SHARED_SCENES
}


def find_task(name: str) -> MetaWorldTask:
    if (task := TASKS.get(name.removeprefix(PREFIX))) is None:
        raise UserError(f"expected a task out of {', '.join(TASKS)}; found {name!r}")
    return task


Placement = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]  # positions of bodies and of sites


@cache
def _load_model(file: str) -> Any:
    """The model of a scene file, shared by all its simulations in this process: 20 MB, and 0.13 s to compile."""
    return mujoco.MjModel.from_xml_path(file)


def _read_placement(model: Any) -> Placement:
    """The parts of a model that Meta-World changes from scene to scene."""
    return model.body_pos.copy(), model.site_pos.copy()


@cache
def _make_class(environment: str) -> Any:
    """Meta-World's class of a task, on the shared model."""
    stock: Any = metaworld.env_dict.ALL_V3_ENVIRONMENTS[environment]

    def initialize(self: Any) -> tuple[Any, Any]:
        model = _load_model(self.fullpath)
        return model, mujoco.MjData(model)

    return type("Simulation", (stock,), {"_initialize_simulation": initialize})


class MetaWorldEnv(gymnasium.Env):
    """One task. Actions (4,): hand displacement in cm (dx, dy, dz) and gripper effort, each in [-1, 1].

    ``step`` renders a picture every time; ``advance`` and ``observe`` are its two halves, for chunks of actions without
    pictures in between. The reward is 1 at success, which ends the episode, and 0 before. The environments of a process
    share the simulator's models: ``simulation.model`` has the scene of the environment used last.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": HZ}  # noqa: RUF012  (gymnasium's convention)
    render_mode = "rgb_array"
    hz, horizon = HZ, HORIZON

    def __init__(self, task: MetaWorldTask, size: int = 96) -> None:
        self.task, self.size = task, size
        self.simulation: Any = _make_class(task.environment)()
        self._scene = _read_placement(self.simulation.model)
        self.simulation._freeze_rand_vec = True  # the object's position is drawn here, from the seed of reset
        self.simulation._set_task_called = True
        self._at_start = False  # whether the result of the hand's reset is saved
        self.action_space = gymnasium.spaces.Box(-1, 1, (len(ACTION_NAMES),), np.float32)
        self.observation_space = gymnasium.spaces.Dict(
            {
                PICTURE: gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8),
                "state": gymnasium.spaces.Box(-np.inf, np.inf, (len(STATE_NAMES),), np.float32),
                "instruction": gymnasium.spaces.Text(64, charset=string.ascii_letters + " "),
            }
        )
        self.full_observation = np.zeros(39)  # Meta-World's vector, read by scripted experts but not by policies
        self.steps = 0
        self.success = False

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def over(self) -> bool:
        return self.success

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self.reset_scene()
        return self.observe(), {"success": False}

    def reset_scene(self) -> None:
        """Draw a scene from ``self.np_random`` and put the hand at its start."""
        self._load_scene()
        simulation, scene = self.simulation, _SHARED_SCENES[self.task.name.split("-")[0]] if self.task.shared else None
        space = simulation._random_reset_space
        low, high = (scene.low, scene.high) if scene else (space.low, space.high)
        simulation._last_rand_vec = self.np_random.uniform(low, high)
        simulation.curr_path_length, simulation._did_see_sim_exception = 0, False
        mujoco.mj_resetData(simulation.model, simulation.data)
        if not self._at_start:
            simulation.reset_model()
            mujoco.mj_resetData(simulation.model, simulation.data)
            simulation._reset_hand()  # 250 physics steps with the same result every time: run once, then restored
            model, data, hand = simulation.model, simulation.data, self._read_physics()
            simulation._reset_hand = lambda steps=50: _set_physics(model, data, hand)
            self._at_start = True
        simulation.reset_model()
        self._scene = _read_placement(simulation.model)
        if scene:
            joint = simulation.data.joint(scene.joint)
            joint.qpos, joint.qvel = self.np_random.uniform(*scene.start), 0.0
        mujoco.mj_forward(simulation.model, simulation.data)
        observation = simulation._get_obs()
        simulation._prev_obs = observation[:18].copy()
        observation[18:36] = simulation._prev_obs
        self.full_observation, self.steps, self.success = observation, 0, False

    def advance(self, action: npt.NDArray[np.floating]) -> bool:
        """One control step without a picture; returns whether the task is achieved."""
        action = np.clip(np.asarray(action, np.float32), -1.0, 1.0)
        if action.shape != (len(ACTION_NAMES),):
            raise ValueError(f"expected an action of shape ({len(ACTION_NAMES)},), found {action.shape}")
        self._load_scene()
        self.full_observation, _, _, _, info = self.simulation.step(action)
        self.steps += 1
        self.success = self.success or bool(info["success"])
        return self.success

    def observe(self) -> dict[str, Any]:
        return {PICTURE: self.render(), "state": self.state(), "instruction": self.task.instruction}

    def state(self) -> npt.NDArray[np.float32]:
        """Hand position, gripper opening and the hand's last displacement: float32 (7,)."""
        o = self.full_observation
        return np.concatenate([o[:4], o[:3] - o[18:21]]).astype(np.float32)

    def render(self) -> npt.NDArray[np.uint8]:
        self._load_scene()
        renderer = get_renderer(self.simulation.model_name, self.size)
        return renderer(self.simulation.model, self.simulation.data)

    def step(self, action: npt.NDArray[np.floating]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        success = self.advance(action)
        return self.observe(), float(success), success, self.steps >= HORIZON, {"success": success}

    def save(self) -> tuple[Any, ...]:
        """The state from which ``restore`` continues exactly."""
        simulation = self.simulation
        python_state = (simulation.curr_path_length, simulation._prev_obs.copy(), self.full_observation.copy())
        return self._read_physics(), python_state, self.steps, self.success

    def restore(self, saved: tuple[Any, ...]) -> None:
        physics, (length, previous, observation), self.steps, self.success = saved
        self._load_scene()
        _set_physics(self.simulation.model, self.simulation.data, physics)
        self.simulation.curr_path_length, self.simulation._prev_obs = length, previous.copy()
        self.full_observation = observation.copy()

    def _load_scene(self) -> None:
        """Load this environment's scene into the shared model."""
        model = self.simulation.model
        model.body_pos[:], model.site_pos[:] = self._scene

    def _read_physics(self) -> npt.NDArray[np.float64]:
        model, data = self.simulation.model, self.simulation.data
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(mujoco.mj_stateSize(model, kind))
        mujoco.mj_getState(model, data, state, kind)
        return state


def _set_physics(model: Any, data: Any, state: npt.NDArray[np.float64]) -> None:
    mujoco.mj_setState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)
    mujoco.mj_forward(model, data)
    # The solver's warm start is part of the state, and mj_forward has just changed it.
    mujoco.mj_setState(model, data, state, mujoco.mjtState.mjSTATE_INTEGRATION)


def make(name: str, size: int = 96) -> MetaWorldEnv:
    """The environment of ``metaworld:TASK`` (the prefix is optional). Raises UserError for an unknown task."""
    return MetaWorldEnv(find_task(name), size)


def for_policy(task: str, spec: PolicySpec, mapping: Path | None) -> MetaWorldEnv:
    """The environment of a task, with pictures of the policy's size. Raises UserError if the policy does not fit."""
    check(task, spec, mapping)
    return make(task, _picture_size(spec))


def check(task: str, spec: PolicySpec, mapping: Path | None) -> None:
    """Raises UserError unless the policy fits Meta-World's observations and actions."""
    name, found, size = PREFIX + task, find_task(task), _picture_size(spec)
    if mapping is not None:
        raise UserError(f"expected no mapping file for {name}, found {mapping}; leave --env-mapping out")
    if any(camera.height != camera.width for camera in spec.cameras):
        first = spec.cameras[0]
        raise UserError(
            f"expected a policy with square pictures for {name}, found {first.height} x {first.width} pixels"
        )
    picture = np.zeros((size, size, 3), np.uint8)
    example = {PICTURE: picture, "state": np.zeros(len(STATE_NAMES)), "instruction": found.instruction}
    check_fits(name, example, len(ACTION_NAMES), spec, "use a policy that was trained for Meta-World")


def _picture_size(spec: PolicySpec) -> int:
    return spec.cameras[0].height if spec.cameras else 96
