"""The control loop on a clock that the test moves: every time below can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrc.envs import environment
from rlrc.errors import UserError
from rlrc.runtime.cli import run
from rlrc.runtime.control.episodes import PlayedEpisode, Rate, play_episode, summary
from rlrc.runtime.control.inference_process import Warmth


class World:
    """Clock, policy and environment in one: ``inference`` seconds a chunk, ``step`` seconds a step."""

    name, over = "world", False

    def __init__(
        self, inference: float = 0.0, step: float = 0.0, length: int = 7, success_at: int | None = None
    ) -> None:
        self.inference, self.step_seconds, self.length, self.success_at = inference, step, length, success_at
        self.hz, self.horizon = 0.0, length
        self.now, self.slept = 100.0, 0.0
        self.sent: list[tuple[float, float]] = []  # (time, action) of every step
        self.seen: list[int] = []  # the observation of every inference
        self.resets: list[int | None] = []
        self.forgotten = 0

    def rate(self, hz: float) -> Rate:
        return Rate(hz, clock=lambda: self.now, sleep=self._sleep)

    def _sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        self.slept += seconds

    def infer(self, observation: Any) -> Any:
        """Chunks of 3: observation n gives the actions n, n + 0.1, n + 0.2."""
        self.now += self.inference
        self.seen.append(observation["n"])
        return {"actions": np.array([[observation["n"] + i / 10] for i in range(3)], np.float32)}

    def reset(self, *, seed: int | None = None) -> Any:
        if seed is None:  # the policy's
            self.forgotten += 1
            return None
        self.resets.append(seed)
        self.sent = []
        return {"n": 0}, {}

    def advance(self, action: np.ndarray) -> bool:
        self.sent.append((self.now, float(action[0])))
        self.now += self.step_seconds
        return len(self.sent) == self.success_at

    def observe(self) -> Any:
        return {"n": len(self.sent)}

    def times(self) -> list[float]:
        return [round(time - 100.0, 6) for time, _ in self.sent]

    def actions(self) -> list[float]:
        return [round(action, 6) for _, action in self.sent]


def test_plays_whole_chunks() -> None:
    world: Any = World(length=7)
    episode = play_episode(world, world, 5, world.rate(0))
    assert world.seen == [0, 3, 6]
    assert world.actions() == [0, 0.1, 0.2, 3, 3.1, 3.2, 6]
    assert (episode.seed, episode.steps, episode.success, world.resets) == (5, 7, False, [5])
    assert world.forgotten == 1


def test_plays_the_part_of_a_chunk_that_is_asked_for() -> None:
    world: Any = World(length=5)
    play_episode(world, world, 0, world.rate(0), execute=2)
    assert world.seen == [0, 2, 4]
    assert world.actions() == [0, 0.1, 2, 2.1, 4]


@pytest.mark.parametrize("execute", [0, 4, -1])
def test_refuses_an_impossible_part(execute: int) -> None:
    world: Any = World()
    with pytest.raises(UserError, match=f"expected to execute 1 to 3 steps of a chunk, found {execute}"):
        play_episode(world, world, 0, world.rate(0), execute)
    assert world.sent == []


def test_keeps_its_rate_and_sends_at_once_what_inference_gives() -> None:
    # 20 Hz; an inference of 40 ms fits into the period of 50 ms and delays only its own step.
    world: Any = World(inference=0.04, step=0.005, length=5)
    episode = play_episode(world, world, 0, world.rate(20))
    assert world.times() == [0.04, 0.05, 0.10, 0.19, 0.20]
    assert episode.deadline_misses == 0
    np.testing.assert_allclose(episode.inference_ms, [40, 40])
    assert episode.seconds == pytest.approx(0.205)


def test_counts_a_miss_and_starts_its_schedule_anew() -> None:
    # An inference of 120 ms: its action comes 120 ms after it was due, then two follow 50 ms apart, not in a burst.
    world: Any = World(inference=0.12, length=6)
    episode = play_episode(world, world, 0, world.rate(20))
    assert world.times() == [0.12, 0.17, 0.22, 0.39, 0.44, 0.49]
    assert episode.deadline_misses == 2


def test_an_action_exactly_at_the_next_deadline_is_a_miss() -> None:
    world: Any = World(inference=0.25, length=1)
    assert play_episode(world, world, 0, world.rate(4)).deadline_misses == 1
    world = World(inference=0.2499, length=1)
    assert play_episode(world, world, 0, world.rate(4)).deadline_misses == 0


def test_a_slow_environment_makes_misses_too() -> None:
    # A step of 70 ms at 20 Hz: the second step is 20 ms late, the third 40 ms, the fourth 60 ms: one miss, then anew.
    world: Any = World(step=0.07, length=7)
    assert play_episode(world, world, 0, world.rate(20)).deadline_misses == 2
    assert world.times() == [0, 0.07, 0.14, 0.21, 0.28, 0.35, 0.42]


def test_as_fast_as_possible_never_sleeps_or_misses() -> None:
    world: Any = World(inference=3.0, step=0.5, length=4)
    episode = play_episode(world, world, 0, world.rate(0))
    assert (world.slept, episode.deadline_misses) == (0, 0)
    assert episode.seconds == pytest.approx(2 * 3.0 + 4 * 0.5)


def test_success_ends_the_episode() -> None:
    world: Any = World(success_at=4, length=9)
    episode = play_episode(world, world, 0, world.rate(20))
    assert (episode.success, episode.steps) == (True, 4)


def test_an_environment_may_end_the_episode_without_success(monkeypatch: pytest.MonkeyPatch) -> None:
    world: Any = World(length=9)
    monkeypatch.setattr(World, "over", property(lambda world: len(world.sent) == 4), raising=False)
    episode = play_episode(world, world, 0, world.rate(20))
    assert (episode.success, episode.steps) == (False, 4)


@pytest.mark.parametrize("hz", [-1.0, float("nan"), float("inf")])
def test_refuses_an_impossible_rate(hz: float) -> None:
    with pytest.raises(UserError, match="expected a control rate"):
        Rate(hz)


def test_real_time() -> None:
    import time

    world: Any = World(length=11)
    started = time.monotonic()
    episode = play_episode(world, world, 0, Rate(100))
    assert 0.1 <= time.monotonic() - started < 1  # 10 periods of 10 ms, and patience with a shared machine
    assert episode.seconds >= 0.1


def test_summary() -> None:
    episodes = [
        PlayedEpisode(0, True, 10, 1, 0.5, (1.0, 2.0, 3.0)),
        PlayedEpisode(1, False, 30, 2, 1.5, (4.0, 5.0)),
    ]
    totals = summary(episodes)
    assert totals["episodes"] == 2
    assert (totals["successes"], totals["steps"], totals["deadline_misses"], totals["inferences"]) == (1, 40, 3, 5)
    assert totals["achieved_hz"] == 20
    assert (totals["inference_ms_p50"], totals["inference_ms_p90"], totals["inference_ms_max"]) == (3, 4.6, 5)
    assert totals["inference_ms_p99"] == pytest.approx(4.96)


class FakeRobot(World):
    closed = False

    def close(self) -> None:
        self.closed = True


def test_run_closes_the_environment_when_something_fails(toy_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    robot = FakeRobot()  # its observations do not fit the policy
    monkeypatch.setattr(environment, "open_environment", lambda name, spec, mapping: robot)
    with pytest.raises(UserError, match=r"expected an observation with image\.corner4"):
        run.RunPolicy(toy_artifact, "fake", seed=3, hz=0).run()
    assert robot.closed
    assert robot.resets == [3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"env": "gazebo:pick"},
            "expected an environment metaworld:TASK, gym:ID or libero:SUITE/NUMBER, found 'gazebo",
        ),
        ({"env": "gym:"}, "expected an environment metaworld:TASK, gym:ID or libero:SUITE/NUMBER, found 'gym:'"),
        ({}, r"expected state of shape \(3,\), found \(7,\); .* \(found in metaworld:drawer-open-v3: use a policy"),
        ({"env_mapping": Path("x.toml")}, "expected no mapping file for metaworld:drawer-open-v3, found x.toml"),
        ({"episodes": 0}, "expected at least one episode, found 0"),
        ({"hz": -5.0}, "expected a rate from 1 to 200 Hz, found -5"),
        ({"steps": 0}, "expected at least one step, found 0"),
        ({"late": 0.0}, "give another --late"),
        ({"seed": -1}, "expected a seed of 0 or more, found -1"),
        ({"env": None}, "expected one of --env, --driver and --replay, found none"),
        ({"replay": Path("set")}, "expected one of --env, --driver and --replay, found --env and --replay"),
        (
            {"env": None, "replay": Path("set"), "strategy": "synchronous"},
            "expected a strategy that does not wait, since a recording does not, found synchronous",
        ),
        (
            {"hz": 0.0, "log": Path("/tmp/never/log.jsonl")},
            "expected --env without --record, --log, --port and --rearm at --hz 0",
        ),
        (
            {"env": None, "driver": "nowhere:robot", "profile": "ur5e"},
            "expected a driver MODULE:FUNCTION, found nowhere",
        ),
    ],
)
def test_run_refuses(toy_artifact: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run.RunPolicy(toy_artifact, **{"env": "metaworld:drawer-open-v3"} | arguments).run()


def test_run_on_the_simulator(metaworld_toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.RunPolicy(metaworld_toy, "metaworld:drawer-open-v3", hz=0, episodes=2, seed=3_000_000, json=True).run()
    printed = json.loads(capsys.readouterr().out)
    assert [episode["seed"] for episode in printed["played"]] == [3_000_000, 3_000_001]
    assert printed["episodes"] == 2
    assert printed["inferences"] == sum(-(-episode["steps"] // 3) for episode in printed["played"])


@pytest.mark.parametrize("stable", [True, False])
def test_warming_up_is_said_as_milliseconds_first(stable: bool) -> None:
    text = str(Warmth(first_ms=12.34, calls=60, median_ms=5.56, stable=stable))
    changing = "" if stable else ", still changing after 1 s of warming up"
    assert text == f"5.6 ms an action after 60 calls (the first took 12.3 ms){changing}"
