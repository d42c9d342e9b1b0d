"""No command that the guard emits ever breaks a limit: random robots, clocks and commands, checked from outside.

The checker knows nothing of the guard but what it sends. It follows the commands as a robot would, which is the ideal
one here: it is where it was told to be.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from guarded import guard_of
from hypothesis import given, settings
from hypothesis import strategies as st

from rlrc.runtime.safety.guard import Guard
from rlrc.runtime.safety.profile import Dimension, Limit, Position, Tracking, Workspace

ONS = st.sampled_from(["clamp", "clamp", "hold", "stop"])
SIZES = st.floats(-3, 3).map(lambda exponent: 10.0**exponent)
EXACT = 1e-12  # of the numbers in question, for what rounding does


@st.composite
def dimensions(draw: Any, index: int) -> Dimension:
    meaning = draw(st.sampled_from(["absolute", "delta", "velocity", "gripper"]))
    name, unit = f"d{index}", "m/s" if meaning == "velocity" else "m"
    low, width = draw(st.floats(-10, 10)), draw(SIZES)
    position = Position(low, low + width, "s", draw(ONS))
    velocity, acceleration = (Limit(draw(SIZES), "s", draw(ONS)) for _ in range(2))
    state, extra = f"at_{name}", {}
    if meaning == "gripper" and draw(st.booleans()):
        return Dimension(name, meaning, unit, position, rest=low + width / 2)
    if meaning == "delta":
        extra = {"base": draw(st.sampled_from(["command", "measured"]))}
    if meaning in ("delta", "velocity") and draw(st.integers(0, 3)) == 0:
        return Dimension(name, meaning, unit, None, velocity, acceleration, unbounded="s")
    if meaning == "absolute" and draw(st.booleans()):
        extra = {"tracking": Tracking(draw(SIZES), "s", draw(st.sampled_from(["hold", "stop"])))}
    return Dimension(name, meaning, unit, position, velocity, acceleration, state=state, **extra)


@st.composite
def guards(draw: Any) -> Guard:
    all_dimensions = [draw(dimensions(index)) for index in range(draw(st.integers(1, 6)))]
    boxed = [d for d in all_dimensions if d.meaning != "gripper" and d.position is not None]
    box = None
    if boxed and draw(st.booleans()):
        positions = [d.position for d in boxed if d.position is not None]
        third = [(p.high - p.low) / 3 for p in positions]
        low = tuple(p.low + t for p, t in zip(positions, third, strict=True))
        high = tuple(p.high + t for p, t in zip(positions, third, strict=True))
        box = Workspace(tuple(d.name for d in boxed), low, high, "s", draw(ONS))
    return guard_of(*all_dimensions, workspace=box, hz=draw(st.floats(1, 200)))


class Limits(NamedTuple):
    low: np.ndarray
    high: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray


def limits_of(guard: Guard) -> Limits:
    """What the profile says, read here once more."""
    profile, rows = guard.profile, []
    for dimension in profile.dimensions:
        low = [-math.inf] if dimension.position is None else [dimension.position.low]
        high = [math.inf] if dimension.position is None else [dimension.position.high]
        if profile.workspace is not None and dimension.name in profile.workspace.dimensions:
            axis = profile.workspace.dimensions.index(dimension.name)
            low.append(profile.workspace.low[axis])
            high.append(profile.workspace.high[axis])
        speeds = [math.inf if limit is None else limit.limit for limit in (dimension.velocity, dimension.acceleration)]
        rows.append((max(low), min(high), *speeds))
    return Limits(*np.array(rows).T)


class Robot:
    """Follows what is sent; ``position`` and ``velocity`` are those of the commands. Complains about broken limits."""

    def __init__(self, guard: Guard, rng: np.random.Generator) -> None:
        self.guard, self.limits = guard, limits_of(guard)
        self.free = np.isinf(self.limits.high)
        low, high = np.where(self.free, -1.0, self.limits.low), np.where(self.free, 1.0, self.limits.high)
        edge = rng.random(len(low))
        self.position = np.where(edge < 0.2, low, np.where(edge > 0.8, high, low + (high - low) * edge))
        for index, dimension in enumerate(guard.profile.dimensions):
            if dimension.rest is not None:
                self.position[index] = dimension.rest
        self.velocity = np.zeros(len(low))
        self.meanings = np.array([dimension.meaning for dimension in guard.profile.dimensions])
        self.sensed = [i for i, d in enumerate(guard.profile.dimensions) if d.state is not None]

    def pass_time(self, dt: float) -> None:
        """Velocities go on until the next command."""
        lasting = self.meanings == "velocity"
        self.position = np.where(lasting, self.position + self.velocity * dt, self.position)

    def measured(self) -> np.ndarray:
        return self.position[self.sensed]

    def obey(self, command: np.ndarray, dt: float) -> None:
        limits, moves = self.limits, self.meanings == "delta"
        assert np.isfinite(command).all()
        lasting = self.meanings == "velocity"
        moved = np.where(moves, self.position + command, np.where(lasting, self.position, command))
        velocity = np.where(lasting, command, (moved - self.position) / dt)
        rounding = EXACT * (1 + np.abs(moved) + np.abs(self.position))
        assert (np.abs(velocity) * dt <= limits.velocity * dt + rounding).all(), "velocity"
        change = np.abs(velocity - self.velocity) * dt
        assert (change <= limits.acceleration * dt * dt + rounding).all(), "acceleration"
        inside = (moved >= limits.low - rounding) & (moved <= limits.high + rounding)
        assert (inside | self.free).all(), "position or workspace"
        self.position, self.velocity = moved, np.where(self.free & ~lasting, velocity, velocity)


def commands(robot: Robot, rng: np.random.Generator, dt: float) -> np.ndarray:
    """One command: near the last, at a bound, anywhere, huge, or broken."""
    dim, limits, kind = len(robot.position), robot.limits, rng.random(len(robot.position))
    speed = np.minimum(limits.velocity, 1e4)
    near = robot.velocity + rng.normal(size=dim) * np.minimum(limits.acceleration, 1e6) * dt
    wanted = np.where(kind < 0.6, near, speed * rng.uniform(-1.5, 1.5, dim))
    bound = np.where(rng.random(dim) < 0.5, limits.low, limits.high)
    wanted = np.where((kind > 0.8) & ~robot.free, (bound - robot.position) / dt, wanted)
    wanted = np.where(kind > 0.97, rng.choice([1e300, -1e300, 1e12, 0.0], dim), wanted)
    target = np.where(robot.meanings == "delta", wanted * dt, robot.position + wanted * dt)
    values = np.where(robot.meanings == "velocity", wanted, target)
    if rng.random() < 0.003:
        values[rng.integers(dim)] = rng.choice([np.nan, np.inf, -np.inf])
    return values.astype(np.float32) if rng.random() < 0.3 and (np.abs(values) < 1e30).all() else values


def play(guard: Guard, seed: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    robot = Robot(guard, rng)
    guard.start(robot.measured())
    for _ in range(steps):
        dt = given = guard.longest * float(rng.choice([rng.uniform(0.3, 0.7), rng.uniform(1e-6, 1.0)]))
        if rng.random() < 0.002:
            given = float(rng.choice([0.0, -dt, np.nan, np.inf, 3 * guard.longest]))
            dt = given if 0 < given < math.inf else guard.period  # a clock that is broken counts as a period
        robot.pass_time(min(dt, guard.longest))
        if rng.random() < 0.05:
            verdict = guard.hold(robot.measured(), given)
        else:
            verdict = guard.step(commands(robot, rng, dt), robot.measured(), given)
            if not verdict.held and rng.random() < 0.05:  # it is too late to be sent by now
                guard.take_back()
                verdict = guard.hold(robot.measured(), given)
        assert verdict.command is not None
        robot.obey(verdict.command, dt)
        assert verdict.stopped == guard.stopped
        assert not verdict.stopped or verdict.held
        if guard.stopped and rng.random() < 0.2:
            guard.rearm("the test goes on")
    assert guard.counts["fault", "stop"] == 0


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(guards(), st.integers(0, 2**32))
def test_no_command_breaks_a_limit(guard: Guard, seed: int) -> None:
    play(guard, seed, 200)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, database=None)
@given(guards(), st.integers(0, 2**32))
def test_no_command_breaks_a_limit_in_a_million_steps(guard: Guard, seed: int) -> None:
    play(guard, seed, 2000)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(guards(), st.integers(0, 2**32))
def test_a_hold_comes_to_rest_within_the_time_that_braking_takes(guard: Guard, seed: int) -> None:
    rng = np.random.default_rng(seed)
    robot = Robot(guard, rng)
    guard.start(robot.measured())
    dt = guard.period
    for _ in range(30):
        robot.pass_time(dt)
        verdict = guard.step(commands(robot, rng, dt), robot.measured(), dt)
        assert verdict.command is not None
        robot.obey(verdict.command, dt)
    longest = min(float(np.max(np.abs(robot.velocity) / robot.limits.acceleration)), 2000 * dt)
    guard.stop("end")
    for _ in range(math.ceil(longest / dt) + 2):
        robot.pass_time(dt)
        verdict = guard.hold(robot.measured(), dt)
        assert verdict.command is not None
        robot.obey(verdict.command, dt)
    if longest < 2000 * dt:
        moving = robot.meanings != "absolute"
        still = np.where(moving & (robot.meanings != "gripper"), verdict.command, robot.velocity)
        assert (np.abs(still) <= EXACT * (1 + robot.limits.velocity.clip(max=1e6))).all()


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(guards(), st.integers(0, 2**32))
def test_velocity_and_acceleration_hold_wherever_the_robot_is_said_to_be(guard: Guard, seed: int) -> None:
    """A state that jumps about at random moves no command faster than allowed."""
    rng = np.random.default_rng(seed)
    robot = Robot(guard, rng)
    guard.start(robot.measured())
    velocity, last = np.zeros(len(robot.position)), robot.position
    moves, lasting = robot.meanings == "delta", robot.meanings == "velocity"
    for _ in range(200):
        dt = guard.longest * float(rng.uniform(1e-3, 1.0))
        lies = np.where(rng.random(len(last)) < 0.2, rng.normal(size=len(last)) * 100, last)
        verdict = guard.step(commands(robot, rng, dt), lies[robot.sensed], dt)
        assert verdict.command is not None
        told = np.where(moves, verdict.command / dt, np.where(lasting, verdict.command, (verdict.command - last) / dt))
        rounding = EXACT * (1 + np.abs(last)) / dt
        assert (np.abs(told) <= robot.limits.velocity + rounding).all()
        assert (np.abs(told - velocity) <= robot.limits.acceleration * dt + 2 * rounding + EXACT * np.abs(told)).all()
        velocity, last = told, np.where(moves | lasting, last, verdict.command)
        guard.rearm("the test goes on")
