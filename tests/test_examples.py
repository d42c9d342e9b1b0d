"""The examples as they are started: `rlrc run` with their drivers, in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlrc.artifact import PolicySpec
from rlrc.errors import UserError

EXAMPLES = Path(__file__).parents[1] / "examples"
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
JOINTS = ("shoulder", "elbow")


@contextmanager
def arm() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The simulated arm and its port."""
    command = [sys.executable, "udp_arm.py", "--port", "0"]
    process = subprocess.Popen(command, cwd=EXAMPLES, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    patience = threading.Timer(120, process.kill)  # so that no line is waited for in vain
    patience.start()
    try:
        yield process, int(line(process).rpartition(":")[2])
    finally:
        patience.cancel()
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def run(policy: Path, port: int, *options: str) -> subprocess.Popen[str]:
    """Lenient about time: the machine is shared."""
    command = [sys.executable, "-m", "rlrc.runtime.cli", "run", str(policy), "--driver", "udp_robot:open_robot"]
    command += [
        "--profile",
        "udp_arm.toml",
        "--instruction",
        "wave",
        "--hz",
        "20",
        "--late",
        "6",
        "--patience",
        "5",
        *options,
    ]
    environment = ENVIRONMENT | {"UDP_ARM": f"127.0.0.1:{port}"}
    return subprocess.Popen(
        command, cwd=EXAMPLES, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def measured(port: int) -> np.ndarray:
    """Where the arm says that it is, to somebody who only asks: a hello by the format's description."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asking.settimeout(10)
        asking.sendto(struct.pack("<BId", 0, 1, time.monotonic()), ("127.0.0.1", port))
        while True:
            datagram = asking.recv(4096)
            if datagram[0] == 3:
                return np.frombuffer(datagram, "<f4", offset=13)


def test_run_moves_an_arm_over_udp(arm_toy: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with arm() as (process, port):
        running = run(arm_toy, port, "--steps", "20", "--json", "--log", str(log))
        printed, complaints = running.communicate(timeout=120)
        assert running.returncode == 0, complaints
        assert 20 <= json.loads(printed)["steps"] <= 30  # it is brought to rest after the last one
        assert line(process).startswith("hello from 127.0.0.1")
        assert line(process).startswith("held, stop requested")
        rows = [json.loads(row) for row in log.read_text().splitlines()]
        moved = np.array([[row[f"command.{name}"] for name in JOINTS] for row in rows])
        assert np.abs(moved).max() > 0.05
        assert np.abs(moved[-1] - moved[-2]).max() < 1e-6  # to rest
        # The arm is on its way to the last command, at most a step's 1.5 rad/s away.
        assert np.abs(measured(port) - moved[-1]).max() < 0.16


def test_the_arm_holds_by_itself_when_the_loop_is_killed(arm_toy: Path) -> None:
    with arm() as (process, port):
        running = run(arm_toy, port)
        assert running.stdout is not None
        assert running.stdout.readline().startswith("inference:")  # the loop begins
        assert line(process).startswith("hello from")
        time.sleep(1)
        running.kill()
        killed = time.monotonic()
        held = line(process)
        assert time.monotonic() - killed < 1.0  # 0.2 s, on a shared machine
        assert held.startswith("held, no command for 0.2 s: at ")
        where = np.array([float(joint) for joint in held.partition(": at ")[2].split()])
        assert np.abs(where).max() > 0.05  # it has been moving
        time.sleep(0.3)
        np.testing.assert_allclose(measured(port), where, atol=1e-4)
        running.communicate()


def test_an_arm_that_is_not_there_is_one_line(arm_toy: Path) -> None:
    running = run(arm_toy, 9)  # nobody listens there
    printed, complaints = running.communicate(timeout=120)
    assert (running.returncode, printed) == (2, "")
    assert complaints.startswith(
        "rlrc: error: expected a state of 2 entries and 1 pictures from 127.0.0.1:9, found nothing and 0 pictures; "
    )
    assert complaints.count("\n") == 1


@pytest.fixture
def ros2() -> Any:
    """examples/ros2_robot.py as a module."""
    found = importlib.util.spec_from_file_location("ros2_robot", EXAMPLES / "ros2_robot.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.skipif(importlib.util.find_spec("rclpy") is not None, reason="ROS 2 is there")
def test_without_ros_the_driver_says_so(ros2: Any, arm_spec: PolicySpec) -> None:
    with pytest.raises(UserError, match=r"expected ROS 2 for this Python, found no module rclpy; source /opt/ros"):
        ros2.open_robot(arm_spec, "wave")


def test_joint_states_in_the_policys_order(ros2: Any, arm_spec: PolicySpec) -> None:
    message = SimpleNamespace(name=["elbow", "gripper", "shoulder"], position=[0.5, 0.0, -1.0])
    assert ros2.positions(message, arm_spec).tolist() == [-1.0, 0.5]
    assert ros2.positions(SimpleNamespace(name=["elbow"], position=[0.5]), arm_spec) is None


def test_pictures_of_ros(ros2: Any) -> None:
    rows = [1, 2, 3, 4, 5, 6, 0, 0, 7, 8, 9, 10, 11, 12, 0, 0]  # two rows of two pixels and two bytes of padding
    message = SimpleNamespace(encoding="rgb8", height=2, width=2, step=8, data=array("B", rows))
    assert ros2.pixels(message).tolist() == [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]]
    message.encoding = "bgr8"
    assert ros2.pixels(message).tolist() == [[[3, 2, 1], [6, 5, 4]], [[9, 8, 7], [12, 11, 10]]]
    message.encoding = "mono8"
    with pytest.raises(ValueError, match="expected rgb8 or bgr8, found mono8"):
        ros2.pixels(message)
