"""States that cannot be true stop; those of honest robots do not. In every mode; numbers are metres and seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from guarded import ABSOLUTE, DELTA, GRIPPER, VELOCITY, action_of, at, guard_of
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrc.errors import UserError
from rlrc.runtime.safety import profile as profiles
from rlrc.runtime.safety.guard import Guard
from rlrc.runtime.safety.profile import Dimension, Tracking

DT = 0.1
MEASURED = replace(DELTA, base="measured")
MODES = {"absolute": ABSOLUTE, "delta": DELTA, "velocity": VELOCITY, "measured": MEASURED}
LEAD = 0.5  # V times half a second; V is 1 m/s
Sensor = Callable[[np.ndarray, int], np.ndarray]


class Body:
    """Goes where it is told: ``share`` of the way within a step, ``steps`` late, no further than ``wall``."""

    def __init__(self, guard: Guard, where: Any, steps: int = 0, share: float = 1.0, wall: float = math.inf) -> None:
        self.meanings = [dimension.meaning for dimension in guard.profile.dimensions]
        self.measured = np.array([dimension.measured for dimension in guard.profile.dimensions])
        self.position, self.target = np.array(where, float), np.array(where, float)
        self.share, self.wall = share, wall
        rest = self.position if self.meanings[0] == "absolute" else np.zeros(len(self.position))
        self.late = [rest] * steps
        self.path = np.zeros(len(self.position))  # all the way, back and forth

    def obey(self, command: np.ndarray) -> None:
        """All dimensions have one meaning here."""
        self.late.append(command)
        command, base = self.late.pop(0), self.position if self.measured.all() else self.target
        moves = {"absolute": command - self.target, "delta": command, "velocity": command * DT}[self.meanings[0]]
        self.target = (self.target if self.meanings[0] == "absolute" else base) + moves
        before, self.position = self.position, self.position + self.share * (self.target - self.position)
        self.position = np.minimum(self.position, self.wall)
        self.path = self.path + np.abs(self.position - before)


def told(guard: Guard, speed: np.ndarray, body: Body) -> np.ndarray:
    """A policy's command for a speed."""
    meanings = [dimension.meaning for dimension in guard.profile.dimensions]
    values = {"absolute": guard._position + speed * DT, "delta": speed * DT, "velocity": speed}
    return np.array([values[meaning][i] for i, meaning in enumerate(meanings)])


def play(
    guard: Guard, body: Body, speeds: Iterator[np.ndarray], sensor: Sensor = lambda state, _: state, steps: int = 400
) -> int:
    """-> the step at which it stopped, ``steps`` if it did not."""
    guard.start(body.position.copy())
    for step in range(steps):
        state = np.array(sensor(body.position.copy(), step))
        verdict = guard.step(told(guard, next(speeds), body), state, DT)
        assert verdict.command is not None
        if guard.stopped:
            return step
        body.obey(verdict.command)
    return steps


def steady(speed: float, dimensions: int = 1) -> Iterator[np.ndarray]:
    while True:
        yield np.full(dimensions, speed)


def waving(speed: float, dimensions: int = 1, period: int = 40) -> Iterator[np.ndarray]:
    step = 0
    while True:
        step += 1
        yield np.array([speed * math.sin(2 * math.pi * step / period + 1.7 * i) for i in range(dimensions)])


def resting(dimensions: int = 1) -> Iterator[np.ndarray]:
    return steady(0.0, dimensions)


def pair(mode: str) -> list[Dimension]:
    return [MODES[mode], replace(MODES[mode], name="y", state="at_y")]


def frozen_from(first: int) -> Sensor:
    kept: list[np.ndarray] = []

    def sensor(state: np.ndarray, step: int) -> np.ndarray:
        if step >= first:
            kept.append(state)
            return kept[0]
        return state

    return sensor


