"""Vectorised episodes: reproducible, aligned with their labels, complete, and loud about a worker that dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from rlrc import artifact as artifacts
from rlrc.compressor.models import precision
from rlrc.compressor.models.tiny import TinyPolicy
from rlrc.compressor.rl import rollout as module
from rlrc.compressor.rl.demonstrations import Samples
from rlrc.compressor.rl.rollout import ActionSampler, Request, RolloutEpisode, Rollouts, SamplingMode, run_episodes
from rlrc.envs.experts import expert
from rlrc.envs.metaworld import TASKS, MetaWorldEnv, make
from rlrc.errors import UserError
from rlrc.runtime.inference.preprocess import bin_centers

OPEN, FAUCET = "drawer-open-v3/shared", "faucet-close-v3"


def some(number: int) -> list[Request]:
    return [Request((OPEN, FAUCET)[i % 2], 40 + i) for i in range(number)]


def same(a: RolloutEpisode, b: RolloutEpisode) -> bool:
    arrays = ("pictures", "state", "image_tokens", "sampled", "chunk")
    return (a.task, a.seed, a.success, a.steps) == (b.task, b.seed, b.success, b.steps) and all(
        len(getattr(a, name)) == len(getattr(b, name))
        and all(np.array_equal(x, y) for x, y in zip(getattr(a, name), getattr(b, name), strict=True))
        for name in arrays
    )


def test_reproducible_with_one_worker_and_with_two(
    pupil: TinyPolicy, rollouts: Rollouts, pupil_artifact: Path, tmp_path: Path
) -> None:
    """By argmax, whatever ran before in the same worker; what the expert does depends on no number of workers."""
    requests, mode = some(5), SamplingMode(keep="pictures", horizon=20)
    driven = [Request(request.task, request.seed, handover=0, noise=0.3) for request in requests]
    artifact = artifacts.load(pupil_artifact)
    with Rollouts(artifact.manifest, artifact.file("tokenizer/tokenizer.json"), tmp_path, workers=2) as pair:
        for pool in (rollouts, pair):
            first = pool.run(requests, pupil, mode)
            assert [(episode.task, episode.seed) for episode in first] == [(r.task, r.seed) for r in requests]
            assert {len(episode.sampled) for episode in first} == {4}
            assert len({episode.sampled[-1].tobytes() for episode in first}) > 1  # it looks at what it sees
            pool.run(some(3), pupil, SamplingMode(sample=True, horizon=10))
            assert all(same(a, b) for a, b in zip(first, pool.run(requests, pupil, mode), strict=True))
        by_one, by_two = (pool.run(driven, None, mode) for pool in (rollouts, pair))
        assert all(same(a, b) for a, b in zip(by_one, by_two, strict=True))
        assert pair.cpu_seconds > 0


def test_sampled_episodes_are_reproducible_and_differ_from_argmax(pupil: TinyPolicy, rollouts: Rollouts) -> None:
    requests, mode = some(3), SamplingMode(sample=True, correlation=0.8, keep="image_tokens", horizon=10)
    first, again = rollouts.run(requests, pupil, mode), rollouts.run(requests, pupil, mode)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    greedy = rollouts.run(requests, pupil, SamplingMode(keep="image_tokens", horizon=10))
    assert not any(np.array_equal(a.sampled[0], b.sampled[0]) for a, b in zip(first, greedy, strict=True))
    assert first[0].image_tokens[0].shape == (pupil.image_tokens, 64)
    assert first[0].image_tokens[0].dtype == np.float16
    np.testing.assert_array_equal(first[0].image_tokens[0], greedy[0].image_tokens[0])  # the same first picture


def in_process(
    requests: list[Request], pupil: TinyPolicy | None, rollouts: Rollouts, mode: SamplingMode
) -> dict[tuple[str, int], RolloutEpisode]:
    sampler = ActionSampler(pupil, rollouts.load_tokenizer(), mode) if pupil is not None else None
    return {(e.task, e.seed): e for e in run_episodes(requests, sampler, horizon=5, mode=mode, size=32)}


def test_the_policys_tokens_are_played(pupil: TinyPolicy, rollouts: Rollouts) -> None:
    """Replaying the recorded tokens in an environment of one's own gives the recorded states and pictures."""
    (episode,) = in_process([Request(FAUCET, 3)], pupil, rollouts, SamplingMode(keep="pictures", horizon=15)).values()
    env, centers = make(FAUCET, size=32), bin_centers(16)
    env.reset(seed=3)
    for picture, state, tokens in zip(episode.pictures, episode.state, episode.sampled, strict=True):
        np.testing.assert_array_equal(env.render(), picture)
        np.testing.assert_array_equal(env.state(), state)
        for action in centers[tokens]:
            env.advance(action)
    assert episode.steps == env.steps == 15


