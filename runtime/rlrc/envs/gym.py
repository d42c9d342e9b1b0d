"""``gym:ID``: any Gymnasium environment, with a mapping file from its values to the policy's inputs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from rlrc.artifact import PolicySpec
from rlrc.envs.environment import check_fits, read_mapping
from rlrc.errors import UserError
from rlrc.strict import check_distinct

RENDER, WHOLE = "render", "."  # special paths: the rendered picture, the whole observation
REMEDY = "correct the mapping file (docs/simulators.md)"


@dataclass(frozen=True)
class Instruction:
    """One of: the text itself, or its path in the observation or the info."""

    text: str | None = None
    observation: str | None = None
    info: str | None = None


@dataclass(frozen=True)
class SuccessRule:
    """One of: the path of a flag in the info, the least reward of a successful step, or that the episode terminates."""

    info: str | None = None
    reward: float | None = None
    terminated: bool = False


@dataclass(frozen=True)
class ActionMapping:
    """The environment's dimension i gets ``policy[index[i]] * scale[i] + offset[i]``, within its bounds if ``clip``."""

    index: tuple[int, ...] | None = None
    scale: tuple[float, ...] | None = None
    offset: tuple[float, ...] | None = None
    clip: bool = True


@dataclass(frozen=True)
class GymMapping:
    """The mapping file. Paths have dots between keys; "." is the whole observation.

    ``cameras``: from the policy's cameras to a path or "render". ``state``: paths to concatenate. ``module``: imported
    first, to register the ID. ``arguments`` go to gymnasium.make. ``hz`` and ``horizon`` are needed only if the
    environment does not define them (render_fps, max_episode_steps).
    """

    success: SuccessRule
    cameras: dict[str, str] = field(default_factory=dict)
    state: tuple[str, ...] = ()
    instruction: Instruction = Instruction()
    action: ActionMapping = ActionMapping()
    hz: float | None = None
    horizon: int | None = None
    module: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


