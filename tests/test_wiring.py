"""Two things wired to one are refused, in one line: profiles, mappings, cameras."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from guarded import ABSOLUTE, GRIPPER, SOURCES, action_of

from rlrc.artifact import ActionSpec, NormStats, PolicySpec
from rlrc.benchmarks.control import simulated_arm
from rlrc.datasets import fit
from rlrc.errors import UserError
from rlrc.robots.robot import Sensed
from rlrc.runtime.control.sensor_watchdog import SensorWatchdog
from rlrc.runtime.safety import profile as profiles
from rlrc.runtime.safety.guard import Guard
from rlrc.runtime.safety.profile import RobotProfile
from rlrc.runtime.servers import observations

Y = replace(ABSOLUTE, name="y", state="at_y")


def one_line(error: pytest.ExceptionInfo[UserError]) -> None:
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "dimensions",
    [
        (ABSOLUTE, replace(Y, state="at_x")),
        (ABSOLUTE, Y, replace(GRIPPER, rest=None, state="at_y")),
    ],
)
def test_two_dimensions_of_a_profile(dimensions: Any) -> None:
    with pytest.raises(UserError, match=r"entry of the state for one of .*, found at_. for . and") as error:
        profiles.check(RobotProfile("r", SOURCES, dimensions))
    one_line(error)


def test_two_entries_of_a_state_by_one_name() -> None:
    profile = RobotProfile("r", SOURCES, (ABSOLUTE,))
    with pytest.raises(UserError, match="every entry of the state once, found at_x, at_x") as error:
        Guard(profile, 10, action_of(profile), ["at_x", "at_x"], ["m", "m"])
    one_line(error)


def two_cameras(state: bool = True) -> PolicySpec:
    spec = simulated_arm.spec(cameras=("wrist", "front"))
    return spec if state else replace(spec, state=None)


MAPPING = """
state = [["pos"], ["grip"]]
[[cameras]]
key = ["a"]
layout = "HWC"
[[cameras]]
key = ["b"]
layout = "HWC"
[[actions]]
key = "arm"
size = 1
[[actions]]
key = "hand"
size = 1
"""


def test_a_servers_mapping_that_is_right(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(MAPPING)
    assert len(observations.load(path, two_cameras(), "go").cameras) == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('key = ["b"]', 'key = ["a"]', "every key of the client for one of the cameras .*, found a for wrist"),
        ('["grip"]', '["pos"]', "one of the parts of state, found pos for part 1 and part 2"),
        ('key = "hand"', 'key = "arm"', "one of the parts of actions, found arm"),
    ],
)
def test_a_servers_mapping(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(MAPPING.replace(old, new))
    with pytest.raises(UserError, match=message) as error:
        observations.load(path, two_cameras(), "go")
    one_line(error)


def test_two_cameras_of_a_data_set() -> None:
    names = ["observation.images.front", "observation.images.top"]
    features = dict.fromkeys(names, SimpleNamespace(size=(32, 32)))
    dataset: Any = SimpleNamespace(path=Path("data"), cameras=names, features=features)
    spec = simulated_arm.spec((32, 32), cameras=("wrist", "front"))
    assert len(fit._cameras(dataset, spec, {"wrist": "top"})) == 2
    for mapping in ({"wrist": "front"}, {"wrist": "top", "front": "top"}, {"wrist": "observation.images.front"}):
        with pytest.raises(UserError, match="every camera of the data set for one of the cameras") as error:
            fit._cameras(dataset, spec, mapping)
        one_line(error)


def gym_rules(tmp_path: Path, text: str, meaning: Any = ("absolute", "absolute")) -> None:
    gym = pytest.importorskip("rlrc.envs.gym")
    from rlrc.envs.environment import read_mapping

    path = tmp_path / "env.toml"
    path.write_text(f"{text}\n[success]\nterminated = true\n")
    spec = two_cameras()
    spec = replace(spec, action=replace(spec.action, meaning=meaning))
    gym._check_rules(read_mapping(gym.GymMapping, path), spec, path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('cameras = { wrist = "cam", front = "cam" }', "found cam for wrist and front"),
        ('cameras = { wrist = "render", front = "render" }', "found render for wrist and front"),
        ('state = ["agent.pos", "goal", "agent.pos"]', "found 'agent.pos' twice"),
        ('state = ["agent.pos", "agent"]', "found 'agent.pos' and 'agent', which contains it"),
        ('state = [".", "goal"]', "found 'goal' and '.', which contains it"),
        ("action = { index = [0, 0] }", "found shoulder for 2 of the environment's"),
        ("action = { index = [1, 0, 1] }", "found elbow for 2 of the environment's"),
    ],
)
def test_a_mapping_of_an_environment(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        gym_rules(tmp_path, text)
    one_line(error)


def test_a_gripper_may_drive_two_fingers(tmp_path: Path) -> None:
    gym_rules(tmp_path, "action = { index = [0, 1, 1], scale = [1, 1, -1] }", ("absolute", "gripper"))
    gym_rules(tmp_path, 'cameras = { wrist = "cam", front = "cam2" }\nstate = ["agent.pos", "agent.position"]')


def test_two_cameras_of_libero(tmp_path: Path) -> None:
    from rlrc.envs import libero

    path = tmp_path / "libero.toml"
    path.write_text('cameras = { wrist = "agentview", front = "agentview" }\n')
    norm = NormStats((0.0,) * 7, (1.0,) * 7)
    action = ActionSpec(4, tuple("abcdefg"), ("delta",) * 7, ("1",) * 7, norm, 0)
    spec = replace(two_cameras(False), action=action)
    with pytest.raises(UserError, match=r"every camera of LIBERO for one of .*, found agentview") as e:
        libero._parse_task("libero_spatial/0", spec, path)
    one_line(e)


def test_two_cameras_of_a_robot() -> None:
    arm = simulated_arm.SimulatedArm(cameras=("wrist", "front"))
    sensed = arm.sense()
    watch = SensorWatchdog(frozenset({"image.wrist", "image.front"}), 10.0, live=True)
    assert watch.fault(sensed, sensed.stamp) is None
    same = {name: sensed.observation["image.wrist"].copy() for name in ("image.wrist", "image.front")}
    wired: Sensed = sensed._replace(observation={**sensed.observation, **same})
    found = SensorWatchdog(frozenset(), 10.0, live=True).fault(wired, sensed.stamp)
    assert found == "image.front and image.wrist are the same picture: two cameras of the policy are wired to one"
    assert SensorWatchdog(frozenset(), 10.0, live=False).fault(wired, sensed.stamp) is None