def test_expert_drives_from_the_handover_on(pupil: TinyPolicy, rollouts: Rollouts) -> None:
    """Labels begin there, are what is played (without noise), and are paired with their pictures in samples."""
    requests = [Request(OPEN, seed, handover) for seed, handover in ((1, 0), (2, 2), (3, None))]
    episodes = in_process(requests, pupil, rollouts, SamplingMode(keep="pictures"))
    assert [len(e.state) - len(e.chunk) for e in episodes.values() if e.seed < 3] == [0, 2]
    assert episodes[OPEN, 1].success
    assert episodes[OPEN, 1].steps < 200
    assert episodes[OPEN, 3].chunk == []

    driven, env = episodes[OPEN, 2], make(OPEN, size=32)
    env.reset(seed=2)
    act = expert(env.task)
    for decision, state in enumerate(driven.state):
        np.testing.assert_array_equal(env.state(), state)
        for k in range(5):
            if decision >= 2:
                np.testing.assert_array_equal(driven.chunk[decision - 2][k], act(env.full_observation))
            action = driven.chunk[decision - 2][k] if decision >= 2 else bin_centers(16)[driven.sampled[decision][k]]
            if env.advance(action):
                break
    assert env.success
    assert driven.success

    samples = Samples.of([driven, episodes[OPEN, 3]])  # the second has no labels: it gives no samples
    assert len(samples) == len(driven.chunk)
    np.testing.assert_array_equal(samples.pictures[0], driven.pictures[2])
    np.testing.assert_array_equal(samples.state, np.stack(driven.state[2:]))
    assert set(samples.task.tolist()) == {list(TASKS).index(OPEN)}


def test_labels_of_every_decision_do_not_disturb_the_policy(pupil: TinyPolicy, rollouts: Rollouts) -> None:
    (plain,) = in_process([Request(OPEN, 4)], pupil, rollouts, SamplingMode(keep="pictures", horizon=20)).values()
    (labelled,) = in_process(
        [Request(OPEN, 4)], pupil, rollouts, SamplingMode(keep="pictures", horizon=20, label=True)
    ).values()
    assert len(labelled.chunk) == len(labelled.state) == 4
    labelled.chunk = []
    assert same(plain, labelled)


def test_noise_is_on_the_actions_and_not_in_the_labels(rollouts: Rollouts) -> None:
    requests = [Request(OPEN, 5, handover=0, noise=noise) for noise in (0.0, 0.4)]
    quiet, noisy = (
        next(iter(in_process([r], None, rollouts, SamplingMode(keep="pictures")).values())) for r in requests
    )
    np.testing.assert_array_equal(quiet.state[0], noisy.state[0])
    np.testing.assert_array_equal(quiet.chunk[0], noisy.chunk[0])  # the label of the same state
    assert np.abs(quiet.state[1] - noisy.state[1]).max() > 1e-3
    assert all(np.abs(label).max() <= 1 for label in noisy.chunk)