class GymEnvironment:
    """An rlrc.envs.environment.Environment of ``env``. Raises UserError if ``env`` and ``mapping`` do not fit."""

    def __init__(self, name: str, env: gymnasium.Env[Any, Any], mapping: GymMapping) -> None:
        self.name, self.env, self.mapping = name, env, mapping
        self.hz = _choose_positive("hz", mapping.hz, env.metadata.get("render_fps"), name)
        self.horizon = int(
            _choose_positive("horizon", mapping.horizon, env.spec.max_episode_steps if env.spec else None, name)
        )
        space = env.action_space
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise UserError(
                f"expected actions of {name} as one vector of numbers (a Box), found {space}; wrap the environment "
                "so that it takes them"
            )
        self.space = space
        for key in ("index", "scale", "offset"):
            values = getattr(mapping.action, key)
            if values is not None and len(values) != self.actions:
                raise UserError(
                    f"expected {self.actions} numbers as action.{key}, one for each dimension of {name}, "
                    f"found {len(values)}; {REMEDY}"
                )
        self.over, self.steps = False, 0
        self._observation: Any = None
        self._info: dict[str, Any] = {}

    @property
    def actions(self) -> int:
        return self.space.shape[0]

    def reset(self, *, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
        self._observation, self._info = self.env.reset(seed=seed)
        self.over, self.steps = False, 0
        self._instruction = self._read_instruction()
        return self.observe(), self._info

    def advance(self, action: NDArray[np.float32]) -> bool:
        self._observation, reward, terminated, truncated, self._info = self.env.step(self._map_action(action))
        self.steps += 1
        last = terminated or truncated or self.steps >= self.horizon
        success = self._is_success(float(reward), terminated, last)
        self.over = success or terminated or truncated
        return success

    def observe(self) -> dict[str, Any]:
        observation: dict[str, Any] = {
            f"image.{camera}": np.asarray(self.env.render() if path == RENDER else self._read(path))
            for camera, path in self.mapping.cameras.items()
        }
        if self.mapping.state:
            parts = [np.asarray(self._read(path), np.float32).ravel() for path in self.mapping.state]
            observation["state"] = np.concatenate(parts)
        if self._instruction is not None:
            observation["instruction"] = self._instruction
        return observation

    def close(self) -> None:
        self.env.close()

    def _read(self, path: str) -> Any:
        return look_up(self._observation, path, f"the observation of {self.name}")

    def _read_instruction(self) -> str | None:
        source = self.mapping.instruction
        if source.observation is not None:
            return str(self._read(source.observation))
        if source.info is not None:
            return str(look_up(self._info, source.info, f"the info that {self.name} gives at reset"))
        return source.text

    def _map_action(self, action: NDArray[np.float32]) -> NDArray[Any]:
        """The environment's action (dim,) from the policy's."""
        rule, mapped = self.mapping.action, np.asarray(action, np.float64)
        if rule.index is not None:
            mapped = mapped[list(rule.index)]
        if rule.scale is not None:
            mapped = mapped * rule.scale
        if rule.offset is not None:
            mapped = mapped + rule.offset
        if rule.clip:
            mapped = np.clip(mapped, self.space.low, self.space.high)
        return mapped.astype(self.space.dtype)

    def _is_success(self, reward: float, terminated: bool, last: bool) -> bool:
        rule = self.mapping.success
        if rule.reward is not None:
            return reward >= rule.reward
        if rule.info is None:
            return terminated
        try:
            return bool(np.any(look_up(self._info, rule.info, f"the info of {self.name}")))
        except UserError:
            if last:  # some environments set the flag only at the end; without it, no episode would ever succeed
                raise
            return False


def look_up(values: Any, path: str, where: str) -> Any:
    """The value at a path of keys joined by dots; keys may contain dots. Raises UserError if there is none."""

    def at(values: Any, path: str) -> Any:
        if not isinstance(values, Mapping):
            raise KeyError(path)
        if path in values:
            return values[path]
        for place in [i for i, letter in enumerate(path) if letter == "."]:
            if path[:place] in values:
                return at(values[path[:place]], path[place + 1 :])
        raise KeyError(path)

    if path == WHOLE:
        return values
    try:
        return at(values, path)
    except KeyError:
        found = f"the keys {', '.join(map(str, values))}" if isinstance(values, Mapping) else type(values).__name__
        raise UserError(f"expected {path!r} in {where}, found {found}; {REMEDY}") from None


def for_policy(identity: str, spec: PolicySpec, mapping: Path | None) -> GymEnvironment:
    """Open a registered ID and reset it once, with seed 0, to check that its observations fit the policy."""
    name = f"gym:{identity}"
    if mapping is None:
        raise UserError(
            f"expected a mapping file from the values of {name} to the policy's inputs, found none; "
            "give --env-mapping FILE.toml (docs/simulators.md)"
        )
    rules = read_mapping(GymMapping, mapping)
    _check_rules(rules, spec, mapping)
    env = _make(identity, rules, mapping)
    try:
        environment = GymEnvironment(name, env, rules)
        observation, _ = environment.reset(seed=0)
        # With an index, any policy fits that has the dimensions named there.
        actions = environment.actions if rules.action.index is None else spec.action.dim
        check_fits(name, observation, actions, spec, f"correct {mapping} (docs/simulators.md)")
    except BaseException:
        env.close()
        raise
    return environment


def check(identity: str, spec: PolicySpec, mapping: Path | None) -> None:
    """Raises UserError as ``for_policy``."""
    for_policy(identity, spec, mapping).close()


def _make(identity: str, rules: GymMapping, mapping: Path) -> gymnasium.Env[Any, Any]:
    mode = {"render_mode": "rgb_array"} if RENDER in rules.cameras.values() else {}
    try:
        if rules.module is not None:
            importlib.import_module(rules.module)
        # The checker only warns about style; what matters is checked against the policy.
        return gymnasium.make(identity, disable_env_checker=True, **(mode | rules.arguments))
    except Exception as error:  # an environment's code may raise anything
        reason = " ".join(str(error).split())
        raise UserError(
            f"expected gym:{identity} to open, found {type(error).__name__}: {reason}; install its package, or correct "
            f"the ID, module or arguments ({mapping})"
        ) from None


def _check_rules(rules: GymMapping, spec: PolicySpec, mapping: Path) -> None:
    instruction, success = rules.instruction, rules.success
    sources = [key for key in ("text", "observation", "info") if getattr(instruction, key) is not None]
    if len(sources) > 1:
        raise UserError(f"expected one source of the instruction in {mapping}, found {' and '.join(sources)}; keep one")
    signs = [key for key in ("info", "reward") if getattr(success, key) is not None]
    signs += ["terminated"] * success.terminated
    if len(signs) != 1:
        raise UserError(
            f"expected one of info, reward and terminated as [success] in {mapping}, found "
            f"{' and '.join(signs) or 'none'}; keep the one that shows success"
        )
    check_distinct(rules.cameras, "observation of the environment", "cameras of the policy", str(mapping))
    _check_apart(rules.state, mapping)
    if wrong := [i for i in rules.action.index or () if not 0 <= i < spec.action.dim]:
        raise UserError(
            f"expected action.index from 0 to {spec.action.dim - 1}, the policy's dimensions "
            f"{', '.join(spec.action.names)}, found {wrong[0]}; correct {mapping}"
        )
    _check_fan_out(rules.action.index or (), spec, mapping)


def _check_apart(paths: tuple[str, ...], mapping: Path) -> None:
    """Raises UserError if a part of the state equals or contains another part."""
    for place, path in enumerate(paths):
        for other in paths[:place] + paths[place + 1 :]:
            if other in (path, WHOLE) or path.startswith(f"{other}."):
                raise UserError(
                    f"expected every part of the observation once as state in {mapping}, found {path!r} "
                    f"{'twice' if other == path else f'and {other!r}, which contains it'}; keep one"
                )


def _check_fan_out(index: Sequence[int], spec: PolicySpec, mapping: Path) -> None:
    """Raises UserError if a dimension of the policy, other than a gripper, drives several of the environment."""
    names, meanings = spec.action.names, spec.action.meaning
    for place in sorted(set(index)):
        if list(index).count(place) > 1 and meanings[place] != "gripper":
            raise UserError(
                f"expected every dimension of the policy once at action.index (a gripper's may drive several fingers), "
                f"found {names[place]} for {list(index).count(place)} of the environment's; correct {mapping}"
            )


def _choose_positive(key: str, mapped: float | None, own: float | None, name: str) -> float:
    value = own if mapped is None else mapped
    if not value or value <= 0:
        raise UserError(f"expected {key} of {name} as a number above 0, found {value}; give {key} in the mapping file")
    return value