# What cannot be true


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("speed", [1.0, 0.3, 0.02])
def test_a_frozen_state_stops_once_the_commands_lead(mode: str, speed: float) -> None:
    guard = guard_of(MODES[mode])
    body = Body(guard, [0.0])
    assert play(guard, body, steady(speed), frozen_from(20), 2000) < 2000
    assert "lead of x" in str(guard.reason)
    frozen_at = 20 * speed * DT
    assert body.position[0] - frozen_at <= LEAD + 3 * speed * DT


@pytest.mark.parametrize("mode", MODES)
def test_noise_does_not_hide_that_a_state_is_frozen(mode: str) -> None:
    guard, rng = guard_of(MODES[mode]), np.random.default_rng(0)
    body = Body(guard, [0.0])
    freeze = frozen_from(20)
    noisy = play(guard, body, steady(0.2), lambda s, i: freeze(s, i) + rng.normal(0, 0.002, 1), 2000)
    assert noisy < 2000
    assert body.position[0] <= 0.4 + LEAD + 0.1


@pytest.mark.parametrize("mode", MODES)
def test_what_is_told_back_and_forth_is_found_too(mode: str) -> None:
    guard = guard_of(MODES[mode])
    body = Body(guard, [0.0])
    assert play(guard, body, waving(0.5, period=20), frozen_from(20), 2000) < 200
    assert "still of x" in str(guard.reason)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("sensor", "reason"),
    [
        (lambda s: s * 100, "jump of"),  # metres become centimetres
        (lambda s: s / 1000, "jump of"),
        (lambda s: s[::-1], "jump of"),
        (lambda s: s + 0.2, "jump of"),
        (lambda s: -s, "jump of"),
    ],
)
def test_a_state_that_becomes_another_stops_at_once(mode: str, sensor: Any, reason: str) -> None:
    guard = guard_of(*pair(mode))
    body = Body(guard, [0.4, -0.4])
    # .1 m in a step, and V for 50 ms of jitter, are .15 m.
    assert play(guard, body, waving(0.3, 2), lambda s, i: s if i < 20 else sensor(s)) == 20
    assert reason in str(guard.reason)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sensor", [lambda s: s * 100, lambda s: s / 100, lambda s: -s, lambda s: 0 * s])
def test_a_unit_that_is_wrong_from_the_start_stops_as_soon_as_it_moves(mode: str, sensor: Any) -> None:
    guard = guard_of(MODES[mode])
    body = Body(guard, [0.0])
    assert play(guard, body, steady(0.5), lambda s, _: sensor(s)) < 30
    assert body.position[0] <= LEAD + 0.1


@pytest.mark.parametrize("name", ["widowx-250s-bridge", "metaworld"])
def test_a_frozen_state_stays_within_the_box(name: str) -> None:
    """5 m of commands in a box of .35 m: what these profiles let through once."""
    profile, hz = profiles.load(name), {"widowx-250s-bridge": 5.0, "metaworld": 20.0}[name]
    sensed = [dimension for dimension in profile.dimensions if dimension.state is not None]
    guard = Guard(profile, hz, action_of(profile), [str(d.state) for d in sensed], [d.length for d in sensed])
    low, high = guard.limits.low[:3], guard.limits.high[:3]
    middle = (low + high) / 2
    guard.start(middle)
    moved = np.zeros(3)
    for _ in range(500):
        command = np.zeros(7 if len(profile.dimensions) == 7 else 4)
        command[:3] = (high - low) / 35
        verdict = guard.step(command, middle, 1 / hz)
        assert verdict.command is not None
        moved += verdict.command[:3]
    assert guard.stopped
    assert (moved <= (high - low) * 0.6).all()


def test_a_blocked_robot_stops_after_its_lead() -> None:
    for mode, dimension in MODES.items():
        guard = guard_of(dimension)
        body = Body(guard, [0.0], wall=1.0)
        step = play(guard, body, steady(0.5))
        assert 20 + LEAD / 0.05 <= step <= 20 + LEAD / 0.05 + 3, mode


