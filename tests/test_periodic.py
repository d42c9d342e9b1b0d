"""Angles that wrap: differences are measured on the circle, everywhere that one is taken. In degrees mostly."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from guarded import ABSOLUTE, DELTA, GRIPPER, SOURCES, VELOCITY, action_of, at, guard_of
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrc.errors import UserError
from rlrc.runtime.cli import replay as cli_replay
from rlrc.runtime.control.chunks import Chunks
from rlrc.runtime.control.telemetry import Telemetry
from rlrc.runtime.safety import profile as profiles
from rlrc.runtime.safety.angles import nearest, shortest
from rlrc.runtime.safety.guard import Guard
from rlrc.runtime.safety.profile import Dimension, Limit, Position, RobotProfile, Tracking, Workspace

DT = 0.1
# 100 degrees a second, 2000 a second squared: 10 in a step, at once
YAW = Dimension(
    "yaw",
    "absolute",
    "deg",
    Position(-180.0, 180.0, "s", "stop"),
    Limit(100.0, "s", "stop"),
    Limit(2000.0, "s"),
    Tracking(25.0, "s"),
    state="at_yaw",
    periodic=True,
)
TURN = math.pi
RAD = replace(YAW, unit="rad", position=Position(-3.14, 3.14, "s"), velocity=Limit(1.0, "s", "stop"), tracking=None)


def started(dimension: Dimension, where: float) -> Guard:
    guard = guard_of(dimension)
    guard.start(at(where))
    return guard


def sent(guard: Guard, command: float, where: float) -> float:
    verdict = guard.step(at(command), at(where), DT)
    assert verdict.command is not None
    return float(verdict.command[0])


def test_differences() -> None:
    periods = np.array([360.0, math.inf, 2 * math.pi])
    np.testing.assert_allclose(shortest(at(350.0, 350.0, 6.0), periods), [-10, 350, 6 - 2 * math.pi])
    values = at(-179.0, 5.0, 0.1)
    np.testing.assert_allclose(nearest(values, at(179.0, -500.0, 0.0), periods), [181.0, 5.0, 0.1])
    assert nearest(values, at(-170.0, 0.0, 0.0), periods).tobytes() == values.tobytes()


@pytest.mark.parametrize("way", [1.0, -1.0])
def test_an_absolute_angle_goes_the_short_way_round(way: float) -> None:
    guard = started(YAW, 175 * way)
    assert sent(guard, 179 * way, 175 * way) == 179 * way
    assert sent(guard, -178 * way, 179 * way) == -178 * way  # 3 degrees on, and not 357 back: no limit is broken
    assert sent(guard, -172 * way, -178 * way) == -172 * way
    assert [event.kind for event in guard.events] == ["start"]


def test_the_example_in_radians() -> None:
    guard = started(RAD, 3.13)
    assert sent(guard, 3.13, 3.13) == 3.13
    assert sent(guard, -3.14, 3.13) == -3.14
    assert not guard.stopped
    once = started(replace(RAD, periodic=False), 3.13)
    assert once.step(at(-3.14), at(3.13), DT).stopped


def test_a_turn_that_is_too_fast_is_clamped_the_short_way() -> None:
    clamp = replace(YAW, velocity=Limit(100.0, "s"))
    guard = started(clamp, 175.0)
    way = [sent(guard, -165.0, where) for where in (175.0, 179.0, -176.0)]
    # 20 degrees: 10 in a step at most, less where it comes to rest, in the numbers of the profile
    assert -180 <= way[0] <= -175 or 175 < way[0] <= 180
    gone = np.array([shortest(at(one - 175.0), at(360.0))[0] for one in way])
    assert (np.diff(gone) >= 0).all()
    assert (np.diff([0.0, *gone]) <= 10 + 1e-9).all()
    assert gone[-1] <= 20 + 1e-9
    assert all(-180 <= one <= 180 for one in way)


def test_round_and_round() -> None:
    guard, where = started(YAW, 0.0), 0.0
    for step in range(1, 400):
        target = (9.0 * step + 180) % 360 - 180
        where_next = sent(guard, target, where)
        assert where_next == target
        where = where_next
    assert not guard.stopped


def test_a_hold_at_the_seam() -> None:
    guard = started(YAW, 170.0)
    assert sent(guard, 178.0, 170.0) == 178.0
    verdict = guard.hold(at(178.0), DT)
    assert verdict.command is not None
    assert -180 <= verdict.command[0] <= 180
    assert not guard.stopped


@pytest.mark.parametrize("meaning", ["absolute", "delta", "measured"])
def test_a_measured_angle_that_wraps_is_no_jump(meaning: str) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "absolute": {},
        "delta": {"meaning": "delta"},
        "measured": {"meaning": "delta", "base": "measured", "tracking": None},
    }
    guard, where = started(replace(YAW, **kinds[meaning]), 160.0), 160.0
    for _ in range(60):
        target = (where + 8 + 180) % 360 - 180
        verdict = guard.step(at(target if meaning == "absolute" else 8.0), at(where), DT)
        assert not verdict.held, guard.reason
        where = target
    # What is no turn is a jump all the same.
    assert guard.step(at(where if meaning == "absolute" else 0.0), at((where + 90) % 360 - 180), DT).stopped


def test_tracking_is_measured_on_the_circle() -> None:
    guard = started(YAW, 170.0)
    for target, where in ((178.0, 172.0), (-175.0, 178.0), (-170.0, -178.0)):
        assert not guard.step(at(target), at(where), DT).stopped, guard.reason
    assert not guard.step(at(-161.0), at(176.0), DT).stopped  # 14 behind -170
    guard.step(at(-152.0), at(173.0), DT)  # 26 behind -161
    assert guard.reason == "tracking of yaw: 26, limit 25 (deg)"


def test_limits_narrower_than_a_turn_are_not_left_the_short_way() -> None:
    """From 80 to -80 degrees within +-90 leads through 0, for behind lies what is forbidden."""
    arc = replace(YAW, position=Position(-90.0, 90.0, "s"), velocity=Limit(100.0, "s"))
    guard, where = started(arc, 80.0), 80.0
    for _ in range(60):
        where = sent(guard, -80.0, where)
        assert -90 <= where <= 90
    assert where == -80.0


def test_limits_may_lie_across_the_seam() -> None:
    """150 to 210 degrees; the policy and the sensor say -170 for 190."""
    arc = replace(YAW, position=Position(150.0, 210.0, "s"))
    guard = started(arc, -175.0)
    assert sent(guard, -170.0, -175.0) == 190.0
    assert sent(guard, 185.0, -170.0) == 185.0
    assert not guard.stopped
    with pytest.raises(UserError, match="found yaw at 100 deg, beyond 150"):
        started(arc, 100.0)


def test_a_state_in_other_numbers() -> None:
    """0 to 360 degrees measured, -pi to pi commanded."""
    rad = replace(RAD, state="at_yaw")
    profile = guard_of(rad).profile
    guard = Guard(profile, 10, action_of(profile), ["at_yaw"], ["deg"])
    guard.start(at(190.0))
    assert sent(guard, math.radians(-168.0), 190.0) == math.radians(-168.0)
    assert not guard.stopped


def test_what_a_chunk_foresees_is_in_the_states_numbers() -> None:
    guard = started(YAW, 175.0)
    sent(guard, -177.0, 175.0)
    np.testing.assert_allclose(guard.predict_state(at(175.0)), [-177.0])


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        (replace(YAW, unit="m"), "expected a periodic yaw in rad or deg, found m"),
        (replace(YAW, position=Position(-360.0, 360.0, "s")), "position limits of the periodic yaw within a turn"),
        (replace(RAD, position=Position(-180.0, 180.0, "s")), "position limits of the periodic yaw within a turn"),
        (replace(VELOCITY, unit="rad/s", periodic=True), "expected a periodic x in rad or deg, found rad/s"),
        (
            replace(VELOCITY, unit="deg", periodic=True),
            "a unit per second of x|absolutes and deltas as periodic, not x",
        ),
        (replace(GRIPPER, unit="rad", periodic=True), "absolutes and deltas as periodic, not grip"),
        (
            replace(DELTA, unit="rad", position=None, unbounded="s", state=None, periodic=True),
            "the state that measures",
        ),
        (replace(ABSOLUTE, periodic=True), "expected a periodic x in rad or deg, found m"),
    ],
)
def test_nonsense_is_refused(dimension: Dimension, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        profiles.check(RobotProfile("r", SOURCES, (dimension,)))
    assert "\n" not in str(caught.value)


def test_a_box_has_no_angles_that_wrap() -> None:
    free = replace(YAW, position=None)
    box = Workspace(("yaw",), (-90.0,), (90.0,), "s")
    with pytest.raises(UserError, match="no workspace limits of the periodic yaw"):
        profiles.check(RobotProfile("r", SOURCES, (free,), box))


def test_no_shipped_profile_is_periodic() -> None:
    for name in profiles.list_shipped():
        assert not any(dimension.periodic for dimension in profiles.load(name).dimensions)


def test_an_ensemble_averages_on_the_circle() -> None:
    chunks = Chunks("ensemble", 4, periods=np.array([360.0, math.inf]))
    chunks.add(np.array([[178.0, 1.0]] * 4, np.float32), 0, 0)
    chunks.add(np.array([[-178.0, 3.0]] * 4, np.float32), 0, 1)
    planned = chunks.at(1)
    assert planned is not None
    weights = np.exp(-0.01 * np.arange(2))
    expected = 178 + 4 * weights[1] / weights.sum()
    np.testing.assert_allclose(planned.action, [expected, 1 + 2 * weights[1] / weights.sum()], rtol=1e-6)
    plain = Chunks("ensemble", 4)
    plain.add(np.array([[178.0, 1.0]] * 4, np.float32), 0, 0)
    plain.add(np.array([[-178.0, 3.0]] * 4, np.float32), 0, 1)
    flat = plain.at(1)
    assert flat is not None
    assert abs(flat.action[0]) < 2


def test_errors_of_a_recording_are_those_on_the_circle() -> None:
    told = Telemetry(4, 2)
    for command in ([3.1, 3.1], [-3.1, -3.1]):
        told.begin(0, 0.0, 0)
        told.write(np.array(command))
    recorded = np.array([[-3.1, -3.1], [-3.1, -3.1]])
    found = cli_replay.errors(recorded, told, ("yaw", "x"), np.array([2 * math.pi, math.inf]))
    assert found["error"]["yaw"]["max"] == pytest.approx(2 * math.pi - 6.2, abs=1e-6)
    assert found["error"]["x"]["max"] == pytest.approx(6.2, abs=1e-6)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.floats(10, 500), st.floats(10, 5000), st.sampled_from([(-180.0, 180.0), (0.0, 360.0)]), st.integers(0, 2**32))
def test_no_command_is_faster_than_allowed_on_the_circle(
    velocity: float, acceleration: float, numbers: tuple[float, float], seed: int
) -> None:
    """Targets anywhere on the circle, in anybody's numbers; the robot is where it was told to be, in its own."""
    rng, limits = np.random.default_rng(seed), (Limit(velocity, "s"), Limit(acceleration, "s"))
    turning = replace(YAW, position=Position(*numbers, "s"), velocity=limits[0], acceleration=limits[1], tracking=None)
    guard, where, before = started(turning, float(rng.uniform(*numbers))), 0.0, 0.0
    where = float(guard._position[0])
    target = where
    for _ in range(150):
        target = float(rng.uniform(-400, 400)) if rng.random() < 0.1 else target + float(rng.normal(0, velocity / 20))
        dt = float(rng.uniform(0.02, 0.2))
        seen = where + 360.0 * rng.integers(-1, 2)
        verdict = guard.step(at(target), at(seen), dt) if rng.random() < 0.9 else guard.hold(at(seen), dt)
        assert not verdict.stopped, guard.reason
        assert verdict.command is not None
        told = float(verdict.command[0])
        assert numbers[0] - 1e-9 <= told <= numbers[1] + 1e-9
        speed = shortest(at(told - where), at(360.0))[0] / dt
        if velocity * dt < 150:  # else a step may be either way round
            assert abs(speed) <= velocity + 1e-6
            assert abs(speed - before) <= acceleration * dt + 1e-6
        where, before = told, speed
