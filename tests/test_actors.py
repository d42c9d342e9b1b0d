"""What policies of every family draw, and how probable that was: by hand, or by their own steps one after the other."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from families import FAMILIES, source_of
from rlrc import artifact as artifacts
from rlrc.artifact import TOKENIZER, HistoryEntry
from rlrc.compressor.models.families import build
from rlrc.compressor.models.policy import Inputs, PolicyModule
from rlrc.compressor.rl import learner, observations
from rlrc.compressor.rl import ppo as module
from rlrc.compressor.rl.actors import MAX_STD_FACTOR, Actor, EncodedObservation, Noise, build_actor, chunk_noise
from rlrc.compressor.rl.config import PPOConfig
from rlrc.compressor.rl.demonstrations import ObservedBatches, Samples
from rlrc.compressor.rl.draws import WorkerDraws
from rlrc.compressor.rl.objectives import ppo_loss
from rlrc.compressor.rl.observations import Observer, check_fits_simulator
from rlrc.compressor.rl.ppo import ppo
from rlrc.compressor.rl.rollout import ActionSampler, Request, RolloutEpisode, Rollouts, SamplingMode, run_episodes
from rlrc.compressor.rl.rollout_buffer import RolloutBuffer
from rlrc.compressor.stages import artifact_io, reference
from rlrc.compressor.stages.sources import OfficialSource, examples
from rlrc.compressor.training.batches import collate
from rlrc.compressor.training.run_state import RunState
from rlrc.envs.metaworld import TASKS
from rlrc.errors import UserError
from rlrc.runtime.inference.preprocess import prepare

VISION = learner.VISION


@cache
def official(name: str) -> tuple[PolicyModule, Inputs]:
    """The golden's policy, which nobody changes, and three observations whose instructions have different lengths."""
    source = source_of(name)
    policy, arrays = source.load().eval(), examples(source.spec, source.tokenizer)
    rows = []
    for i in range(3):
        row: dict[str, Any] = {key: array[i] for key, array in arrays.items() if key not in ("ids", "instructions")}
        rows.append(row | ({"instruction": str(arrays["instructions"][i])} if "instructions" in arrays else {}))
    return policy, collate([prepare(row, source.spec, source.tokenizer) for row in rows])


def acting(name: str, sample: bool = True, **settings: Any) -> tuple[Actor, EncodedObservation, Tensor, Tensor]:
    """The actor, the encoded observations, the actions, and what was sampled."""
    policy, inputs = official(name)
    actor = build_actor(policy, **settings)
    torch.manual_seed(4)
    with torch.no_grad():
        observation = actor.encode(inputs)
        actions, sampled = actor.act(observation, sample)
    return actor, observation, actions, sampled


