"""PPO: every formula against numbers by hand or a second formulation, and the learner on synthetic rollouts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlrc.compressor.models.tiny import TinyPolicy
from rlrc.compressor.rl import ppo as module
from rlrc.compressor.rl.actors import ActionEvaluation, EncodedObservation, sample_tokens
from rlrc.compressor.rl.config import PPOConfig
from rlrc.compressor.rl.demonstrations import SampleBatches, Samples, ids_of_tasks
from rlrc.compressor.rl.learner import Learner, NotFinite
from rlrc.compressor.rl.objectives import explained_variance, gae, ppo_loss
from rlrc.compressor.rl.ppo import ppo, requests
from rlrc.compressor.rl.rollout import ActionSampler, Request, RolloutEpisode, Rollouts, SamplingMode
from rlrc.compressor.rl.rollout_buffer import RolloutBuffer
from rlrc.compressor.training.losses import chunk_loss
from rlrc.compressor.training.run_state import RunState
from rlrc.envs.seeds import REINFORCEMENT
from rlrc.errors import UserError


def test_gae_by_hand() -> None:
    """gamma = lambda = 1/2, so what follows counts a quarter. An episode of three decisions that succeeds:

    delta = 1 - 0.2 = 0.8, then 0.1 - 0.4 = -0.3, then 0.2 - 0.5 = -0.3;
    advantage = 0.8, then -0.3 + 0.8 / 4 = -0.1, then -0.3 - 0.1 / 4 = -0.325.

    And one of two that fails: delta = -0.6, then 0.3 - 0.1 = 0.2; advantage = -0.6, then 0.2 - 0.6 / 4 = 0.05.
    """
    rewards = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    values = torch.tensor([0.5, 0.4, 0.2, 0.1, 0.6])
    last = torch.tensor([False, False, True, False, True])
    expected = torch.tensor([-0.325, -0.1, 0.8, 0.05, -0.6])
    torch.testing.assert_close(gae(rewards, values, last, 0.5, 0.5), expected)


def test_gae_is_the_discounted_sum_of_deltas() -> None:
    """Equation 16 written out, and its two ends: lambda = 0 is one step, lambda = 1 the return minus the value."""
    generator, lengths = torch.Generator().manual_seed(0), [1, 7, 4, 12]
    values, rewards = torch.randn(sum(lengths), generator=generator), torch.randn(sum(lengths), generator=generator)
    last = torch.zeros(sum(lengths), dtype=torch.bool)
    last[np.cumsum(lengths) - 1] = True
    for gamma, lam in ((0.97, 0.9), (0.97, 0.0), (0.97, 1.0), (1.0, 1.0)):
        expected = []
        for part in np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]):
            v, r = values.double().numpy()[part], rewards.double().numpy()[part]
            delta = r + gamma * np.append(v[1:], 0.0) - v
            for t in range(len(v)):
                expected.append(sum((gamma * lam) ** k * delta[t + k] for k in range(len(v) - t)))
                if lam == 1:
                    returns = sum(gamma**k * r[t + k] for k in range(len(v) - t))
                    assert expected[-1] == pytest.approx(returns - v[t], abs=1e-9)
        found = gae(rewards, values, last, gamma, lam)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), atol=1e-5, rtol=1e-5)


def test_ppo_loss_by_hand() -> None:
    """Two decisions of two tokens, clip 0.2.

    Advantage 2, ratios 1.5 and 0.9: min(3.0, 2.4) + min(1.8, 1.8) = 4.2.
    Advantage -1, ratios 1.5 and 0.5: min(-1.5, -1.2) + min(-0.5, -0.8) = -2.3.
    The loss is -(4.2 - 2.3) / 2 = -0.95. Three of four ratios are more than 0.2 off.
    """
    ratio = torch.tensor([[[1.5, 0.9]], [[1.5, 0.5]]])
    old = torch.tensor([[[-1.0, -2.0]], [[-0.5, -3.0]]])
    log_prob = (old + ratio.log()).requires_grad_()
    loss, metrics = ppo_loss(log_prob, old, torch.tensor([2.0, -1.0]), clip=0.2)
    assert loss.item() == pytest.approx(-0.95, abs=1e-6)
    assert metrics["clip_fraction"] == 0.75
    k3 = [r - 1 - math.log(r) for r in (1.5, 0.9, 1.5, 0.5)]
    assert metrics["approx_kl"] == pytest.approx(sum(k3) / 4, abs=1e-6)
    # d(-ratio * A / 2) / d log_prob = -ratio * A / 2 where it is not clipped, and nothing where clipping is worse.
    loss.backward()
    assert log_prob.grad is not None
    torch.testing.assert_close(log_prob.grad, torch.tensor([[[0.0, -0.9]], [[0.75, 0.0]]]))


def test_ppo_loss_at_the_old_policy() -> None:
    """There the surrogate is the advantage a token, its gradient the policy gradient, and nothing has moved."""
    torch.manual_seed(0)
    old, advantage = torch.randn(5, 3, 4), torch.randn(5)
    log_prob = old.clone().requires_grad_()
    loss, metrics = ppo_loss(log_prob, old, advantage, 0.2)
    assert loss.item() == pytest.approx(-12 * advantage.mean().item(), abs=1e-5)
    assert metrics == {"approx_kl": 0.0, "clip_fraction": 0.0}
    loss.backward()
    torch.testing.assert_close(log_prob.grad, (-advantage / 5)[:, None, None].expand(5, 3, 4))


def test_explained_variance_by_hand() -> None:
    """Residuals 0, 0, 1 have variance 1/3, returns 0, 1, 2 have 1."""
    returns = torch.tensor([0.0, 1.0, 2.0])
    assert explained_variance(torch.tensor([0.0, 1.0, 1.0]), returns) == pytest.approx(2 / 3)
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full((3,), 0.5), returns) == 0  # a constant explains nothing
    assert explained_variance(torch.tensor([2.0, 1.0, 0.0]), returns) == -3


@pytest.mark.parametrize("correlation", [0.0, 0.8, 1.0])
def test_sampled_tokens_have_their_own_distribution(correlation: float) -> None:
    """Chi-square of every step and dimension against its probabilities: 27.9 is passed once in 10,000 (7 degrees)."""
    torch.manual_seed(0)
    number = 20_000
    log_probs = torch.log_softmax(torch.randn(3, 2, 8), -1)
    tokens = sample_tokens(log_probs.expand(number, -1, -1, -1), correlation)
    for step in range(3):
        for dim in range(2):
            expected = number * log_probs[step, dim].exp()
            counts = torch.bincount(tokens[:, step, dim], minlength=8)
            assert ((counts - expected).square() / expected).sum() < 27.9


def test_noise_is_shared_over_the_steps_of_a_chunk_only() -> None:
    """Positive over steps, growing with the setting; none between dimensions."""
    torch.manual_seed(0)
    uniform = torch.full((20_000, 2, 2, 64), -math.log(64))

    def correlations(setting: float) -> tuple[float, float]:
        tokens = sample_tokens(uniform, setting).double()
        over_steps = torch.corrcoef(tokens[:, :, 0].T)[0, 1].item()
        return over_steps, torch.corrcoef(tokens[:, 0].T)[0, 1].item()

    # Of uniform variables: 6 / pi * asin(rho / 2) for a Gaussian copula of correlation rho.
    for setting in (0.0, 0.5, 0.8, 1.0):
        over_steps, over_dims = correlations(setting)
        assert over_steps == pytest.approx(6 / math.pi * math.asin(setting / 2), abs=0.03)
        assert over_dims == pytest.approx(0, abs=0.03)


def test_sampling_at_the_edges() -> None:
    certain = torch.full((4, 2, 3, 5), -1e9)
    certain[..., 3] = 0.0
    assert (sample_tokens(certain, 0.8) == 3).all()
    impossible = torch.tensor([-math.inf, 0.0, -math.inf]).expand(1000, 2, 1, 3)
    assert (sample_tokens(impossible, 0.0) == 1).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"iterations": 0},
        {"episodes": 0},
        {"epochs": 0},
        {"minibatch": 0},
        {"demonstrations": 0},
        {"warmup": -1},
        {"seed": -1},
        {"gamma": 1.01},
        {"lam": -0.1},
        {"correlation": 1.5},
        {"correlation": math.nan},
        {"temperature": 0.0},
        {"clip": 0.0},
        {"rate": -1e-4},
        {"behaviour_cloning": -1.0},
        {"smoothing": 0.0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    (name, value) = next(iter(wrong.items()))
    with pytest.raises(UserError, match=rf"expected rl\.{name} .*found {value}"):
        PPOConfig(**wrong)


def test_requests_of_an_iteration(check_requests: Callable[..., list[Request]]) -> None:
    config = PPOConfig(episodes=300, seed=1)
    drawn = check_requests(lambda iteration, failures: requests(config, iteration, failures), "drawer-open-v3")
    assert len(drawn) == 900
    assert all(request.handover is None for request in drawn)
    for seed in (0, 1, 9, 10, 25):  # 10 * 100,000 more than a million: validation begins there
        assert all(request.seed in REINFORCEMENT for request in requests(replace(config, seed=seed), 2, {}))


def synthetic(policy: TinyPolicy, decisions: int = 64) -> RolloutBuffer:
    generator, action = torch.Generator().manual_seed(0), policy.spec.action
    last = torch.zeros(decisions, dtype=torch.bool)
    last[15::16] = True
    return RolloutBuffer(
        EncodedObservation(
            torch.randn(decisions, policy.image_tokens, 64, generator=generator).half(),
            torch.randint(0, 7, (decisions, 6), generator=generator),
            torch.randn(decisions, 7, generator=generator),
        ),
        torch.randint(0, action.bins, (decisions, action.horizon, action.dim), generator=generator),
        last.float() * (torch.arange(decisions) % 32 > 16),  # every other episode succeeds
        last,
    )


def learner_of(policy: TinyPolicy, demos: Samples, rollouts: Rollouts, config: PPOConfig) -> Learner:
    torch.manual_seed(0)
    batches = SampleBatches(demos, policy.spec, ids_of_tasks(rollouts.load_tokenizer()), 0)
    return Learner(policy, config, batches)


def changed(policy: TinyPolicy, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in policy.state_dict().items() if not torch.equal(tensor, before[name])}


def copy_of(policy: TinyPolicy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}


def evaluate(learner: Learner, rollout: RolloutBuffer) -> ActionEvaluation:
    return learner.evaluate(rollout, [len(rollout)])


def test_log_probs_entropy_and_hidden_are_the_policys(pupil: TinyPolicy, demos: Samples, rollouts: Rollouts) -> None:
    """Against float32 and torch.distributions, within bfloat16's rounding, at a temperature of 2."""
    rollout, learner = synthetic(pupil, 32), learner_of(pupil, demos, rollouts, PPOConfig(temperature=2.0))
    observation = rollout.observations.rows(torch.arange(32))
    with torch.no_grad():
        pupil.head.weight *= 30
        log_prob, entropy, hidden = evaluate(learner, rollout)
        exact = pupil.hidden(observation.image_tokens, observation.ids, observation.state)
        expected = torch.distributions.Categorical(logits=pupil.logits(exact) / 2)
    assert log_prob.std() > 0.3
    torch.testing.assert_close(log_prob, expected.log_prob(rollout.sampled), atol=0.1, rtol=0)
    torch.testing.assert_close(entropy, expected.entropy(), atol=0.05, rtol=0)
    torch.testing.assert_close(hidden, exact[:, 0], atol=0.1, rtol=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_advantage_moves_the_probability_of_the_taken_tokens(
    pupil: TinyPolicy, demos: Samples, rollouts: Rollouts, sign: float
) -> None:
    config = PPOConfig(behaviour_cloning=0.0, minibatch=32, epochs=4, rate=1e-3, target_kl=1.0)
    learner, rollout = learner_of(pupil, demos, rollouts, config), synthetic(pupil)
    old = evaluate(learner, rollout).log_prob
    metrics = learner.fit_policy(rollout, old, sign * torch.ones(len(rollout)), [len(rollout)])
    moved = evaluate(learner, rollout).log_prob - old
    assert sign * moved.mean() > 0.02
    assert metrics["updates"] == 8
    assert "bc_loss" not in metrics


def test_warm_up_trains_the_critic_alone(pupil: TinyPolicy, demos: Samples, rollouts: Rollouts) -> None:
    config = PPOConfig(warmup=2, minibatch=32)
    learner, rollout, before = learner_of(pupil, demos, rollouts, config), synthetic(pupil), copy_of(pupil)
    assert (learner.critic(torch.randn(5, 64)) == 0).all()
    first = learner.update(rollout, 0)
    second = learner.update(rollout, 1)
    assert changed(pupil, before) == set()
    assert second["value_loss"] < first["value_loss"]
    assert second["explained_variance"] > first["explained_variance"] == 0
    assert "approx_kl" not in second
    third = learner.update(rollout, 2)
    assert third["bc_loss"] > 0
    moved = changed(pupil, before)
    assert {name.split(".")[0] for name in moved} == {"embedding", "state", "query", "decoder", "head"}  # no vision


def test_cloning_term_pulls_to_the_demonstrations(pupil: TinyPolicy, demos: Samples, rollouts: Rollouts) -> None:
    config = PPOConfig(behaviour_cloning=1.0, minibatch=32, epochs=6, rate=2e-3, target_kl=10.0)
    learner, rollout = learner_of(pupil, demos, rollouts, config), synthetic(pupil)

    def cloning() -> float:
        with torch.no_grad():
            return float(np.mean([chunk_loss(pupil, learner.draw_demonstrations())[0].item() for _ in range(4)]))

    before, old = cloning(), evaluate(learner, rollout).log_prob
    learner.fit_policy(rollout, old, torch.zeros(len(rollout)), [len(rollout)])
    assert cloning() < before - 0.1


def test_updates_stop_at_the_target_kl(pupil: TinyPolicy, demos: Samples, rollouts: Rollouts) -> None:
    config = PPOConfig(behaviour_cloning=0.0, minibatch=16, epochs=5, rate=1e-3, target_kl=1e-9, warmup=0)
    learner, rollout = learner_of(pupil, demos, rollouts, config), synthetic(pupil)
    assert learner.update(rollout, 0)["updates"] == 4  # one pass of 64 / 16


def test_rollout_puts_episodes_end_to_end(pupil: TinyPolicy, rollouts: Rollouts) -> None:
    sampler = ActionSampler(pupil, rollouts.load_tokenizer(), SamplingMode())
    tokens = np.arange(4 * 20).reshape(4, 5, 4)
    state = np.arange(28, dtype=np.float32).reshape(4, 7) / 100

    def episode(task: str, rows: slice, success: bool) -> RolloutEpisode:
        images = [np.full((4, 64), i, np.float16) for i in range(4)[rows]]
        return RolloutEpisode(
            task, 0, success, state=list(state[rows]), image_tokens=images, sampled=list(tokens[rows])
        )

    opened, closed = "drawer-open-v3", "drawer-close-v3"
    rollout = RolloutBuffer.of([episode(opened, slice(0, 3), True), episode(closed, slice(3, 4), False)], sampler)
    assert rollout.rewards.tolist() == [0, 0, 1, 0]
    assert rollout.last.tolist() == [False, False, True, True]
    assert rollout.observations.image_tokens[:, 0, 0].tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(rollout.sampled.numpy(), tokens)
    tokenizer = rollouts.load_tokenizer()
    assert tokenizer is not None
    texts = ["open the drawer"] * 3 + ["close the drawer"]
    np.testing.assert_array_equal(rollout.observations.ids, np.stack([tokenizer(text) for text in texts]))
    assert rollout.observations.mask is None
    norm = pupil.spec.state.norm if pupil.spec.state else None
    assert norm is not None
    np.testing.assert_allclose(rollout.observations.state, ((state - norm.center) / norm.scale).clip(-5, 5), atol=1e-5)


def test_killed_and_resumed_run_is_the_uninterrupted_one(
    make_pupil: Callable[[], TinyPolicy],
    demos: Samples,
    rollouts: Rollouts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SamplingMode", partial(SamplingMode, horizon=20))
    config = PPOConfig(iterations=3, episodes=3, warmup=1, minibatch=4, behaviour_batch=8, demonstrations=1)

    def train(policy: TinyPolicy, folder: Path, progress: Callable[[int, str], None]) -> RunState:
        run = RunState(folder)
        run.open("rl", "parent", config)
        run.start_clock(rollouts)
        batches = SampleBatches(demos, policy.spec, ids_of_tasks(rollouts.load_tokenizer()), config.seed)
        ppo(policy, config, batches, rollouts, run, progress)
        return run

    def rows(run: RunState) -> list[dict[str, Any]]:
        measured = ("cpu_seconds", "environment_steps_per_second")
        lines = [json.loads(line) for line in run.curve_file.read_text().splitlines()]
        return [{name: value for name, value in line.items() if name not in measured} for line in lines]

    def interrupt(iteration: int, text: str) -> None:
        if iteration == 2:
            raise KeyboardInterrupt

    straight, resumed = make_pupil(), make_pupil()
    whole = train(straight, tmp_path / "whole", lambda iteration, text: None)
    with pytest.raises(KeyboardInterrupt):
        train(make_pupil(), tmp_path / "cut", interrupt)
    cut = train(resumed, tmp_path / "cut", lambda iteration, text: None)
    assert [row["step"] for row in rows(whole)] == [1, 2, 3]
    assert rows(whole)[2]["updates"] > 0
    assert rows(cut) == rows(whole)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_what_is_not_finite_is_refused_before_anything_is_learned(
    pupil: TinyPolicy, demos: Samples, rollouts: Rollouts
) -> None:
    learner, rollout, before = (
        learner_of(pupil, demos, rollouts, PPOConfig(warmup=0)),
        synthetic(pupil),
        copy_of(pupil),
    )
    rollout.rewards[3] = math.nan
    with pytest.raises(NotFinite, match="finite rewards, found nan"):
        learner.update(rollout, 0)
    rollout.rewards[3] = 0.0
    rollout.observations.image_tokens[5] = math.inf
    with pytest.raises(NotFinite, match="finite log-probabilities, found nan"):
        learner.update(rollout, 0)
    assert changed(pupil, before) == set()


def test_a_run_that_diverges_ends_in_one_line_and_keeps_its_last_good_state(
    pupil: TinyPolicy, demos: Samples, rollouts: Rollouts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pupil goes mad after its first iteration."""
    monkeypatch.setattr(module, "SamplingMode", partial(SamplingMode, horizon=5))
    config = PPOConfig(iterations=3, episodes=2, warmup=0, minibatch=4, behaviour_batch=8, demonstrations=1)
    run = RunState(tmp_path / "run")
    run.open("rl", "parent", config)
    run.start_clock(rollouts)
    batches = SampleBatches(demos, pupil.spec, ids_of_tasks(rollouts.load_tokenizer()), 0)

    def poison(iteration: int, text: str) -> None:
        with torch.no_grad():
            pupil.decoder.layers[1].mlp.down.weight.fill_(math.nan)

    with pytest.raises(UserError, match=r"finite weights, found nan in iteration 2; .*run.* that of iteration 1"):
        ppo(pupil, config, batches, rollouts, run, poison)
    saved = torch.load(run.state_file, weights_only=True)
    assert saved["step"] == 1
    assert all(tensor.isfinite().all() for tensor in saved["actor"].values())
