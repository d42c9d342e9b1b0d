"""The guard, with numbers worked out by hand: A = 2 m/s^2, V = 1 m/s, ten steps a second, so 0.2 m/s more a step."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import guarded
import numpy as np
import pytest
from guarded import GRIPPER, action_of, at, guard_of

from rlrc.errors import UserError
from rlrc.runtime.safety import braking
from rlrc.runtime.safety.guard import KEPT, Guard
from rlrc.runtime.safety.profile import Limit, Position, RobotProfile, Tracking, Workspace

DT = 0.1
# Most robots here stay where they were, whatever they are told (tests/test_plausibility.py has others).
ABSOLUTE, DELTA, VELOCITY = (
    replace(dimension, lead=Tracking(1e3, "s")) for dimension in (guarded.ABSOLUTE, guarded.DELTA, guarded.VELOCITY)
)
NEAR = Position(-1.0, 1.0, "s")


def started(*dimensions: Any, where: float = 0.0, **keys: Any) -> Guard:
    guard = guard_of(*dimensions, **keys)
    guard.start(at(*[where for d in dimensions if d.state is not None]))
    return guard


def play(guard: Guard, *commands: float, where: float = 0.0, dt: float = DT) -> list[float]:
    sent = [guard.step(at(command), at(where), dt).command for command in commands]
    return [round(float(command[0]), 9) for command in sent if command is not None]


def rest(guard: Guard, steps: int, where: float = 0.0) -> list[float]:
    sent = [guard.hold(at(where), DT).command for _ in range(steps)]
    return [round(float(command[0]), 9) for command in sent if command is not None]


def kinds(guard: Guard) -> list[tuple[str, str]]:
    return [(event.kind, event.act) for event in guard.events if event.kind != "start"]


def test_what_keeps_the_limits_goes_through_unchanged() -> None:
    guard = started(ABSOLUTE)
    for value in (0.01, 0.025, 0.045, 0.055, 0.05):
        command = np.array([value], np.float32)
        verdict = guard.step(command, at(0.0), DT)
        assert verdict.command is not None
        assert verdict.command.dtype == np.float64
        assert verdict.command[0] == command[0]  # to the last bit
        assert (verdict.held, verdict.stopped) == (False, False)
    assert kinds(guard) == []


def test_a_far_target_is_approached_within_velocity_and_acceleration() -> None:
    # v = .2, .4, .6, .8, 1, 1 m/s
    guard = started(ABSOLUTE)
    assert play(guard, *[50.0] * 6) == [0.02, 0.06, 0.12, 0.2, 0.3, 0.4]
    assert kinds(guard)[:2] == [("velocity", "clamp"), ("acceleration", "clamp")]
    assert guard.events[1].dimension == "x"
    assert guard.events[1].found == pytest.approx(500)
    assert guard.events[1].limit == 1


def test_limits_are_per_second() -> None:
    # Steps of half the time: half the acceleration a step, and a quarter of the way.
    assert play(started(ABSOLUTE), 50.0, 50.0, dt=0.05) == [0.005, 0.015]
    assert play(started(DELTA), 50.0, 50.0, dt=0.05) == [0.005, 0.01]
    assert play(started(VELOCITY), 50.0, 50.0, dt=0.05) == [0.1, 0.2]


def test_a_target_is_not_run_past() -> None:
    # Full speed is reached after .3 m, and then v^2 / 2A = .25 m are needed to stop: without that it would reach .75.
    guard = started(ABSOLUTE)
    sent = play(guard, *[0.5] * 40)
    assert max(sent) < 0.5 + 2 * DT**2  # within what one step of acceleration makes
    assert sent[-1] == 0.5


def test_a_target_that_moves_on_is_followed_at_full_speed() -> None:
    # A hundredth faster than allowed: the guard falls behind by that hundredth of the way, and not by more.
    guard = started(ABSOLUTE)
    assert play(guard, 0.02, 0.06, 0.12, 0.2, 0.3) == [0.02, 0.06, 0.12, 0.2, 0.3]
    assert play(guard, *[0.3 + 0.101 * step for step in range(1, 11)])[-1] == 1.3


def test_near_a_bound_there_is_room_to_stop() -> None:
    # .35 m before the bound, 1 m/s is the most: .1 m in this step, then v^2 / 2A = .25 m.
    limits = guard_of(replace(ABSOLUTE, position=NEAR)).limits
    np.testing.assert_allclose(braking.highest_velocity(at(0.35), limits, DT), 1.0)
    lowest, highest = braking.velocity_range(at(0.65), at(1.0), limits, DT)
    np.testing.assert_allclose((lowest[0], highest[0]), (0.8, 1.0))
    # .25 m before it, full speed is just still allowed to have been; now it is braking and little else.
    lowest, highest = braking.velocity_range(at(0.75), at(1.0), limits, DT)
    np.testing.assert_allclose((lowest[0], highest[0]), (0.8, 0.5 / (0.1 + np.sqrt(0.01 + 0.25))))
    assert lowest[0] < highest[0]
    # Nearer than that, at that speed, it never gets on its own. If something else brings it there: brake.
    lowest, highest = braking.velocity_range(at(0.9), at(1.0), limits, DT)
    np.testing.assert_allclose((lowest[0], highest[0]), (0.8, 0.8))


def test_braking_is_an_event_of_its_own() -> None:
    # At .7 and 1 m/s, bound for .8: there .25 m would be needed and .2 m are left.
    guard = started(replace(ABSOLUTE, position=replace(NEAR, on="stop")))
    sent = play(guard, 0.02, 0.06, 0.12, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    assert sent[-2:] == [0.7, round(0.7 + 0.1 * 0.6 / (0.1 + np.sqrt(0.01 + 0.3)), 9)]
    assert kinds(guard) == [("braking", "clamp")]


def test_a_velocity_lasts_until_the_next_command() -> None:
    # Up to .2 s late: 1 m/s needs .2 + .25 m.
    limits = guard_of(replace(VELOCITY, position=NEAR)).limits
    assert braking.velocity_range(at(0.55), at(1.0), limits, DT)[1][0] == pytest.approx(1.0)
    assert braking.velocity_range(at(0.56), at(1.0), limits, DT)[1][0] < 0.99


def test_a_clamped_position_ends_at_the_bound() -> None:
    guard = started(replace(ABSOLUTE, position=NEAR))
    sent = play(guard, *[3.0] * 60)
    assert sent[-1] == 1.0
    assert max(sent) == 1.0
    assert guard.counts["position", "clamp"] == 60


def test_deltas_add_up_to_a_position() -> None:
    guard = started(replace(DELTA, position=NEAR), where=0.9)
    sent = play(guard, *[0.02] * 8, where=0.9)
    assert sum(sent) == pytest.approx(0.1)
    assert ("position", "clamp") in kinds(guard)


def test_a_delta_may_lead_on_from_where_the_robot_is() -> None:
    guard = started(replace(DELTA, base="measured", position=NEAR, jump=Tracking(1.0, "s")), where=0.9)
    assert play(guard, 0.02, 0.02, where=0.5) == [0.02, 0.02]
    assert play(guard, 0.02, where=1.0) == [0.0]  # 0 m from the bound: nothing is left but to stop
    assert kinds(guard) == [("position", "clamp")]


@pytest.mark.parametrize(
    ("dimension", "moving", "expected"),
    [
        (ABSOLUTE, [0.02, 0.06, 0.12, 0.2, 0.3], [0.38, 0.44, 0.48, 0.5, 0.5, 0.5]),
        (DELTA, [0.02, 0.04, 0.06, 0.08, 0.1], [0.08, 0.06, 0.04, 0.02, 0.0, 0.0]),
        (VELOCITY, [0.2, 0.4, 0.6, 0.8, 1.0], [0.8, 0.6, 0.4, 0.2, 0.0, 0.0]),
    ],
)
def test_a_hold_comes_to_rest_and_stays(dimension: Any, moving: list[float], expected: list[float]) -> None:
    guard = started(dimension)
    assert play(guard, *moving) == moving
    assert rest(guard, 6) == expected
    assert not guard.stopped
    onwards = 0.52 if dimension is ABSOLUTE else moving[0]
    assert play(guard, onwards) == [onwards]


def test_a_gripper_jumps_and_keeps() -> None:
    guard = started(GRIPPER)
    assert guard.hold(at(), DT).command == 1.0  # what it rests at until it is told something
    assert [guard.step(at(value), at(), DT).command for value in (0.0, 1.0, 0.25)] == [0.0, 1.0, 0.25]
    assert guard.hold(at(), DT).command == 0.25
    guard.start(at())
    assert guard.hold(at(), DT).command == 0.25  # what it grips is not dropped
    assert guard.step(at(1.5), at(), DT).command == 1.0
    assert kinds(guard) == [("position", "clamp")]


def test_a_stop_latches_until_it_is_rearmed() -> None:
    guard = started(ABSOLUTE)
    play(guard, 0.02, 0.06, 0.12)
    guard.stop("someone came near")
    verdict = guard.step(at(0.2), at(0.0), DT)
    assert (verdict.held, verdict.stopped) == (True, True)
    assert [event.reason for event in verdict.events][-1] == "someone came near"
    assert play(guard, 0.2, 0.2, 0.2) == [0.18, 0.18, 0.18]  # .12 + .04, + .02, + 0
    guard.stop("again")  # keeps the first reason
    assert guard.reason == "someone came near"
    guard.rearm("all clear")
    assert play(guard, 0.19) == [0.19]  # on from what was held
    assert kinds(guard) == [("stop", "stop"), ("rearm", "rearm")]
    assert guard.events[-1].reason == "all clear (was stopped: someone came near)"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (at(np.nan), "nan in x"),
        (at(np.inf), "inf in x"),
        (at(-np.inf), "-inf in x"),
        (at(0.0, 0.0), "float64 (2,), expected floats (1,)"),
        (np.zeros((1, 1)), "float64 (1, 1)"),
        (np.zeros(1, np.int64), "int64 (1,)"),
        (np.zeros(1, object), "object (1,)"),
        ([0.0], "list, expected floats"),
        (None, "NoneType, expected floats"),
    ],
)
def test_a_broken_command_stops(command: Any, reason: str) -> None:
    guard = started(ABSOLUTE)
    play(guard, 0.02, 0.06)
    verdict = guard.step(command, at(0.0), DT)
    assert verdict.stopped
    assert verdict.command == pytest.approx(0.08)  # .4 m/s becomes .2
    assert (guard.events[-1].kind, guard.events[-1].act) == ("command", "stop")
    assert reason in str(guard.reason)
    assert play(guard, 0.0, 0.0) == [0.08, 0.08]


def test_one_broken_dimension_stops_all() -> None:
    guard = started(ABSOLUTE, replace(ABSOLUTE, name="y", state="at_y"))
    verdict = guard.step(at(0.01, np.nan), at(0.0, 0.0), DT)
    assert verdict.stopped
    np.testing.assert_array_equal(verdict.command, [0.0, 0.0])


@pytest.mark.parametrize("dt", [0.0, -0.1, np.nan, np.inf, 0.21, None, "0.1"])
def test_a_clock_that_stands_or_jumps_stops(dt: Any) -> None:
    guard = started(ABSOLUTE)
    verdict = guard.step(at(0.01), at(0.0), dt)
    assert verdict.stopped
    assert verdict.command == 0.0
    assert guard.events[-1].kind == "clock"


@pytest.mark.parametrize(
    ("measured", "age"),
    [
        (None, 0.0),
        (at(np.nan), 0.0),
        (at(np.inf), 0.0),
        (at(0.0, 0.0), 0.0),
        (np.zeros(1, np.int64), 0.0),
        ([0.0], 0.0),
        (at(0.0), 0.21),
        (at(0.0), -0.01),
        (at(0.0), np.nan),
        (at(0.0), None),
    ],
)
@pytest.mark.parametrize("held", [False, True])
def test_a_state_that_is_missing_broken_or_old_stops(measured: Any, age: Any, held: bool) -> None:
    guard = started(ABSOLUTE)
    play(guard, 0.02)
    verdict = guard.hold(measured, DT, age) if held else guard.step(at(0.04), measured, DT, age)
    assert verdict.stopped
    assert verdict.command == 0.02
    assert guard.events[-1].kind == "measured"


def test_nothing_is_sent_before_the_start() -> None:
    guard = guard_of(ABSOLUTE)
    verdict = guard.step(at(0.0), at(0.0), DT)
    assert (verdict.command, verdict.held, verdict.stopped) == (None, True, True)
    with pytest.raises(UserError, match=r"expected a guard that is not stopped, found it stopped .*re-arm it first"):
        guard.start(at(0.0))
    guard.rearm("now it is ready")
    guard.start(at(0.0))
    assert play(guard, 0.01) == [0.01]


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (at(1.25), "found x at 1.25 m, beyond 1; move it there first"),
        (at(np.nan), "found nan in the state; check its sensors"),
        (None, "found no state"),
    ],
)
def test_a_start_outside_or_unknown_is_refused(measured: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        guard_of(replace(ABSOLUTE, position=NEAR)).start(measured)


def test_a_start_may_be_a_little_outside() -> None:
    guard = guard_of(replace(ABSOLUTE, position=replace(NEAR, slack=0.3)))
    guard.start(at(1.25))
    assert guard.hold(at(1.25), DT).command == 1.0


@pytest.mark.parametrize("kind", ["position", "velocity", "acceleration", "workspace"])
@pytest.mark.parametrize("on", ["hold", "stop"])
def test_each_limit_may_hold_or_stop(kind: str, on: Any) -> None:
    box = Workspace(("x",), (-1.0,), (1.0,), "s", on) if kind == "workspace" else None
    limits: dict[str, Any] = {
        "position": {"position": replace(NEAR, on=on)},
        "velocity": {"velocity": Limit(0.5, "s", on), "acceleration": Limit(100.0, "s")},
        "acceleration": {"acceleration": Limit(2.0, "s", on)},
    }
    where, target = (0.99, 1.001) if kind in ("position", "workspace") else (0.0, 0.08)
    guard = started(replace(ABSOLUTE, **limits.get(kind, {})), where=where, workspace=box)
    verdict = guard.step(at(target), at(where), DT)
    assert verdict.command == where
    assert verdict.held
    assert verdict.stopped == (on == "stop")
    assert kinds(guard) == [(kind, on)]
    assert guard.step(at(where - 0.01), at(where), DT).held == (on == "stop")


def test_a_hold_holds_all_dimensions() -> None:
    slow = replace(ABSOLUTE, name="y", state="at_y", velocity=Limit(0.5, "s", "hold"), acceleration=Limit(100.0, "s"))
    guard = started(ABSOLUTE, slow)
    verdict = guard.step(at(0.01, 0.1), at(0.0, 0.0), DT)
    np.testing.assert_array_equal(verdict.command, [0.0, 0.0])


def test_the_severest_of_several_counts() -> None:
    guard = started(replace(ABSOLUTE, position=replace(NEAR, on="stop"), velocity=Limit(1.0, "s", "hold")))
    assert guard.step(at(5.0), at(0.0), DT).stopped
    assert kinds(guard) == [("position", "stop"), ("velocity", "hold"), ("acceleration", "clamp")]
    assert guard.reason == "position of x: 5, limit 1 (m)"


def test_what_float32_adds_breaks_no_limit() -> None:
    bound = 2.8973
    assert float(np.float32(bound)) > bound
    guard = started(replace(ABSOLUTE, position=Position(-bound, bound, "s", "stop")), where=bound)
    verdict = guard.step(at(bound, dtype=np.float32), at(bound), DT)
    assert verdict.command == bound  # and still is not exceeded
    assert kinds(guard) == []


@pytest.mark.parametrize("on", ["hold", "stop"])
def test_a_robot_that_does_not_follow(on: Any) -> None:
    guard = started(replace(ABSOLUTE, tracking=Tracking(0.05, "s", on)))
    play(guard, 0.02, 0.04)
    assert guard.step(at(0.06), at(0.0), DT).events == ()  # .04 was told last
    verdict = guard.step(at(0.08), at(0.0), DT)  # .06
    assert verdict.held
    assert verdict.stopped == (on == "stop")
    assert kinds(guard) == [("tracking", on)]
    assert guard.events[-1].found == pytest.approx(0.06)


@pytest.mark.parametrize("on", ["clamp", "hold", "stop"])
def test_a_robot_that_is_outside(on: Any) -> None:
    guard = started(replace(ABSOLUTE, position=replace(NEAR, on=on, slack=0.1)), where=1.0)
    assert guard.step(at(1.0), at(1.1), DT).held is False
    verdict = guard.step(at(1.0), at(1.11), DT)
    assert (verdict.held, verdict.stopped) == (on != "clamp", on == "stop")
    assert kinds(guard) == ([] if on == "clamp" else [("position", on)])


def test_a_robot_outside_its_workspace() -> None:
    delta = replace(DELTA, base="measured", position=None, jump=Tracking(3.0, "s"))
    guard = started(delta, workspace=Workspace(("x",), (-1.0,), (1.0,), "s", slack=0.1))
    assert not guard.step(at(0.0), at(1.05), DT).held
    assert guard.step(at(0.01), at(1.05), DT).held  # outwards
    guard.rearm("back inwards")
    assert play(guard, -0.01, where=1.05) == [-0.01]
    assert not guard.stopped
    assert guard.step(at(-0.01), at(-1.2), DT).stopped
    assert guard.reason == "workspace of x: -1.2, limit -1 (m)"


def test_units_of_the_state_are_converted() -> None:
    profile = RobotProfile("r", {"s": "made up"}, (replace(ABSOLUTE, unit="cm"),))
    guard = Guard(profile, 10, action_of(profile), ["other", "at_x"], ["1", "m"])
    guard.start(at(7.0, 0.5))
    assert guard.hold(at(7.0, 0.5), DT).command == 50.0


def test_a_mistake_of_the_guard_stops_and_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = started(ABSOLUTE)
    play(guard, 0.02, 0.06)

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(braking, "velocity_range", broken)
    verdict = guard.step(at(0.1), at(0.0), DT)
    assert verdict.stopped
    assert verdict.command == pytest.approx(0.08)
    assert guard.reason == "ZeroDivisionError: oops"
    assert guard.events[-1].kind == "fault"
    monkeypatch.setattr(braking, "brake", broken)
    verdict = guard.step(at(0.1), at(0.0), DT)
    assert (verdict.command, verdict.held, verdict.stopped) == (None, True, True)


def test_the_caller_may_do_what_it_likes_with_a_command() -> None:
    guard = started(ABSOLUTE)
    command = guard.step(at(0.01), at(0.0), DT).command
    assert command is not None
    command[:] = 99
    assert rest(guard, 2) == [0.01, 0.01]


def test_an_event_says_what_happened() -> None:
    guard = started(ABSOLUTE)
    play(guard, 0.05)
    assert str(guard.events[-1]) == "step 1: clamp: acceleration of x: 5, limit 2"
    guard.stop("button")
    assert str(guard.events[-1]) == "step 1: stop: stop: button"


@pytest.mark.parametrize("hz", [0.0, -1.0, np.nan, np.inf])
def test_a_rate_that_is_none(hz: float) -> None:
    with pytest.raises(UserError, match="expected a control rate above 0 Hz"):
        guard_of(ABSOLUTE, hz=hz)


def test_position_and_workspace_must_overlap() -> None:
    with pytest.raises(UserError, match="expected position and workspace of x to overlap"):
        guard_of(replace(ABSOLUTE, position=NEAR), workspace=Workspace(("x",), (2.0,), (3.0,), "s"))


def test_memory_does_not_grow() -> None:
    guard = started(ABSOLUTE, replace(DELTA, name="d", state="at_d", lead=Tracking(1e9, "s")))
    for phase in range(2):
        if phase:
            tracemalloc.start()
        for step in range(2 * KEPT):  # every step breaks something, so that events are made
            guard.step(at(50.0 * (-1) ** step, 50.0), at(0.0, 0.0), DT)
        if not phase:
            continue
        before = tracemalloc.get_traced_memory()[0]
        for step in range(2 * KEPT):
            guard.step(at(50.0 * (-1) ** step, 50.0), at(0.0, 0.0), DT)
        assert tracemalloc.get_traced_memory()[0] - before < 100_000
        tracemalloc.stop()
    assert len(guard.events) == KEPT
