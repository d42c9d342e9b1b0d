"""``gym:ID`` with a mapping file: a small environment of ours, whose numbers can be followed, and one of MuJoCo's."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from rlrc.artifact import CameraSpec, NormStats, PolicySpec, StateSpec
from rlrc.envs.environment import open_environment
from rlrc.envs.gym import GymEnvironment, look_up
from rlrc.errors import UserError
from rlrc.runtime.cli import main

# In a file of its own, so that the processes that play episodes can import it too.
POINT = '''
import gymnasium
import numpy as np


class Point(gymnasium.Env):
    """A point on [-1, 1] x [-1, 1] that is to reach the origin; the picture has a bright pixel where it is."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    render_mode = "rgb_array"

    def __init__(self, goal="the middle", late=False, render_mode=None):
        self.goal, self.late = goal, late
        self.action_space = gymnasium.spaces.Box(-0.5, 0.5, (2,), np.float32)
        self.observation_space = gymnasium.spaces.Dict({})

    def _observation(self):
        return {"agent": {"pos": self.at.copy(), "last": self.last}, "cam.top": self.render(), "goal": self.goal}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.last, self.steps = self.np_random.uniform(-0.9, 0.9, 2), np.zeros(1), 0
        return self._observation(), {"words": "go home"}

    def step(self, action):
        assert action.dtype == np.float32 and np.abs(action).max() <= 0.5
        self.at, self.last, self.steps = np.clip(self.at + action, -1, 1), action[:1], self.steps + 1
        near = bool(np.abs(self.at).max() < 0.1)
        info = {"done": {"near": near}} if not self.late or near else {}
        return self._observation(), 1.0 - np.abs(self.at).max(), near, False, info

    def render(self):
        picture = np.zeros((32, 32, 3), np.uint8)
        column, row = ((self.at + 1) / 2 * 31).astype(int)
        picture[row, column] = 255
        return picture


