"""Episodes, which of them are played, and what of them reaches the table.

Simulator and policy are clockworks, except in the last test.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rlrc.artifact import CameraSpec, NormStats, StateSpec
from rlrc.benchmarks.measure import success
from rlrc.benchmarks.measure.success import Scenes, ScoredEpisode
from rlrc.benchmarks.report.film import before_and_after, film_strip
from rlrc.benchmarks.results.results import open_artifacts
from rlrc.errors import UserError
from rlrc.runtime.cli import main


class Counter:
    """An environment that succeeds when the actions add up to ``goal``; its picture tells how many steps were made."""

    name, horizon = "count", 40

    def __init__(self, goal: float) -> None:
        self.goal = goal

    def reset(self, seed: int) -> tuple[dict[str, Any], dict]:
        self.seed, self.steps, self.sum = seed, 0, 0.0
        return self.observe(), {}

    def advance(self, action: np.ndarray) -> bool:
        self.steps, self.sum = self.steps + 1, self.sum + float(action[0])
        return self.sum >= self.goal

    @property
    def over(self) -> bool:
        return self.sum >= self.goal

    def observe(self) -> dict[str, Any]:
        return {"image.camera": np.full((2, 2, 3), self.steps, np.uint8), "state": np.zeros(1)}


class Adder:
    """Chunks of four times the same action; counts how often it was asked and reset."""

    def __init__(self, amount: float) -> None:
        self.amount, self.asked, self.resets = amount, 0, 0

    def infer(self, observation: Any) -> Any:
        self.asked += 1
        return {"actions": np.full((4, 1), self.amount)}

    def reset(self) -> None:
        self.resets += 1


@pytest.mark.parametrize(
    ("amount", "outcome", "steps", "asked"),
    # A goal of 6: within the second chunk; never (the horizon of 10 ends the third chunk early); at once.
    [(1.0, True, 6, 2), (0.1, False, 10, 3), (9.0, True, 1, 1)],
)
def test_chunks_are_executed_to_the_end_or_to_success(amount: float, outcome: bool, steps: int, asked: int) -> None:
    policy: Any = Adder(amount)
    environment: Any = Counter(6.0)
    assert success.play(policy, environment, 7, 10) == ScoredEpisode("count", 7, outcome, steps)
    assert (policy.asked, policy.resets, environment.seed) == (asked, 1, 7)


def test_an_environment_may_end_the_episode_without_success(monkeypatch: pytest.MonkeyPatch) -> None:
    policy: Any = Adder(0.1)
    environment: Any = Counter(6.0)
    monkeypatch.setattr(Counter, "over", property(lambda counter: counter.steps == 6))
    assert success.play(policy, environment, 7) == ScoredEpisode("count", 7, False, 6)
    monkeypatch.setattr(Counter, "over", False)
    assert success.play(policy, environment, 7) == ScoredEpisode("count", 7, False, 40)  # the environment's own horizon


def test_film_strip_holds_the_first_and_the_last_picture() -> None:
    policy: Any = Adder(0.5)
    environment: Any = Counter(6.0)
    strip = film_strip("adder", policy, environment, 3, frames=3, horizon=40)
    assert strip.episode.success
    assert strip.steps == (0, 8, 12)  # seen at 0, 4, 8 and 12
    assert strip.frames[:, 0, 0, 0].tolist() == [0, 8, 12]


def test_film_shows_the_scene_that_recovery_solved() -> None:
    weak: Any = Adder(0.1)
    strong: Any = Adder(1.0)
    environment: Any = Counter(6.0)
    strips, caption = before_and_after(("pruned", weak), ("compressed", strong), environment, range(5, 9), horizon=12)
    assert [strip.episode.success for strip in strips] == [False, True]
    assert "seed 5: the first scene, out of 1 tried, in which pruned fails and compressed succeeds" in caption
    _, caption = before_and_after(("a", strong), ("b", strong), environment, range(5, 9), horizon=12)
    assert "in none" in caption


def test_rates_by_hand() -> None:
    scenes = Scenes({"open": 2, "close": 2}, 100, 200)
    episodes = [ScoredEpisode("open", 100, True, 40), ScoredEpisode("open", 101, False, 200)]
    episodes += [ScoredEpisode("close", 100, True, 20), ScoredEpisode("close", 101, True, 30)]
    row = success.row(episodes, scenes, {"open"})
    assert (row["success"], row["episodes"], row["steps"]) == (0.75, 4, 30.0)
    assert row["interval"] == pytest.approx([0.3006, 0.9544], abs=5e-5)  # Wilson, 3 of 4
    assert (row["hard"]["success"], row["hard"]["episodes"]) == (0.5, 2)
    assert row["per_task"]["close"]["success"] == 1.0
    assert row["outcomes"] == {"open": "10", "close": "11"}


def test_comparison_counts_scenes_that_only_one_solved() -> None:
    scenes = {"first_seed": 0, "horizon": 200}
    ours = {"name": "a", "scenes": scenes, "outcomes": {"open": "1101", "close": "0111"}}
    theirs = {"name": "b", "scenes": scenes, "outcomes": {"open": "0111", "close": "0110"}}
    compared = success.compare(ours, theirs)
    assert (compared["pairs"], compared["only"], compared["only_baseline"]) == (8, 2, 1)
    assert compared["difference"] == pytest.approx(1 / 8)
    assert compared["mcnemar_p"] == 1.0
    for other in ({**theirs, "scenes": {**scenes, "first_seed": 1}}, {**theirs, "outcomes": {"open": "0111"}}):
        with pytest.raises(UserError, match="the same scenes"):
            success.compare(ours, other)


SCENES = Scenes({"open": 12, "close": 12}, 500, 200)


def fake_workers(jobs_seen: list[success.Job], fail_after: int | None = None) -> Callable[..., Any]:
    """In place of processes: the episodes of seed s succeed where s is even."""

    def run(function: Any, jobs: Any, silence_s: float) -> Iterator[Any]:
        for number, job in enumerate(jobs):
            if number == fail_after:
                raise KeyboardInterrupt
            jobs_seen.append(job)
            yield job, [ScoredEpisode(job.task, seed, seed % 2 == 0, 9) for seed in job.seeds]

    return lambda number: nullcontext(SimpleNamespace(run=run))


def test_an_interrupted_run_goes_on_where_it_stopped(
    toy_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_artifacts([f"a={toy_artifact}", f"b={toy_artifact}"])
    partial = tmp_path / "kept.jsonl"
    first: list[success.Job] = []
    monkeypatch.setattr(success, "WorkerPool", fake_workers(first, fail_after=3))
    with pytest.raises(KeyboardInterrupt):
        success.measure(opened, SCENES, partial=partial)
    with partial.open("a") as stream:
        stream.write('["a", {"task": "open", "se')  # as a kill in the middle of a line leaves it

    second: list[success.Job] = []
    ticks: list[int] = []
    monkeypatch.setattr(success, "WorkerPool", fake_workers(second))
    played = success.measure(opened, SCENES, partial=partial, tick=ticks.append)
    assert ticks[0] == 12  # 5 + 5 + 2 of the first task
    done = [(job.name, job.task, seed) for job in first + second for seed in job.seeds]
    assert len(done) == len(set(done)) == 48
    assert [episode.seed for episode in played["b"]] == [*range(500, 512)] * 2
    assert sum(episode.success for episode in played["a"]) == 12

    other = replace(SCENES, episodes={"open": 12, "close": 6})
    with pytest.raises(UserError, match="found another run's"):
        success.measure(opened, other, partial=partial)


def test_scenes_are_those_kept_for_evaluation() -> None:
    from rlrc.envs.metaworld import HORIZON, TASKS
    from rlrc.envs.seeds import EVALUATION

    assert success.scenes(["metaworld:drawer-open-v3", "drawer-open-v3"], 3) == Scenes(
        {"drawer-open-v3": 3}, EVALUATION.start, HORIZON
    )
    assert list(success.scenes().episodes) == list(TASKS)
    with pytest.raises(UserError, match="expected a task"):
        success.scenes(["no-task"])
    for per_task in (0, len(EVALUATION) // 2 + 1):
        with pytest.raises(UserError, match=f"expected 1 to 50000 episodes a task, found {per_task}"):
            success.scenes(per_task=per_task)


def test_a_task_counts_alike_with_and_without_a_shared_variant(
    toy_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The button has none: of 40 a task it is played 80 times, as each drawer, window and faucet in both variants."""
    scenes = success.scenes(per_task=40)
    by_task: dict[str, int] = defaultdict(int)
    for name, episodes in scenes.episodes.items():
        by_task[name.removesuffix("/shared")] += episodes
    assert scenes.episodes["button-press-topdown-v3"] == 80
    assert scenes.episodes["drawer-open-v3"] == scenes.episodes["drawer-open-v3/shared"] == 40
    assert list(by_task.values()) == [80] * 7
    assert success.scenes(["button-press-topdown-v3"], 40).episodes == {"button-press-topdown-v3": 40}  # as asked for

    # Both policies see the same scenes, every seed once, and each scene counts where it was played.
    scenes = success.scenes(per_task=3)
    monkeypatch.setattr(success, "WorkerPool", fake_workers([]))
    opened = open_artifacts([f"a={toy_artifact}", f"b={toy_artifact}"])
    rows = {name: success.row(played, scenes, ()) for name, played in success.measure(opened, scenes).items()}
    for row in rows.values():
        assert list(row["per_task"]) == list(scenes.episodes)
        assert {task: rate["episodes"] for task, rate in row["per_task"].items()} == scenes.episodes
        assert row["outcomes"]["button-press-topdown-v3"] == "101010"
        assert row["outcomes"]["faucet-open-v3/shared"] == "101"
        assert row["episodes"] == 42
    assert success.same_scenes(rows["a"], rows["b"])
    assert success.compare({"name": "a"} | rows["a"], {"name": "b"} | rows["b"])["pairs"] == 42


def test_command_plays_on_the_simulator(
    tiny_manifest: Any, make_toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A random policy on two scenes of one task, with real processes, pictures and graphs."""
    from rlrc.envs.metaworld import HORIZON, STATE_NAMES, STATE_UNITS
    from rlrc.envs.render import CAMERA

    state = StateSpec(STATE_NAMES, STATE_UNITS, NormStats((0.0,) * 7, (1.0,) * 7, clip=5.0))
    camera = CameraSpec(CAMERA, 32, 32, "none", (0.5,) * 3, (0.25,) * 3, "HWC")
    spec = replace(tiny_manifest.policy, state=state, cameras=(camera,))
    artifact = make_toy(tmp_path / "artifact", spec)
    out = tmp_path / "success.json"
    short = success.scenes(["drawer-close-v3"], 2, horizon=9)
    monkeypatch.setattr(success, "scenes", lambda *_: short)
    command = ["bench", "success", str(artifact), "--workers", "1", "--out", str(out), "--json"]
    assert main(command) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["episodes"] == 2
    assert row["scenes"] == {"first_seed": short.first_seed, "horizon": 9}
    assert HORIZON == 200
    assert [path.name for path in tmp_path.glob("success*")] == ["success.json"]  # the kept episodes are gone