def test_the_profile_may_say_how_far() -> None:
    patient = replace(MEASURED, lead=Tracking(2.0, "s", "hold"), jump=Tracking(0.5, "s", "hold"))
    guard = guard_of(patient)
    guard.start(at(0.0))
    assert not guard.step(at(0.05), at(0.45), DT).held
    assert guard.step(at(0.05), at(-0.2), DT).held  # .65 m; .1 + .5 are allowed
    assert not guard.stopped
    held = [guard.step(at(0.1), at(-0.2), DT).held for _ in range(40)]
    assert 20 <= held.index(True) <= 26
    assert guard.events[-1].kind == "lead"


@pytest.mark.parametrize("key", ["jump", "lead", "still"])
def test_what_nothing_measures_has_neither(key: str) -> None:
    free = replace(DELTA, position=None, unbounded="s", state=None)
    with pytest.raises(UserError, match=f"a state and a velocity limit with the {key} of x"):
        guard_of(replace(free, **dict[str, Any]({key: Tracking(1.0, "s")})))


def test_a_rearmed_robot_may_have_been_moved() -> None:
    guard = guard_of(MEASURED)
    guard.start(at(0.0))
    guard.stop("a key")
    guard.hold(at(0.0), DT)
    guard.rearm("moved by hand")
    assert not guard.step(at(0.0), at(5.0), DT).held
    guard.stop("a key")
    guard.rearm("again", at(7.0))
    assert not guard.step(at(0.0), at(7.0), DT).held


def test_a_command_that_was_taken_back_does_not_lead() -> None:
    guard = guard_of(MEASURED)
    guard.start(at(0.0))
    for step in range(200):  # .02 m each, none of which is sent
        guard.step(at(0.02), at(0.0), DT)
        guard.take_back()
        verdict = guard.hold(at(0.0), DT)
        assert not verdict.stopped, step


# What honest robots do


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("late", [0, 1, 4])
@pytest.mark.parametrize("share", [1.0, 0.4, 0.15])
@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_an_honest_robot_is_believed(mode: str, late: int, share: float, noise: float) -> None:
    if mode == "measured" and share < 1 and late > 1:
        pytest.skip("a robot that adds to where it is, late, does not get anywhere")
    guard, rng = guard_of(*pair(mode)), np.random.default_rng(0)
    body = Body(guard, [0.0, 0.0], late, share)
    assert play(guard, body, waving(0.6, 2), lambda s, _: s + rng.normal(0, 1, 2) * noise, 200) == 200, guard.reason


@pytest.mark.parametrize("mode", MODES)
def test_a_robot_at_rest_may_say_the_same_for_ever(mode: str) -> None:
    guard = guard_of(MODES[mode])
    assert play(guard, Body(guard, [0.3]), resting(), steps=600) == 600


@pytest.mark.parametrize("mode", MODES)
def test_commands_too_small_for_a_servo_are_no_lead(mode: str) -> None:
    guard, rng = guard_of(MODES[mode]), np.random.default_rng(0)
    guard.start(at(0.3))
    for _ in range(600):
        verdict = guard.step(told(guard, rng.normal(0, 0.02, 1), Body(guard, [0.3])), at(0.3), DT)
        assert not verdict.stopped, guard.reason


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("speed", [0.4, 0.7])  # 0.7 m/s: 0.2 m from state to state, where one step explains 0.15
def test_states_that_come_at_a_third_of_the_rate(mode: str, speed: float) -> None:
    guard, seen = guard_of(MODES[mode], hz=20.0), list[np.ndarray]()
    body = Body(guard, [0.0])

    def sensor(state: np.ndarray, step: int) -> np.ndarray:
        if step % 3 == 0:
            seen.append(state)
        return seen[-1]

    assert play(guard, body, waving(speed), sensor, 300) == 300, guard.reason