@pytest.mark.parametrize("name", FAMILIES)
def test_without_sampling_it_is_what_is_deployed(name: str) -> None:
    _, _, actions, sampled = acting(name, sample=False)
    policy, inputs = official(name)
    if policy.spec.flow is not None:
        inputs = replace(inputs, noise=sampled[:, 0])
    with torch.no_grad():
        deployed = policy.act(inputs)
    assert torch.equal(actions, deployed.actions)
    if deployed.tokens is not None:
        assert torch.equal(sampled, deployed.tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_state_knows_the_observation_and_nothing_of_what_was_drawn(name: str) -> None:
    actor, observation, actions, sampled = acting(name)
    with torch.no_grad():
        other = actor.act(observation, True)[1]
        assert not torch.equal(sampled, other)
        first, second = actor.evaluate(observation, sampled), actor.evaluate(observation, other)
    assert first.hidden.shape == (3, actor.width)
    assert torch.equal(first.hidden, second.hidden)
    assert not torch.allclose(first.hidden[0], first.hidden[1])
    assert not torch.equal(first.log_prob, second.log_prob)
    assert first.log_prob.shape == first.entropy.shape
    assert first.log_prob.shape[-2:] == actions.shape[1:]


@pytest.mark.parametrize("name", FAMILIES)
def test_one_at_a_time_is_the_same(name: str) -> None:
    """Shorter prompts are padded in the batch, and matter nowhere."""
    actor, observation, _, sampled = acting(name)
    with torch.no_grad():
        together = actor.evaluate(observation, sampled)
        for i in range(3):
            row = observation.rows(torch.tensor([i]))
            if row.mask is not None:
                assert row.ids is not None
                row.ids, row.mask = row.ids[:, row.mask[0]], None
            for part, alone in zip(together, actor.evaluate(row, sampled[i : i + 1]), strict=True):
                torch.testing.assert_close(part[i], alone[0], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_workers_together_draw_what_each_would_alone(name: str) -> None:
    """Two rows of one, whose prompts differ in length, and one of another."""
    policy, inputs = official(name)
    actor = build_actor(policy, correlation=0.5)
    parts, alone = (torch.tensor([0, 1]), torch.tensor([2])), list[Tensor]()
    with torch.no_grad():
        observation = actor.encode(inputs)
        for seed, rows in enumerate(parts):
            torch.manual_seed(seed)
            alone.append(actor.act(observation.rows(rows), True)[1])
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        actor.draws = WorkerDraws([(2, generators[0]), (1, generators[1])])
        together = actor.act(observation, True)[1]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_but_vision_learns_from_the_ratio(name: str) -> None:
    actor, observation, _, sampled = acting(name)
    try:
        for parameter_name, parameter in actor.policy.named_parameters():
            parameter.requires_grad_(not parameter_name.startswith(VISION))
        evaluation = actor.evaluate(observation, sampled)
        loss, metrics = ppo_loss(evaluation.log_prob, evaluation.log_prob.detach(), torch.tensor([1.0, -1.0, 0.5]), 0.2)
        loss.backward()
        silent = [key for key, parameter in actor.named_parameters() if parameter.grad is None]
        assert [key for key in silent if not key.removeprefix("policy.").startswith(VISION)] == []
    finally:
        actor.policy.requires_grad_(True).zero_grad()
    assert metrics == {"approx_kl": 0.0, "clip_fraction": 0.0}


def test_discrete_oft_by_hand() -> None:
    """Tokens of a vocabulary, at a temperature of 2."""
    actor, observation, _, sampled = acting("openvla-oft-discrete", temperature=2.0)
    action = actor.policy.spec.action
    assert action.tokens is not None
    with torch.no_grad():
        logits = actor.policy.decode(observation.image_tokens, observation.ids, observation.mask, observation.state)
        evaluation = actor.evaluate(observation, sampled)
    expected = torch.distributions.Categorical(logits=logits / 2)
    torch.testing.assert_close(evaluation.log_prob, expected.log_prob(sampled - action.tokens.offset))
    torch.testing.assert_close(evaluation.entropy, expected.entropy())


def test_autoregressive_by_its_own_steps() -> None:
    """Each token's probability after those drawn before it, from the cache, one observation at a time."""
    actor, observation, _, sampled = acting("openvla", temperature=1.5)
    policy, action = actor.policy, actor.policy.spec.action
    assert action.tokens is not None
    assert observation.ids is not None
    with torch.no_grad():
        evaluation = actor.evaluate(observation, sampled)
        for i in range(3):
            ids = (
                observation.ids[i : i + 1]
                if observation.mask is None
                else observation.ids[i : i + 1, observation.mask[i]]
            )
            past, image_tokens = None, observation.image_tokens[i : i + 1]
            for j, token in enumerate(sampled[i].flatten()):
                logits, past = policy.step(image_tokens if past is None else None, ids, past)
                expected = torch.distributions.Categorical(logits=logits[0] / 1.5)
                found = evaluation.log_prob[i].flatten()[j], evaluation.entropy[i].flatten()[j]
                torch.testing.assert_close(found[0], expected.log_prob(token - action.tokens.offset))
                torch.testing.assert_close(found[1], expected.entropy())
                ids = token[None, None]


def test_autoregressive_tokens_are_drawn_from_their_distribution() -> None:
    """The first token of 600 draws: chi-square over the likelier tokens and the rest together."""
    policy, inputs = official("openvla")
    actor = build_actor(policy)
    torch.manual_seed(0)
    with torch.no_grad():
        observation = actor.encode(inputs).rows(torch.zeros(200, dtype=torch.long))
        drawn = torch.cat([actor.act(observation, True)[1][:, 0, 0] for _ in range(3)])
        assert observation.ids is not None
        ids = observation.ids[:1] if observation.mask is None else observation.ids[:1, observation.mask[0]]
        logits, _ = policy.step(observation.image_tokens[:1], ids, None)
    assert policy.spec.action.tokens is not None
    probabilities = logits[0].softmax(-1)
    counts = torch.bincount(drawn - policy.spec.action.tokens.offset, minlength=len(probabilities))
    common = probabilities.argsort(descending=True)[:10]
    expected, found = 600 * probabilities[common], counts[common].float()
    expected, found = (torch.cat([x, 600 - x.sum()[None]]) for x in (expected, found))
    assert ((found - expected).square() / expected).sum() < 35  # of ten degrees: once in 10,000


@pytest.mark.parametrize("name", ["openvla-oft-l1", "act"])
def test_gaussian_by_hand(name: str) -> None:
    """-(a - mean)^2 / 2 s^2 - ln s - ln(2 pi) / 2, with a standard deviation s of each dimension."""
    actor, observation, actions, sampled = acting(name, std=0.2)
    dim, mean = actor.policy.spec.action.dim, acting(name, sample=False)[2]
    assert actor.noise is not None
    with torch.no_grad():
        actor.noise.raw.copy_(torch.linspace(-1, 1, dim))
        evaluation, std = actor.evaluate(observation, sampled), actor.noise()
    assert torch.equal(actions, sampled)
    by_hand = 0.2 * MAX_STD_FACTOR ** np.tanh(np.linspace(-1, 1, dim))
    np.testing.assert_allclose(std, by_hand, rtol=1e-5)
    expected = -((actions - mean).numpy() ** 2) / (2 * by_hand**2) - np.log(by_hand) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(evaluation.log_prob, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(evaluation.entropy[0, 0], np.log(by_hand) + 0.5 * np.log(2 * np.pi * np.e), rtol=1e-4)


@pytest.mark.parametrize("name", ["pi0", "pi05", "smolvla"])
def test_flow_chain_by_hand(name: str) -> None:
    """Each link is the Euler step from the one before it plus the noise that the generator gave."""
    actor, observation, actions, chain = acting(name, std=0.05, correlation=0.5)
    spec, policy = actor.policy.spec, actor.policy
    assert spec.flow is not None
    steps, dim, shape = spec.flow.steps, spec.action.dim, (3, spec.action.horizon, spec.flow.width)
    assert chain.shape == (3, steps + 1, *shape[1:])
    torch.manual_seed(4)
    assert torch.equal(chain[:, 0], torch.randn(shape))
    noise = torch.stack([chunk_noise(3, shape[1], dim, 0.5) for _ in range(steps)], 1)
    with torch.no_grad():
        evaluation = actor.evaluate(observation, chain)
        past, mask = policy.prefix(observation.image_tokens, observation.ids, observation.mask, observation.state)
        for i in range(steps):
            t = torch.full((3,), 1 - i / steps)
            plain = chain[:, i] - policy.velocity(past, mask, observation.state, chain[:, i], t) / steps
            torch.testing.assert_close(chain[:, i + 1, :, :dim], plain[..., :dim] + 0.05 * noise[:, i])
            torch.testing.assert_close(chain[:, i + 1, :, dim:], plain[..., dim:])
    assert torch.equal(actions, chain[:, -1, :, :dim])
    expected = -noise.square() / 2 - math.log(0.05) - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(evaluation.log_prob, expected, atol=2e-3, rtol=1e-3)


def test_noise_starts_where_it_is_told_and_stays_within_bounds() -> None:
    noise = Noise((2, 3), 0.1)
    torch.testing.assert_close(noise(), torch.full((2, 3), 0.1))
    for raw, expected in ((100.0, 0.3), (-100.0, 0.1 / 3)):
        with torch.no_grad():
            noise.raw.fill_(raw)
        torch.testing.assert_close(noise(), torch.full((2, 3), expected))


def test_noise_of_a_chunk_has_its_correlation() -> None:
    torch.manual_seed(0)
    noise = chunk_noise(20_000, 3, 2, 0.8)
    table = torch.corrcoef(noise.flatten(1).T)  # step 0: dimensions 0, 1; step 1: ...
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert table[0, 2].item() == pytest.approx(0.8, abs=0.02)
    assert table[0, 1].item() == pytest.approx(0, abs=0.03)


def metaworld(name: str) -> tuple[OfficialSource, PolicyModule]:
    """A random policy of this family's tiny geometry with Meta-World's camera, state and actions, chunks of 5."""
    source, own = source_of(name), reference.policy_spec(size=32, bins=16, horizon=5)
    spec, geometry = source.spec, source.spec.geometry
    action = replace(own.action, bins=spec.action.bins, tokens=spec.action.tokens)
    if name == "openvla":
        action = replace(action, horizon=1)
    assert own.state is not None
    state = None if spec.state is None else replace(own.state, width=spec.state.width)
    if name == "act":
        geometry = geometry | {"state": 7}
    camera = replace(spec.cameras[0], width=spec.cameras[0].height)
    spec = replace(spec, cameras=(camera,), state=state, action=action, geometry=geometry)
    torch.manual_seed(0)
    return source, build(spec, source.towers).eval()


def artifact_of(name: str, out: Path) -> artifacts.Artifact:
    source, policy = metaworld(name)
    with artifacts.create_artifact(out) as draft:
        source.copy_files(draft)
        raw = examples(policy.spec, source.tokenizer)
        artifact_io.write_policy(draft, policy, raw, (HistoryEntry("new", {}, "0.1.0", None, 0.0),), exact=True)
    return artifacts.load(out)


def lessons_of(policy: PolicyModule, rollouts: Rollouts) -> ObservedBatches:
    """Random demonstrations of all tasks."""
    random, horizon = np.random.default_rng(0), policy.spec.action.horizon
    samples = Samples(
        random.integers(0, 256, (26, 48, 48, 3), np.uint8),
        random.normal(size=(26, 7)).astype(np.float32),
        np.arange(26) % 13,
        random.uniform(-1, 1, (26, horizon, 4)).astype(np.float32),
    )
    if policy.spec.cameras[0].resize == "none":
        size = policy.spec.cameras[0].height
        samples.pictures = random.integers(0, 256, (26, size, size, 3), np.uint8)
    return ObservedBatches(samples, Observer(policy.spec, rollouts.load_tokenizer()), 0)


@pytest.mark.parametrize("name", ["act", "pi05"])
def test_policies_without_a_prompt_and_with_the_state_in_it_play(name: str, own_cache: Path) -> None:
    """What was kept of an episode is what was seen: evaluated again, the chain fits."""
    source, policy = metaworld(name)
    check_fits_simulator(policy.spec)
    sampler = ActionSampler(policy, source.tokenizer, SamplingMode(sample=True, keep="image_tokens", horizon=10))
    size = policy.spec.cameras[0].height
    (episode,) = run_episodes([Request("drawer-open-v3", 7)], sampler, 5, sampler.mode, size)
    rollout = RolloutBuffer.of([episode], sampler)
    assert len(rollout) == 2
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        log_prob = sampler.actor.evaluate(rollout.observations.rows(torch.arange(2)), rollout.sampled).log_prob
    # Of standard normal noise: -e^2 / 2 - ln s - ln(2 pi) / 2 on average, and never above that without e.
    highest = -math.log(0.1) - 0.5 * math.log(2 * math.pi)
    assert log_prob.max() <= highest + 1e-4
    assert log_prob.mean().item() == pytest.approx(highest - 0.5, abs=0.35)


@pytest.mark.parametrize("name", ["openvla-oft-l1", "smolvla", "openvla"])
def test_policies_of_every_family_play_and_learn(
    name: str, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two iterations of PPO with three short episodes each: the policy moves, and so does its noise if it has any.

    Random policies do not succeed: the first of the episodes is rewarded instead.
    """
    of = RolloutBuffer.of

    def rewarded(episodes: list[RolloutEpisode], sampler: ActionSampler) -> RolloutBuffer:
        return of([replace(episodes[0], success=True), *episodes[1:]], sampler)

    monkeypatch.setattr(RolloutBuffer, "of", rewarded)
    horizon = 2 if name == "openvla" else 10
    monkeypatch.setattr(module, "SamplingMode", partial(SamplingMode, horizon=horizon))
    artifact = artifact_of(name, tmp_path / name)
    policy = artifact_io.load_policy(artifact)
    check_fits_simulator(policy.spec)
    before = {key: tensor.clone() for key, tensor in policy.state_dict().items()}
    config = PPOConfig(iterations=2, episodes=3, warmup=1, minibatch=4, behaviour_batch=4, demonstrations=1, noise=0.2)
    run = RunState(tmp_path / "run")
    run.open("rl", "parent", config)
    tokenizer = artifact.file(TOKENIZER) if policy.spec.prompt else None
    with Rollouts(artifact.manifest, tokenizer, tmp_path, workers=1) as rollouts:
        run.start_clock(rollouts)
        ppo(policy, config, lessons_of(policy, rollouts), rollouts, run, lambda *_: None)
        # What is deployed plays the same whatever was drawn before; what is drawn has noise.
        ask = [Request("drawer-open-v3", 7)]
        plain = [rollouts.run(ask, policy, SamplingMode(keep="image_tokens", horizon=horizon))[0] for _ in range(2)]
        drawn = rollouts.run(ask, policy, SamplingMode(sample=True, keep="image_tokens", horizon=horizon))[0]
    assert all(np.array_equal(a, b) for a, b in zip(plain[0].sampled, plain[1].sampled, strict=True))
    assert not np.array_equal(plain[0].sampled[0], drawn.sampled[0])
    rows = [json.loads(line) for line in run.curve_file.read_text().splitlines()]
    assert rows[1]["updates"] > 0
    assert all(math.isfinite(value) for value in rows[1].values() if not isinstance(value, str))
    assert {"approx_kl", "clip_fraction", "bc_loss", "gradient_norm", "entropy", "explained_variance"} <= rows[1].keys()
    moved = {key for key, tensor in policy.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved
    assert not any(key.startswith(VISION) for key in moved)
    saved = torch.load(run.state_file, weights_only=True)["actor"]
    noise = [tensor for key, tensor in saved.items() if key.startswith("actor.noise.")]
    assert len(noise) == (not policy.spec.action.bins)
    assert all(tensor.abs().max() > 0 for tensor in noise)
    assert not any("noise" in key for key in policy.state_dict())  # the artifact gets the policy alone


def test_policies_that_meta_world_does_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = reference.policy_spec()
    check_fits_simulator(spec)
    camera = spec.cameras[0]
    assert spec.state is not None
    wrong = {
        r"one camera.*found 2 \(corner4, wrist\)": replace(spec, cameras=(camera, replace(camera, name="wrist"))),
        r"square pictures.*found 96 x 128": replace(spec, cameras=(replace(camera, width=128),)),
        r"7 numbers of state.*found 2": replace(spec, state=replace(spec.state, names=("a", "b"), units=("m", "m"))),
        r"4 numbers of action.*found 3": replace(spec, action=replace(spec.action, names=spec.action.names[:3])),
    }
    for message, broken in wrong.items():
        with pytest.raises(UserError, match=message):
            check_fits_simulator(broken)
    monkeypatch.setattr(observations, "TASKS", TASKS | {"quiet": replace(TASKS["drawer-open-v3"], instruction=" ")})
    with pytest.raises(UserError, match=r"an instruction of every task.*found none of quiet"):
        check_fits_simulator(spec)
    check_fits_simulator(replace(spec, prompt=None))
