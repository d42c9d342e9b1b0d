"""The control loop on a clock of our own: what is sent at which step, when inference is late, when the loop is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fake_loop import HZ, PERIOD, Arm, Clock, FakeInference, joints, loop

from rlrc.benchmarks.control import simulated_arm
from rlrc.errors import UserError
from rlrc.robots.robot import Sensed
from rlrc.runtime.control.chunks import Chunks
from rlrc.runtime.control.control_loop import ControlLoop, LoopHooks, LoopTiming
from rlrc.runtime.control.inference_process import Answer
from rlrc.runtime.control.planner import Planner
from rlrc.runtime.control.telemetry import Telemetry, summary
from rlrc.runtime.safety.guard import Guard


def test_synchronously_the_arm_is_held_during_inference() -> None:
    control, arm, inference, _ = loop(2, "synchronous", execute=3)
    control.run(steps=10)
    # The first chunk is waited for. When three steps of it have been played, asked about where the arm then is.
    assert joints(arm) == [0.01, 0.02, 0.03, 0.03, 0.03, 0.04, 0.05, 0.06, 0.06, 0.06]
    assert control.telemetry.rows["held"].tolist() == [False] * 3 + [True] * 2 + [False] * 3 + [True] * 2
    assert inference.starts == [0, 3, 6]


def test_a_late_chunk_is_joined_by_the_time_of_its_observation() -> None:
    control, arm, inference, _ = loop(2, "replace")
    control.run(steps=8)
    # The chunk asked for at step 0 is for the steps 0, 1, 2, ...: it comes before step 2, which gets its third action.
    # The next one is asked for at joint 0.02: 0.03 would be for step 2, so 0.05 is for step 4.
    assert joints(arm) == [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08]
    assert inference.starts == [0, 0, 2, 4, 6]
    assert control.telemetry.rows["chunk"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert control.telemetry.rows["place"].tolist() == [0, 1, 2, 3, 2, 3, 2, 3]


def test_an_action_that_is_too_late_is_never_sent() -> None:
    control, arm, _, _ = loop(simulated_arm.HORIZON + 2, "replace", patience=5.0)
    control.run(steps=24)
    # Asked at step 0, come at step 10: its eight actions have been played meanwhile, by the first chunk. The next one,
    # asked for at step 10, is about the arm that is held, and begins when it comes.
    assert joints(arm) == [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07] + [0.08] * 13 + [0.09, 0.1, 0.11, 0.12]
    assert control.telemetry.rows["held"].tolist() == [False] * 8 + [True] * 12 + [False] * 4
    assert not control.guard.stopped


def test_an_action_that_has_become_too_late_while_it_was_guarded_is_replaced_by_a_hold() -> None:
    control, arm, _, clock = loop(0, "replace", gap=3.0)
    step, seen = control.guard.step, list[Any]()

    def stuck(*arguments: Any) -> Any:
        seen.append(step(*arguments))
        clock.now += 1.01 * PERIOD if len(seen) == 4 else 0.0
        return seen[-1]

    control.guard.step = stuck  # type: ignore[assignment, method-assign]
    control.run(steps=4)
    rows = control.telemetry.rows
    assert rows["held"].tolist() == [False, False, False, True]
    assert not rows["late"].any()
    assert seen[-1].command.tolist() == pytest.approx([0.04, 0.04])
    # What the arm was told before, not where the action would have led: it is braked from 0.1 rad/s within the step.
    assert joints(arm) == [0.01, 0.02, 0.03, 0.03]


def test_the_time_since_a_hold_that_came_late_counts_from_that_hold() -> None:
    control, arm, _, clock = loop(0, "replace", gap=3.0)
    step, sense, spans = control.guard.step, arm.sense, list[float]()

    def stuck(command: Any, measured: Any, dt: float, age: float) -> Any:
        spans.append(dt)
        clock.now += 1.5 * PERIOD if len(spans) == 4 else 0.0
        return step(command, measured, dt, age)

    def slow() -> Any:
        sensed = sense()
        clock.now += 0.3 * PERIOD if len(spans) == 4 else 0.0
        return sensed

    control.guard.step, arm.sense = stuck, slow  # type: ignore[assignment, method-assign]
    control.run(steps=5)
    assert control.telemetry.rows["held"][3]
    assert spans == pytest.approx([PERIOD] * 4 + [0.3 * PERIOD])


def test_a_stop_between_two_steps_does_not_wait_for_the_next() -> None:
    pressed: list[float] = []

    def sleep(seconds: float) -> bool:
        """Pressed .3 of a period after the fourth step, and once more while that is dealt with."""
        early = len(arm.sent) == 4 or (len(arm.sent) == 5 and len(pressed) == 1)
        clock.sleep(0.3 * PERIOD if early else seconds)
        if early:
            pressed.append(clock.now)
        return early

    control, arm, _, clock = loop(0, "replace", stop_reason=lambda: "asked to stop" if pressed else None, sleep=sleep)
    control._await_rearming = lambda: True  # type: ignore[method-assign]
    control.run(steps=6)
    rows = control.telemetry.rows
    # The schedule goes on, and a second press brings no command forward.
    assert ((rows["sent"] - rows["sent"][0]) / PERIOD).round(3).tolist() == [0, 1, 2, 3, 3.3, 4, 5]
    assert rows["stopped"].tolist() == [False] * 4 + [True] * 3
    assert rows["step"].tolist() == [0, 1, 2, 3, 4, 4, 5]
    assert not rows["late"].any()
    assert control.guard.reason == "asked to stop"


def test_waking_without_a_stop_changes_nothing() -> None:
    woken = 0

    def sleep(seconds: float) -> bool:
        nonlocal woken
        woken += 1
        clock.sleep(seconds if woken % 2 else seconds / 2)
        return woken % 2 == 0

    control, _, _, clock = loop(0, "replace", sleep=sleep)
    control.run(steps=6)
    sent = control.telemetry.rows["sent"]
    assert ((sent - sent[0]) / PERIOD).round(3).tolist() == [0, 1, 2, 3, 4, 5]


def test_repeated_misses_stop() -> None:
    control, arm, _, _ = loop(simulated_arm.HORIZON + 2, "replace", patience=0.55)
    control.run(steps=24)
    assert control.guard.reason == "no action for 0.55 s"
    assert len(arm.sent) == 14  # the last action at step 7, a stop 0.6 s later; what is at rest is held once


def test_inference_that_hangs_stops() -> None:
    control, _, inference, _ = loop(0, "replace", patience=5.0, hung=0.35)
    poll = inference.poll

    def once() -> Answer | None:
        answer = poll()
        inference.seconds = 1e6
        return answer

    inference.poll = once  # type: ignore[method-assign]
    control.run(steps=24)
    assert control.guard.reason == "inference has not answered for 0.35 s"
    assert control.telemetry.steps == 5  # asked at step 0


def test_without_a_first_action_nothing_moves() -> None:
    control, arm, _, _ = loop(1000, "replace", first=0.35)
    control.run(steps=24)
    assert control.guard.reason == "no first action within 0.35 s"
    assert joints(arm) == [0]


def test_missed_steps_are_left_out_and_not_made_up_for() -> None:
    control, arm, _, clock = loop(0, "replace", gap=3.0)
    clock.delays[4] = 0.13  # step 4 would begin 0.13 s late, when step 5 is due: so that one is sent
    control.run(steps=8)
    rows = control.telemetry.rows
    assert rows["step"].tolist() == [0, 1, 2, 3, 5, 6, 7]
    assert rows["skipped"].tolist() == [0, 0, 0, 0, 1, 0, 0]
    assert np.diff([at for at, _ in arm.sent]).min() >= 0  # nothing in a burst
    assert summary(control.telemetry, PERIOD)["skipped_steps"] == 1


def test_a_chunk_is_requested_once_for_each_state() -> None:
    control, arm, inference, _ = loop(0, "replace", late=4.0)
    sense, kept = arm.sense, list[Sensed]()

    def slow() -> Sensed:
        """A new state at every third step; the robot repeats it in between."""
        kept.append(sense() if len(kept) % 3 == 0 else kept[-1])
        return kept[-1]

    arm.sense, arm.live_pictures = slow, False  # type: ignore[method-assign]
    control.run(steps=9)
    assert not control.guard.stopped
    # The first chunk, which the loop waits for, and one for each new state.
    assert len({sensed.stamp for sensed in kept}) == 4
    assert len(inference.starts) == 1 + 4


def test_a_stopped_robot_requests_no_chunk() -> None:
    control, arm, inference, _ = loop(0, "replace", stop_reason=lambda: "asked to stop" if len(arm.sent) > 4 else None)
    control._await_rearming = lambda: True  # type: ignore[method-assign]
    control.run(steps=12)
    assert control.telemetry.rows["stopped"].tolist() == [False] * 5 + [True] * 7
    assert len(inference.starts) == 1 + 5  # the first chunk, and one for each step before the stop


def test_a_chunk_goes_on_from_the_one_before() -> None:
    control, _, inference, _ = loop(2, "continue")
    control.run(steps=6)
    first, second, third = inference.continuations[:3]
    assert first is None
    assert (second.frozen, len(second.previous)) == (0, 8)  # no chunk has been late so far
    # Asked at step 2: what is left of the chunk of step 0, two steps of which will be gone when the answer comes.
    assert third.frozen == 2
    np.testing.assert_allclose(third.previous[:, 0], 0.01 * np.arange(3, 9), rtol=1e-5)


def test_a_command_that_breaks_a_limit_is_not_sent() -> None:
    control, arm, inference, _ = loop(0, "replace")
    poll = inference.poll

    def jumping() -> Answer | None:
        answer = poll()
        if answer is not None and answer.start > 3:
            assert answer.actions is not None
            answer.actions[:] += 0.9
        return answer

    inference.poll = jumping  # type: ignore[method-assign]
    control.run(steps=20)
    assert "velocity of shoulder" in str(control.guard.reason)
    assert max(joints(arm)) < 0.1


def test_the_summary_of_a_run() -> None:
    control, _, _, _ = loop(1, "replace")
    control.run(steps=20)
    found = summary(control.telemetry, PERIOD)
    assert (found["steps"], found["late_actions"], found["held_steps"], found["skipped_steps"]) == (20, 0, 0, 0)
    assert found["seconds"] == pytest.approx(2.0)
    assert found["hz"] == pytest.approx(HZ)
    assert found["inference_ms"]["p50"] == pytest.approx(100)
    assert found["jitter_ms_p99"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("hz", [0.5, 201, float("nan")])
def test_a_rate_that_is_none_is_refused(hz: float) -> None:
    with pytest.raises(UserError, match="expected a rate from 1 to 200 Hz"):
        LoopTiming(hz)


@pytest.mark.parametrize(
    ("given", "message"),
    [({"late": 0.0}, "some periods, found 0; give another --late"), ({"patience": -1.0}, "patience of 0 s or more")],
)
def test_waits_that_are_none_are_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LoopTiming(HZ, **given)


@pytest.mark.parametrize("method", ["sense", "command"])
def test_a_drivers_own_mistake_stops_the_arm(method: str) -> None:
    control, arm, _, _ = loop(0)

    def mistaken(*_: Any) -> Any:
        if len(arm.sent) == 5 and not control.guard.stopped:
            raise KeyError("wrist")
        return right(*_)

    right = getattr(arm, method)
    setattr(arm, method, mistaken)
    control.run(steps=20)
    assert control.guard.reason == "the driver failed: KeyError: 'wrist'"
    assert control.telemetry.rows["held"][-1]


def test_a_robot_that_never_answers_has_no_ages_to_sum_up() -> None:
    control, arm, _, _ = loop(0)
    control._begin()
    arm.break_down("lost robot")
    control._step(0, 100.0, 0)
    assert summary(control.telemetry, PERIOD)["age_ms"] is None


class BlindArm(Arm):
    """Tells nothing but its picture."""

    def _measure(self) -> Sensed:
        found = super()._measure()
        observation = {name: value for name, value in found.observation.items() if name != "state"}
        return found._replace(observation=observation, measured=None)


class FromNowhere(FakeInference):
    def ask(self, observation: Any, start: int, continuation: Any = None) -> None:
        super().ask({**observation, "state": np.zeros(2)}, start, continuation)


def test_a_policy_without_a_state_moves_by_what_nothing_measures() -> None:
    spec, clock, telemetry = simulated_arm.spec(), Clock(), Telemetry(64, 2)
    spec = replace(spec, state=None, action=replace(spec.action, meaning=("delta", "delta")))
    free: dict[str, Any] = {"meaning": "delta", "state": None, "position": None, "unbounded": "rig"}
    limits = replace(
        simulated_arm.profile(), dimensions=tuple(replace(one, **free) for one in simulated_arm.profile().dimensions)
    )
    guard, arm = Guard(limits, HZ, spec.action, (), ()), BlindArm(clock)
    planner = Planner(FromNowhere(clock, 0), Chunks("replace", simulated_arm.HORIZON, 8), spec)
    hooks = LoopHooks(clock=clock, sleep=clock.sleep)
    control = ControlLoop(arm, planner, guard, telemetry, spec, LoopTiming(HZ), hooks)
    control.run(steps=3)
    assert (guard.reason, joints(arm)) == (None, [0.01, 0.02, 0.03])