@pytest.mark.parametrize("mode", MODES)
def test_the_command_of_a_long_step_may_be_followed_at_once(mode: str) -> None:
    guard = guard_of(MODES[mode])
    guard.start(at(0.0))
    where = 0.0
    for dt in (*[DT] * 10, 2 * DT, DT, DT):
        command = {"absolute": where + dt, "velocity": 1.0}.get(mode, dt)  # at 1 m/s, the velocity limit
        sent = guard.step(at(command), at(where), dt).command
        assert sent is not None
        moved = {"absolute": sent[0] - where, "velocity": sent[0] * dt}.get(mode, sent[0])
        where += moved
    assert moved == pytest.approx(DT)
    assert not guard.stopped, guard.reason  # 0.2 m within 0.1 s, where the velocity limit and jitter explain 0.15


def test_a_gripper_on_an_object_is_no_lie() -> None:
    gripper = replace(GRIPPER, rest=None, state="width", velocity=None)
    guard = guard_of(ABSOLUTE, gripper)
    guard.start(at(0.0, 1.0))
    for _ in range(500):
        assert not guard.step(at(0.0, 0.0), at(0.0, 0.4), DT).stopped


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(sorted(MODES)), st.integers(0, 3), st.floats(0.3, 1.0), st.floats(0, 0.005), st.integers(0, 2**32)
)
def test_random_honest_robots_are_believed(mode: str, late: int, share: float, noise: float, seed: int) -> None:
    guard, rng = guard_of(*pair(mode)), np.random.default_rng(seed)
    late = min(late, 1) if mode == "measured" else late
    body = Body(guard, rng.uniform(-1, 1, 2), late, share)

    def wandering() -> Iterator[np.ndarray]:
        speed = np.zeros(2)
        while True:
            speed = np.clip(speed + rng.normal(0, 0.1, 2), -0.8, 0.8)
            yield speed

    stopped = play(guard, body, wandering(), lambda s, _: s + rng.uniform(-noise, noise, 2), 300)
    assert stopped == 300, guard.reason


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(sorted(MODES)), st.floats(0.05, 1.0), st.integers(0, 2**32))
def test_a_robot_whose_state_lies_never_gets_far(mode: str, speed: float, seed: int) -> None:
    """Whatever the state says instead: constant, noise about a constant, or another robot's."""
    guard, rng = guard_of(MODES[mode]), np.random.default_rng(seed)
    body = Body(guard, [0.0])
    size = rng.choice([0.0, 0.001, 0.005])
    stopped = play(guard, body, steady(speed), lambda s, i: np.zeros(1) + rng.uniform(-size, size, 1), 3000)
    assert stopped < 3000
    assert body.path[0] <= LEAD + 3 * speed * DT


# Commands


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("on", ["clamp", "hold", "stop"])
@pytest.mark.parametrize(
    ("command", "stops"),
    [
        (at(1e308), True),
        (at(-1.7e308), True),
        (at(1e151), True),
        (np.array([1e4000], np.longdouble), True),
        (np.array([3e38], np.float32), False),
        (np.array([np.inf], np.float16), True),
        (np.array([65504], np.float16), False),
    ],
)
def test_a_command_beyond_all_numbers_stops_without_a_warning(
    mode: str, on: Any, command: np.ndarray, stops: bool
) -> None:
    limits = {key: replace(getattr(MODES[mode], key), on=on) for key in ("position", "velocity", "acceleration")}
    guard = guard_of(replace(MODES[mode], **limits))
    guard.start(at(0.0))
    for dt in (DT, 1e-9):
        verdict = guard.step(command, at(0.0), dt)
        assert verdict.command is not None
        assert np.abs(verdict.command) <= 0.2 + 1e-8
    assert guard.stopped == (stops or on == "stop")
    assert guard.counts["fault", "stop"] == 0
    if stops:
        assert "in x" in str(guard.reason)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float64, np.longdouble])
def test_a_state_beyond_all_numbers_stops_without_a_warning(dtype: Any) -> None:
    cm = replace(MEASURED, unit="cm")
    profile = guard_of(cm).profile
    guard = Guard(profile, 10, action_of(profile), ["at_x"], ["m"])
    guard.start(at(0.0))
    assert guard.step(at(0.0), np.array([1.7e308], dtype), DT).stopped
    assert "in the state" in str(guard.reason)