def test_the_gripper_gets_no_noise(rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each decision advances the simulation twice: five steps for the label, and five with noise to execute it."""
    advanced: list[np.ndarray] = []

    class RecordingEnv(MetaWorldEnv):
        def advance(self, action: np.ndarray) -> bool:
            advanced.append(np.array(action))
            return super().advance(action)

    monkeypatch.setattr(module, "_idle", [])
    monkeypatch.setattr(module, "MetaWorldEnv", RecordingEnv)
    (episode,) = in_process([Request(OPEN, 5, 0, 0.4)], None, rollouts, SamplingMode(horizon=20)).values()
    labels, executed = np.stack(advanced).reshape(4, 2, 5, 4).swapaxes(0, 1)
    np.testing.assert_array_equal(labels, np.stack(episode.chunk))
    np.testing.assert_array_equal(executed[..., 3], labels[..., 3])
    assert (executed[..., :3] != labels[..., :3]).all()


def test_episodes_that_nobody_drives_are_refused(rollouts: Rollouts) -> None:
    for handover in (None, 3):
        with pytest.raises(ValueError, match="there is no policy"):
            rollouts.run([Request(OPEN, 1, 0), Request(OPEN, 2, handover)], None, SamplingMode(keep="pictures"))


def test_more_requests_than_slots_all_come_back(rollouts: Rollouts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long and short episodes mixed, so that slots fall free at different times."""
    monkeypatch.setattr(module, "SLOTS", 3)
    requests = [Request(("drawer-close-v3/shared", FAUCET)[i % 2], 60 + i, handover=0) for i in range(8)]
    episodes = in_process(requests, None, rollouts, SamplingMode())
    assert set(episodes) == {(request.task, request.seed) for request in requests}
    assert all(episode.success for episode in episodes.values())
    assert len({episode.steps for episode in episodes.values()}) > 3


def test_idle_environments_are_bounded(rollouts: Rollouts, pupil: TinyPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those used last are kept, and serve a task and its shared variant without any of the other's scenes."""
    idle: list[MetaWorldEnv] = []
    monkeypatch.setattr(module, "_idle", idle)
    monkeypatch.setattr(module, "SLOTS", 3)
    every, mode = [Request(task, 70) for task in TASKS], SamplingMode(keep="pictures", horizon=10)
    first = in_process(every, pupil, rollouts, mode)
    assert [env.task.name for env in idle] == list(TASKS)[-3:]
    faucets = [env for env in idle if env.task.environment == FAUCET]
    again = in_process([Request(FAUCET, 70)], pupil, rollouts, mode)
    assert [env.task.name for env in idle][-1] == FAUCET
    assert idle[-1] is faucets[0]
    assert len(idle) == 3
    assert same(again[FAUCET, 70], first[FAUCET, 70])
    in_process([Request(OPEN, 70)], pupil, rollouts, mode)
    assert [env.task.name for env in idle] == ["faucet-open-v3/shared", FAUCET, OPEN]  # the window was used longest ago


def strike(pool: Rollouts, number: int) -> threading.Thread:
    """Sends a signal to the first worker as soon as there is one."""

    def wait_and_send() -> None:
        while not (processes := list(pool.workers.processes.values())):
            time.sleep(0.01)
        os.kill(processes[0].pid or 0, number)

    thread = threading.Thread(target=wait_and_send)
    thread.start()
    return thread


def test_dead_worker_is_one_line(pupil: TinyPolicy, pupil_artifact: Path, tmp_path: Path) -> None:
    artifact = artifacts.load(pupil_artifact)
    with Rollouts(artifact.manifest, artifact.file("tokenizer/tokenizer.json"), tmp_path, workers=1) as pool:
        killer = strike(pool, signal.SIGKILL)
        with pytest.raises(UserError, match="one ended by SIGKILL; it may have run out of memory"):
            pool.run(some(2), pupil, SamplingMode(horizon=5))
        killer.join()


def test_stuck_worker_is_one_line_and_is_not_waited_for(
    pupil: TinyPolicy, pupil_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TIMEOUT", 0.5)
    monkeypatch.setattr(module, "EPISODE_TIMEOUT", 0.1)
    artifact = artifacts.load(pupil_artifact)
    pool = Rollouts(artifact.manifest, artifact.file("tokenizer/tokenizer.json"), tmp_path, workers=1)
    killer, began = strike(pool, signal.SIGSTOP), time.monotonic()
    with pytest.raises(UserError, match=r"report within 0\.7 s, found none"), pool:  # two episodes
        pool.run(some(2), pupil, SamplingMode(horizon=5))
    assert time.monotonic() - began < 10
    killer.join()


@pytest.mark.parametrize("sample", [False, True])
def test_one_policy_for_all_workers_plays_what_theirs_would(
    pupil: TinyPolicy, pupil_artifact: Path, tmp_path: Path, sample: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, but on the CPU: the workers only simulate, and no weights are written for them."""
    # In bfloat16, products of other batches round so that other tokens are drawn.
    monkeypatch.setattr(precision, "_chosen", {"cpu": "float32"})
    mode = SamplingMode(sample=sample, correlation=0.8, keep="image_tokens", horizon=15)
    artifact, requests = artifacts.load(pupil_artifact), some(5)
    with Rollouts(artifact.manifest, artifact.file("tokenizer/tokenizer.json"), tmp_path, workers=2) as pool:
        alone = pool.run(requests, pupil, mode)
        (weights,) = tmp_path.iterdir()
        weights.unlink()
        state = torch.get_rng_state()
        pool._here = True
        together = pool.run(requests, pupil, mode)
        assert torch.equal(torch.get_rng_state(), state)  # training goes on as if nobody had drawn
    assert not list(tmp_path.iterdir())
    for a, b in zip(alone, together, strict=True):
        assert np.allclose(
            np.stack(a.image_tokens), np.stack(b.image_tokens), atol=1e-2
        )  # other batches, half precision
        b.image_tokens = a.image_tokens
        assert same(a, b)


def test_an_action_that_is_none_ends_the_run(pupil: TinyPolicy, pupil_artifact: Path, tmp_path: Path) -> None:
    artifact = artifacts.load(pupil_artifact)
    with torch.no_grad():
        pupil.head.weight.fill_(float("nan"))
    with Rollouts(artifact.manifest, artifact.file("tokenizer/tokenizer.json"), tmp_path, workers=1) as pool:
        pool._here = True
        with pytest.raises(UserError, match="finite actions of the policy"):
            pool.run(some(1), pupil, SamplingMode(horizon=5))
        assert pool.workers.processes == {}