gymnasium.register("rlrc/Point-v0", entry_point=Point, max_episode_steps=12)
'''
MAPPING = """
module = "rlrc_test_point"
state = ["agent.pos", "agent.last"]
[cameras]
corner4 = "cam.top"
[instruction]
text = "close the window"
[action]
index = [0, 2]
scale = [10.0, -10.0]
[success]
info = "done.near"
"""


@pytest.fixture(autouse=True)
def point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "rlrc_test_point.py").write_text(POINT)
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield
    forget()


def forget() -> None:
    """A module is imported, and its environments registered, once."""
    sys.modules.pop("rlrc_test_point", None)
    gymnasium.registry.pop("rlrc/Point-v0", None)


@pytest.fixture
def spec(tiny_manifest: Any) -> PolicySpec:
    """Takes a picture of 32 x 32 pixels, three numbers and words; gives dx, dy, dz and a gripper."""
    return tiny_manifest.policy


@pytest.fixture
def opened(spec: PolicySpec, tmp_path: Path) -> Callable[..., Any]:
    """Opens Point-v0 with changes of its mapping file, given as pairs of old and new text, and of the policy."""

    def open_(*changes: tuple[str, str], name: str = "gym:rlrc/Point-v0", **of_policy: Any) -> Any:
        forget()
        text = MAPPING
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "point.toml").write_text(text)
        return open_environment(name, replace(spec, **of_policy), tmp_path / "point.toml")

    return open_


def test_observations_and_actions_by_hand(opened: Callable[..., Any]) -> None:
    env = opened()
    assert (env.name, env.hz, env.horizon) == ("gym:rlrc/Point-v0", 10, 12)
    first, _ = env.reset(seed=5)
    start = np.random.default_rng(5).uniform(-0.9, 0.9, 2)  # gymnasium's generator is numpy's
    assert sorted(first) == ["image.corner4", "instruction", "state"]
    np.testing.assert_allclose(first["state"], [*start, 0], rtol=1e-6)
    assert first["instruction"] == "close the window"
    column, row = ((start + 1) / 2 * 31).astype(int)
    assert np.argwhere(first["image.corner4"][..., 0]).tolist() == [[row, column]]

    # dx and dz: 0.03 * 10 and -0.02 * 10 are in the bounds, 0.09 * 10 and 0.2 * -10 are clipped to 0.5 and -0.5.
    assert not env.advance(np.array([0.03, 9, 0.02, 9], np.float32))
    np.testing.assert_allclose(env.observe()["state"], [start[0] + 0.3, start[1] - 0.2, 0.3], rtol=1e-6)
    env.advance(np.array([0.09, 9, 0.2, 9], np.float32))
    np.testing.assert_allclose(env.observe()["state"][:2], np.clip([start[0] + 0.8, start[1] - 0.7], -1, 1), rtol=1e-6)


def test_actions_with_an_offset_and_without_scale(opened: Callable[..., Any]) -> None:
    env = opened(("scale = [10.0, -10.0]", "offset = [0.1, -0.2]"))
    env.reset(seed=5)
    before = env.observe()["state"]
    env.advance(np.array([0.05, 9, 0.05, 9], np.float32))
    np.testing.assert_allclose(env.observe()["state"][:2] - before[:2], [0.15, -0.15], atol=1e-6)


def home(env: GymEnvironment) -> np.ndarray:
    """The action of the policy that brings the point to the middle."""
    x, y, _ = env.observe()["state"]
    return np.array([-x / 10, 0, y / 10, 0], np.float32)


@pytest.mark.parametrize(
    ("success", "changes"),
    [
        ('info = "done.near"', []),
        ("reward = 0.9", []),
        ("terminated = true", []),
        ('info = "done.near"', [("[cameras]", "arguments = {late = true}\n[cameras]")]),
    ],
)
def test_success(opened: Callable[..., Any], success: str, changes: list[tuple[str, str]]) -> None:
    env = opened(('info = "done.near"', success), *changes)
    for seed in range(3):
        env.reset(seed=seed)
        assert not env.over
        # From at most 0.9 in both directions steps of 0.5 take two.
        outcomes = []
        while not env.over:
            outcomes.append(env.advance(home(env)))
        assert outcomes == [False] * (len(outcomes) - 1) + [True]
        assert len(outcomes) <= 2


def test_an_episode_ends_without_success(opened: Callable[..., Any]) -> None:
    env = opened()
    env.reset(seed=5)
    outcomes = [env.advance(np.zeros(4, np.float32)) for _ in range(12)]
    assert (any(outcomes), env.over) == (False, True)


def test_a_flag_that_never_comes_is_refused_at_the_end(opened: Callable[..., Any]) -> None:
    env = opened(('"done.near"', '"done.far"'))
    env.reset(seed=5)
    for _ in range(11):
        env.advance(np.zeros(4, np.float32))
    with pytest.raises(UserError, match=r"expected 'done\.far' in the info of gym:rlrc/Point-v0, found the keys done;"):
        env.advance(np.zeros(4, np.float32))


@pytest.mark.parametrize(
    ("source", "words"),
    [('observation = "goal"', "the middle"), ('info = "words"', "go home"), ('text = "stay"', "stay")],
)
def test_where_the_instruction_comes_from(opened: Callable[..., Any], source: str, words: str) -> None:
    env = opened(('text = "close the window"', source))
    env.advance(np.zeros(4, np.float32))
    assert env.observe()["instruction"] == words  # after a step too, whose info has no words


def test_rendered_pictures_and_what_the_file_overrides(opened: Callable[..., Any]) -> None:
    env = opened(('"cam.top"', '"render"'), ("[cameras]", "hz = 5\nhorizon = 3\n[cameras]"))
    assert (env.hz, env.horizon) == (5, 3)
    assert env.observe()["image.corner4"].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([('[instruction]\ntext = "close the window"', "")], "expected an instruction from gym:rlrc/Point-v0"),
        ([('text = "close the window"', 'text = ""')], "expected an instruction from gym:rlrc/Point-v0"),
        ([("text =", 'info = "words"\ntext =')], "expected one source of the instruction in .*, found text and info"),
        ([('info = "done.near"', "")], r"expected one of info, reward and terminated as \[success\] in .*, found none"),
        ([("[success]", "[success]\nreward = 1")], "found info and reward; keep the one"),
        ([("state =", "stat =")], r"point\.toml: .* found stat, which is unknown; correct"),
        ([("scale =", "scales =")], r"found action\.scales, which is unknown"),
        ([("corner4 =", "front =")], r"expected an observation with image\.corner4, instruction, state, found no"),
        ([("agent.last", "agent.next")], r"expected 'agent\.next' in the observation of .*, found the keys agent, cam"),
        ([(', "agent.last"', "")], r"expected state of shape \(3,\), found \(2,\)"),
        (
            [("index = [0, 2]\nscale = [10.0, -10.0]", "")],
            "expected actions of 2 dimensions for gym:rlrc/Point-v0, fou",
        ),
        ([("index = [0, 2]", "index = [0, 4]")], r"expected action\.index from 0 to 3, .* found 4"),
        ([("index = [0, 2]", "index = [0]")], r"expected 2 numbers as action\.index"),
        ([("[10.0, -10.0]", "[10.0]")], r"expected 2 numbers as action\.scale, .* found 1"),
        ([("rlrc_test_point", "rlrc_test_none")], "found ModuleNotFoundError: No module named 'rlrc_test_none'"),
        (
            [("[cameras]", "arguments = {colour = 1}\n[cameras]")],
            "found TypeError: .*unexpected keyword argument 'colo",
        ),
        (
            [("[cameras]", "horizon = 0\n[cameras]")],
            "expected horizon of gym:rlrc/Point-v0 as a number above 0, found 0",
        ),
        ([("[cameras]", "[cameras")], "expected TOML in .*point.toml, found"),
    ],
)
def test_refuses_before_anything_is_played(
    opened: Callable[..., Any], changes: list[tuple[str, str]], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        opened(*changes)
    assert "\n" not in str(caught.value)


def test_refuses_names_files_and_action_spaces(opened: Callable[..., Any], spec: PolicySpec, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected gym:rlrc/Pint-v0 to open, found NameNotFound: Environment `Pint`"):
        opened(name="gym:rlrc/Pint-v0")
    with pytest.raises(UserError, match="expected a mapping file from the values of gym:X"):
        open_environment("gym:X", spec)
    with pytest.raises(UserError, match=r"expected a mapping file at .*none\.toml, found: No such file"):
        open_environment("gym:X", spec, tmp_path / "none.toml")
    with pytest.raises(
        UserError, match=r"expected actions of gym:CartPole-v1 as one vector of numbers \(a Box\), foun"
    ):
        opened(('"cam.top"', '"."'), name="gym:CartPole-v1")


def test_a_policy_without_language_needs_no_instruction(opened: Callable[..., Any]) -> None:
    env = opened(('[instruction]\ntext = "close the window"', ""), prompt=None)
    assert sorted(env.observe()) == ["image.corner4", "state"]


def test_keys_with_dots() -> None:
    values = {"observation.state": 1, "observation": {"images.top": 2}}
    assert [look_up(values, path, "x") for path in ("observation.state", "observation.images.top")] == [1, 2]
    assert look_up(values, ".", "x") is values


def test_commands_play_it(
    make_toy: Callable[..., Path], spec: PolicySpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control loop, and the benchmark with processes of its own, end to end."""
    (tmp_path / "point.toml").write_text(MAPPING)
    artifact, mapping = make_toy(tmp_path / "toy", spec), str(tmp_path / "point.toml")
    given = ["--env", "gym:rlrc/Point-v0", "--env-mapping", mapping, "--json"]
    assert main(["run", str(artifact), *given, "--hz", "0", "--seed", "7", "--episodes", "2"]) == 0
    played = json.loads(capsys.readouterr().out)["played"]
    assert [episode["seed"] for episode in played] == [7, 8]
    assert all(episode["steps"] == 12 or episode["success"] for episode in played)

    benchmark = ["bench", "success", str(artifact), *given, "--workers", "1", "--episodes-per-task", "2"]
    assert main(benchmark) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert list(row["outcomes"]) == ["gym:rlrc/Point-v0"]
    assert row["episodes"] == 2
    assert row["hard"]["success"] is None
    assert sorted(row["scenes"]) == ["first_seed", "horizon", "mapping"]

    (tmp_path / "point.toml").write_text(MAPPING.replace('text = "close the window"', ""))
    assert main(benchmark) == 2
    assert capsys.readouterr().err.startswith("rlrc: error: expected an instruction from gym:rlrc/Point-v0")


def test_an_environment_that_comes_with_gymnasium(
    make_toy: Callable[..., Path], spec: PolicySpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reacher-v5: an observation without keys, a rendered picture of 480 x 480 pixels, no success but by reward."""
    state = StateSpec(tuple("abcdefghij"), ("1",) * 10, NormStats((0.0,) * 10, (1.0,) * 10, clip=5.0))
    camera = CameraSpec("corner4", 32, 32, "bilinear", (0.5,) * 3, (0.25,) * 3, "HWC")
    artifact = make_toy(tmp_path / "toy", replace(spec, state=state, cameras=(camera,)))
    (tmp_path / "reacher.toml").write_text(
        'state = ["."]\nhorizon = 5\n[cameras]\ncorner4 = "render"\n[instruction]\ntext = "open the drawer"\n'
        "[action]\nindex = [0, 1]\nscale = [50, 50]\n[success]\nreward = -0.02\n"
    )
    command = ["run", str(artifact), "--env", "gym:Reacher-v5", "--env-mapping", str(tmp_path / "reacher.toml")]
    assert main([*command, "--hz", "0", "--json"]) == 0
    (episode,) = json.loads(capsys.readouterr().out)["played"]
    assert (episode["steps"], episode["success"]) == (5, False)
