"""What a robot did becomes a data set, and a disk that fails stops the robot."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrc.benchmarks.control import simulated_arm
from rlrc.errors import UserError
from rlrc.robots.recorder import Recorder
from rlrc.robots.robot import RobotError, Sensed

pytest.importorskip("pyarrow")
from rlrc.datasets.lerobot import Dataset


def moved(recorder: Recorder, steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    sent = []
    for step in range(steps):
        sensed = recorder.sense()
        assert sensed is not None
        action = np.array([0.01 * step, -0.02 * step])
        recorder.command(action)
        sent.append((np.array(sensed.observation["image.wrist"]), action))
    return sent


def test_every_step_becomes_a_frame(tmp_path: Path) -> None:
    arm = simulated_arm.SimulatedArm()
    recorder = Recorder(arm, simulated_arm.spec(), 50.0, tmp_path / "run")
    assert recorder.live_pictures
    moved(recorder, 2)  # before an episode begins
    recorder.begin("wave")
    first = moved(recorder, 5)
    recorder.begin("wave back")
    second = moved(recorder, 3)
    assert recorder.finish() == 8
    assert len(arm.sent) == 10
    data = Dataset.open(tmp_path / "run")
    assert (data.fps, len(data)) == (50, 8)
    assert [data.task(i) for i in range(8)] == ["wave"] * 5 + ["wave back"] * 3
    for i, (picture, action) in enumerate([*first, *second]):
        assert np.array_equal(data.picture(i, "observation.images.wrist"), picture)
        np.testing.assert_allclose(data.column("action")[i], action, rtol=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_driver_may_fill_the_same_arrays_again_and_again(tmp_path: Path) -> None:
    class Thrifty(simulated_arm.SimulatedArm):
        kept = np.zeros((simulated_arm.SIZE, simulated_arm.SIZE, 3), np.uint8)

        def sense(self) -> Sensed:
            sensed = super().sense()
            self.kept[...] = len(self.sent)
            return sensed._replace(observation={**sensed.observation, "image.wrist": self.kept})

    recorder = Recorder(Thrifty(), simulated_arm.spec(), 50.0, tmp_path / "run")
    recorder.begin("wave")
    write, going = recorder._frames.put_nowait, list[Any]()
    recorder._frames.put_nowait = going.append  # type: ignore[assignment, method-assign]
    moved(recorder, 5)
    for frame in going:  # the disk is late
        write(frame)
    recorder.finish()
    data = Dataset.open(tmp_path / "run")
    assert [data.picture(i, "observation.images.wrist").max() for i in range(5)] == [0, 1, 2, 3, 4]


def test_a_full_disk_stops_the_robot_and_loses_nothing_else(tmp_path: Path) -> None:
    arm = simulated_arm.SimulatedArm()
    recorder = Recorder(arm, simulated_arm.spec(), 50.0, tmp_path / "run")
    recorder.begin("wave")
    moved(recorder, 2)
    os.dup2(os.open("/dev/full", os.O_WRONLY), recorder._stream.fileno())  # every write fails from now on
    with pytest.raises(RobotError, match="the recording failed: No space left on device"):
        for _ in range(100):
            moved(recorder, 1)
            time.sleep(0.01)
    with pytest.raises(UserError, match=r"expected to record into .*run, found that the recording failed"):
        recorder.finish()
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_written_stops_the_robot_too(tmp_path: Path) -> None:
    class Odd(simulated_arm.SimulatedArm):
        def sense(self) -> Any:
            sensed = super().sense()
            return sensed._replace(observation={**sensed.observation, "note": np.array([None], object)})

    recorder = Recorder(Odd(), simulated_arm.spec(), 50.0, tmp_path / "run")
    recorder.begin("wave")
    recorder.sense()
    recorder.command(np.zeros(2))
    deadline = time.monotonic() + 10
    with pytest.raises(RobotError, match="the recording failed: ValueError"):
        while time.monotonic() < deadline:
            recorder.sense()
            time.sleep(0.01)
    recorder.close()
