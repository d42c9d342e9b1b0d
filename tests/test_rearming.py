"""Going on after a stop: never by itself, not while the cause persists, and from where the robot is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import pytest
from fake_loop import Arm, FakeInference, joints, loop

from rlrc.runtime.control.inference_process import Answer
from rlrc.runtime.control.rearming import BENCH_CALLS, REARM_KEY, OperatorRequest
from rlrc.runtime.control.stop_switch import StopSwitch


class Stopped:
    """An arm that is stopped at its fifth step and held; ``at`` has what happens at which step."""

    def __init__(self, steps: int = 40) -> None:
        self.switch, self.printed = StopSwitch(), list[str]()
        self.control, self.arm, self.inference, self.clock = loop(
            0, "replace", switch=self.switch, report=self.printed.append
        )
        assert self.control._rearming is not None
        self.rearming = self.control._rearming
        self.answers: list[Mapping[str, Any]] = []
        self.at: dict[int, Callable[[], Any]] = {5: lambda: self.switch.press("a key")}
        self.steps = steps

    def run(self) -> None:
        def over() -> bool:
            self.at.pop(self.control.telemetry.steps, lambda: None)()
            return False

        self.control.run(over, self.steps)

    def request(self, kind: Any = "rearm") -> None:
        self.rearming.request(OperatorRequest(kind, "the test", self.answers.append))

    @property
    def held(self) -> list[bool]:
        return list(self.control.telemetry.rows["held"])


def test_without_a_request_the_robot_is_held_for_ever() -> None:
    run = Stopped(60)
    run.run()
    assert len(run.held) == 60
    assert run.held == [False] * 5 + [True] * 55
    assert len(set(joints(run.arm)[10:])) == 1


def test_without_rearming_a_stop_ends_the_run() -> None:
    control, arm, _, _ = loop(0, "replace", stop_reason=lambda: "asked to stop" if len(arm.sent) > 4 else None)
    control.run(steps=60)
    assert 5 < control.telemetry.steps < 10


def test_a_request_goes_on_from_where_the_robot_is() -> None:
    run = Stopped(24)
    run.at[15] = run.request
    run.run()
    # Asked at the step after the request, answered at the next one, which plays the first action.
    assert run.held == [False] * 5 + [True] * 11 + [False] * 8
    moved = joints(run.arm)
    assert moved[16:] == pytest.approx([moved[15] + 0.01 * step for step in range(1, 9)])
    assert run.answers == [{}]
    acts = [(event.act, event.reason) for event in run.control.guard.events]
    assert ("rearm", "the test (was stopped: asked to stop: a key)") in acts
    assert not run.switch.stopped


def test_an_arm_that_was_moved_meanwhile_goes_on_from_there() -> None:
    run, follow = Stopped(24), Arm.command
    # Its drives are off while it is stopped, and somebody moves it by hand.
    run.arm.command = lambda action: None if run.control.guard.stopped else follow(run.arm, action)  # type: ignore[method-assign]
    run.at |= {13: lambda: setattr(run.arm, "joints", np.array([0.5, 0.5])), 15: run.request}
    run.run()
    assert run.answers == [{}]
    assert run.held[16:] == [False] * 8
    assert joints(run.arm)[-8:] == pytest.approx([0.5 + 0.01 * step for step in range(1, 9)])


def test_it_can_be_stopped_and_rearmed_again() -> None:
    run = Stopped(40)
    run.at |= {10: run.request, 20: lambda: run.switch.press("again"), 30: run.request}
    run.run()
    assert run.answers == [{}, {}]
    assert run.held[20:30] == [True] * 10
    assert run.held[32:] == [False] * 8


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("lost robot", "the arm does not answer"),
        ("missing camera", "no picture image.wrist"),
        ("repeated frame", "image.wrist has not changed"),
        ("silent robot", "the state is"),
    ],
)
def test_a_fault_of_the_arm_that_persists_refuses(fault: Any, reason: str) -> None:
    run, healthy = Stopped(40), cast(Any, "")
    run.at = {
        5: lambda: run.arm.break_down(fault),
        20: run.request,
        25: lambda: run.arm.break_down(healthy),
        30: run.request,
    }
    run.run()
    assert reason in run.answers[0]["error"]
    assert run.held[6:30] == [True] * 24
    assert run.answers[1:] == [{}]
    assert run.held[32:] == [False] * 8


def broken(run: Stopped, breaks: Callable[[np.ndarray], Any]) -> None:
    poll = run.inference.poll

    def poll_broken() -> Answer | None:
        answer = poll()
        if answer is not None and answer.actions is not None:
            breaks(answer.actions)
        return answer

    run.inference.poll = poll_broken  # type: ignore[method-assign]


@pytest.mark.parametrize(("value", "reason"), [(np.nan, "nan in shoulder"), (0.9, "velocity of shoulder")])
def test_a_policy_that_would_stop_it_again_refuses(value: float, reason: str) -> None:
    run, right = Stopped(40), FakeInference.poll
    run.at = {
        5: lambda: broken(run, lambda actions: actions.fill(value)),
        20: run.request,
        25: lambda: setattr(run.inference, "poll", lambda: right(run.inference)),
        30: run.request,
    }
    run.run()
    assert reason in str(run.answers[0]["error"])
    assert "would stop it again" in run.answers[0]["error"]
    assert run.held[8:30] == [True] * 22
    assert run.answers[1:] == [{}]
    assert max(joints(run.arm)) < 0.5


def test_inference_that_does_not_answer_refuses() -> None:
    run = Stopped(120)
    run.at |= {8: lambda: setattr(run.inference, "seconds", 1e6), 20: run.request}
    run.run()
    assert run.answers == [{"error": "inference has not answered for 5 s"}]
    assert all(run.held[5:])


def test_somebody_who_presses_stop_meanwhile_wins() -> None:
    run = Stopped(40)
    run.at |= {20: lambda: (run.request(), run.switch.press("the button"))}
    run.run()
    assert "expected no stop during the request" in run.answers[0]["error"]
    assert all(run.held[5:])


def test_a_source_that_is_lost_refuses_for_good() -> None:
    run = Stopped(40)
    run.at |= {5: lambda: run.switch._lose("the button"), 20: run.request, 30: run.request}
    run.run()
    assert ["lost the button" in answer["error"] for answer in run.answers] == [True, True]
    assert all(run.held[5:])


def test_requests_before_it_is_at_rest_and_two_at_once_are_refused() -> None:
    run = Stopped(40)
    run.at |= {3: run.request, 20: lambda: (run.request(), run.request())}
    run.run()
    assert "stopped and at rest, found it not" in run.answers[0]["error"]
    assert "one request at a time" in run.answers[1]["error"]
    assert run.answers[2:] == [{}]


def test_keys() -> None:
    run = Stopped(60)
    handle_keys = run.rearming.handle_keys
    found: list[bool] = []
    run.at |= {
        4: lambda: found.append(handle_keys(REARM_KEY)),  # while it moves any key stops
        10: lambda: found.append(handle_keys(REARM_KEY)),  # within a second: meant to stop
        30: lambda: found.append(handle_keys(b"r")),
        31: lambda: found.append(handle_keys(b"RR")),
        32: lambda: found.append(handle_keys(REARM_KEY)),
        40: lambda: run.switch.press("a key"),
        55: lambda: found.append(handle_keys(b"q")),
    }
    run.run()
    assert found == [False, False, False, False, True, True]
    assert run.held[34:40] == [False] * 6
    assert len(run.held) == 55  # q ends the run


def test_a_signal_ends_the_run_though_it_could_be_rearmed() -> None:
    run = Stopped(60)
    run.at = {5: lambda: run.switch._signal(2)}
    run.run()
    assert len(run.held) < 10
    assert run.switch.end_requested


def test_a_bench_while_it_stands() -> None:
    run = Stopped(90)
    run.at |= {10: lambda: run.request("bench"), 80: run.request}
    run.run()
    calls, spread = run.answers[0]["calls"], [run.answers[0][name] for name in ("p50_ms", "p99_ms", "max_ms")]
    assert calls == BENCH_CALLS
    assert spread == pytest.approx([0, 0, 0])  # what FakeInference says it took
    assert run.held == [True] * 55 + [False] * 9  # the last 64 steps
    assert run.answers[1:] == [{}]


def test_what_is_printed() -> None:
    run = Stopped(40)
    run.at |= {20: run.request}
    run.run()
    assert run.printed == ["stopped: asked to stop: a key; held until it is re-armed", "re-armed by the test"]
