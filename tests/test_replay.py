"""Recorded episodes in the place of a robot: a frame a command, what the policy sees, how far it is from the record."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrc.artifact import Manifest, PolicySpec
from rlrc.errors import UserError
from rlrc.robots.replay import ReplayRobot, drop_tracking
from rlrc.robots.robot import Sensed
from rlrc.runtime.cli.replay import errors, format_errors
from rlrc.runtime.cli.run import RunPolicy
from rlrc.runtime.control.telemetry import Telemetry
from rlrc.runtime.safety import profile

pytest.importorskip("pyarrow")
from rlrc.datasets.meta import Feature
from rlrc.datasets.writer import Recording, write

NAMES = ("dx", "dy", "dz", "gripper")
CORNER, STATE, ACTION = "observation.images.top", "observation.state", "action"
LENGTHS = (3, 40)
PROFILE = """
robot = "toy"
[sources]
s = "made up"
""" + "".join(
    f"""
[[dimensions]]
name = "{name}"
meaning = "{"gripper" if name == "gripper" else "delta"}"
unit = "{"1" if name == "gripper" else "m"}"
{"rest = 0.0" if name == "gripper" else 'unbounded = "s"'}
"""
    + (
        'position = { low = -10.0, high = 10.0, source = "s" }\n'
        if name == "gripper"
        else 'velocity = { limit = 10.0, source = "s" }\nacceleration = { limit = 1000.0, source = "s" }\n'
    )
    for name in NAMES
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every value of frame i of episode e is 100 e + i, but for the actions, which are 0.001 i times 1, 2, 3, 4."""

    def frames(episode: int) -> Any:
        for i in range(LENGTHS[episode]):
            yield {
                CORNER: np.full((32, 32, 3), 100 * episode + i, np.uint8),
                STATE: np.full(3, 100 * episode + i, np.float32),
                ACTION: 0.001 * i * np.arange(1, 5, dtype=np.float32),
            }

    features = {
        CORNER: Feature("image", (32, 32, 3)),
        STATE: Feature("float32", (3,), ("x", "y", "grip")),
        ACTION: Feature("float32", (4,), NAMES),
    }
    path = tmp_path_factory.mktemp("replay") / "set"
    write(path, 20, features, (Recording("open the drawer", frames(e)) for e in range(len(LENGTHS))))
    return path


@pytest.fixture
def spec(tiny_manifest: Manifest) -> PolicySpec:
    return tiny_manifest.policy


def sensed(robot: ReplayRobot, number: int) -> Sensed:
    """Once the thread has read the frame."""
    for _ in range(1000):
        found = robot.sense()
        assert found is not None
        if found.observation["state"][0] == number:
            return found
        time.sleep(0.005)
    raise AssertionError(f"frame {number} never came")


def test_every_command_brings_the_next_frame(folder: Path, spec: PolicySpec) -> None:
    robot = ReplayRobot(folder, 1, spec, {"corner4": "top"})
    assert (robot.hz, len(robot.recorded)) == (20, 40)
    first, again = sensed(robot, 100), sensed(robot, 100)
    assert again.stamp > first.stamp  # it stands still until the loop begins
    for i in range(40):
        found = sensed(robot, 100 + i)
        assert found.observation["instruction"] == "open the drawer"
        assert np.array_equal(found.observation["image.corner4"], np.full((32, 32, 3), 100 + i))
        assert found.measured is not None
        assert found.measured.tolist() == [100 + i] * 3
        assert not robot.over
        before = time.monotonic()
        robot.command(np.zeros(4))
        if i < 39:
            moved = sensed(robot, 101 + i)
            assert before <= moved.stamp == moved.pictures["image.corner4"] <= time.monotonic()
            time.sleep(0.001)
            assert sensed(robot, 101 + i).stamp == moved.stamp  # and grows old
    assert robot.over
    robot.close()


@pytest.mark.parametrize(
    ("episode", "cameras", "message"),
    [
        (2, {"corner4": "top"}, "expected an episode from 0 to 1 of .*set, found 2"),
        (-1, {"corner4": "top"}, "expected an episode from 0 to 1 of .*set, found -1"),
        (0, {}, "expected the policy's camera corner4 in .*set, found top"),
    ],
)
def test_what_does_not_fit_is_refused(
    folder: Path, spec: PolicySpec, episode: int, cameras: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        ReplayRobot(folder, episode, spec, cameras)


def telemetry(commands: list[list[float]], held: list[bool], capacity: int = 8) -> Telemetry:
    kept = Telemetry(capacity, 2)
    for command, hold in zip(commands, held, strict=True):
        kept.begin(0, 0.0, 0)
        kept.write(np.array(command), held=hold)
    return kept


def test_errors_by_hand() -> None:
    recorded = np.array([[0, 0], [1, 2], [2, 4], [3, 6]], np.float32)
    # Held at first and at last; off by (0.5, -1) and (0, 3) between.
    found = errors(recorded, telemetry([[9, 9], [1.5, 1], [2, 7], [9, 9]], [True, False, False, True]), ("x", "y"))
    assert found == {
        "frames": 4,
        "compared": 2,
        "error": {"x": {"mean": 0.25, "max": 0.5}, "y": {"mean": 2, "max": 3}},
    }
    assert format_errors(found, ("m", "1")) == {
        "compared": "2 of 4 frames with the recorded actions",
        "  x": "mean 0.25, max 0.5 m",
        "  y": "mean 2, max 3",
    }


def test_errors_of_the_steps_that_are_remembered() -> None:
    recorded = np.array([[0, 0], [1, 2], [2, 4], [3, 6]], np.float32)
    found = errors(recorded, telemetry(recorded.tolist(), [False] * 4, capacity=2), ("x", "y"))
    assert (found["compared"], found["error"]["y"]["max"]) == (2, 0)


def test_nothing_is_compared_where_the_robot_is_held_all_the_time() -> None:
    found = errors(np.zeros((2, 2)), telemetry([[1, 1], [1, 1]], [True, True]), ("x", "y"))
    assert found == {"frames": 2, "compared": 0, "error": None}
    assert list(format_errors(found, ("m", "m"))) == ["compared"]


def test_a_recording_follows_nothing() -> None:
    panda = profile.load("franka-panda")
    assert any(one.tracking for one in panda.dimensions)
    assert drop_tracking(panda) == replace(
        panda, dimensions=tuple(replace(one, tracking=None) for one in panda.dimensions)
    )


def test_run_replays_an_episode(
    toy_artifact: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "toy.toml").write_text(PROFILE)
    log = tmp_path / "log.jsonl"
    options: dict[str, Any] = {"replay": folder, "episode": 1, "cameras": {"corner4": "top"}, "log": log}
    code = RunPolicy(toy_artifact, profile=str(tmp_path / "toy.toml"), hz=10, late=20, json=True, **options).run()
    found = json.loads(capsys.readouterr().out)
    assert (code, found["stop"], found["steps"]) == (0, None, 40)
    # The same from the log: what was commanded, against 0.001 i times 1, 2, 3, 4.
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    off = [
        [abs(row[f"command.{name}"] - 0.001 * i * (k + 1)) for k, name in enumerate(NAMES)]
        for i, row in enumerate(rows)
        if not row["held"]
    ]
    assert found["replay"]["frames"] == 40
    assert found["replay"]["compared"] == len(off) > 20
    for name, of in zip(NAMES, np.array(off).T, strict=True):
        assert found["replay"]["error"][name] == pytest.approx({"mean": of.mean(), "max": of.max()}, rel=1e-4)
