"""A simulator in the place of a robot: what is seen of it when, and the loop on it from the first chunk to the log."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlrc import artifact as artifacts
from rlrc.envs.metaworld import STATE_NAMES, STATE_UNITS
from rlrc.robots.robot import Sensed
from rlrc.robots.simulator import SimulatorRobot
from rlrc.runtime.cli.run import RunPolicy


@pytest.fixture(scope="session")
def hand_toy(metaworld_toy: Path, make_toy: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy in the names and units of the profile of Meta-World's hand."""
    spec = artifacts.load(metaworld_toy).manifest.policy
    state = replace(spec.state, names=STATE_NAMES, units=STATE_UNITS)
    spec = replace(spec, state=state, action=replace(spec.action, units=("cm", "cm", "cm", "1")))
    return make_toy(tmp_path_factory.mktemp("artifacts") / "hand_toy", spec)


def sensed(robot: SimulatorRobot) -> Sensed:
    found = robot.sense()
    assert found is not None
    return found


def test_time_stands_still_before_the_first_command_and_between_them(metaworld_toy: Path) -> None:
    robot = SimulatorRobot("metaworld:drawer-open-v3", artifacts.load(metaworld_toy).manifest.policy)
    try:
        robot.reset(3_000_000)
        first = sensed(robot)
        time.sleep(0.01)
        later = sensed(robot)
        assert later.stamp >= first.stamp + 0.01  # however long the first inference takes, this is of now
        assert later.pictures == {"image.corner4": later.stamp}
        robot.command(np.array([1.0, 0.0, 0.0, -1.0]))
        deadline = time.monotonic() + 60
        while np.array_equal((moved := sensed(robot)).observation["state"], first.observation["state"]):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(0.01)
        assert sensed(robot).stamp == moved.stamp
        assert robot.steps == 1
    finally:
        robot.close()


def test_run_at_a_fixed_rate(hand_toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.jsonl"
    run = RunPolicy(hand_toy, "metaworld:drawer-open-v3", hz=10, late=20, patience=5, steps=15, json=True, log=log)
    assert run.run() == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["steps"], printed["late_actions"], printed["stop"]) == (15, 0, None)
    assert (printed["episodes"], printed["played"][0]["success"]) == (1, False)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == 15
    assert sum(row["held"] for row in rows) == printed["held_steps"] < 15
    assert not rows[0]["held"]  # the first chunk was waited for
