"""Recovery by reinforcement learning: PPO on the policy's own episodes with a sparse success reward.

As in the paper (arXiv 2506.17639, stage 2b): actor and critic share the transformer, the value is a small MLP on the
hidden state of the first action token, the critic is warmed up alone, and a behaviour-cloning term on demonstrations
stays in the objective. One decision is one chunk; ratio and clip are per token (as in RL4VLA, arXiv 2505.19789). The
vision tower is frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrc.compressor import decode
from rlrc.compressor.backbones.tiny import TinyPolicy
from rlrc.compressor.batches import Batches
from rlrc.compressor.losses import SMOOTHING, smoothed_cross_entropy
from rlrc.compressor.rollout import Driver, Episode, Mode, Request, Rollouts
from rlrc.compressor.run import Run
from rlrc.envs.metaworld import TASKS
from rlrc.envs.seeds import DEMONSTRATION, REINFORCEMENT, scene
from rlrc.errors import UserError


@dataclass(frozen=True)
class PPOConfig:
    iterations: int = 30
    """rollout and update, this many times"""
    episodes: int = 208
    """episodes an iteration, all tasks together; tasks that fail more get more"""
    warmup: int = 2
    """first iterations, in which only the critic learns"""
    epochs: int = 2
    """passes over the rollouts of an iteration"""
    minibatch: int = 256
    """decisions a step"""
    rate: float = 1e-4
    """learning rate of the decoder and head"""
    value_rate: float = 1e-3
    """learning rate of the value MLP"""
    gamma: float = 0.99
    """discount a decision"""
    lam: float = 0.95
    """lambda of the generalised advantage estimate"""
    clip: float = 0.2
    """clip range of the probability ratio"""
    behaviour_cloning: float = 0.5
    """weight of the cross-entropy to demonstrations"""
    behaviour_batch: int = 128
    """demonstration samples a step"""
    temperature: float = 1.0
    """of sampling in the rollouts"""
    correlation: float = 0.8
    """of the sampling noise over the steps of a chunk"""
    target_kl: float = 0.02
    """an iteration's updates stop when the mean KL a token exceeds this"""
    demonstrations: int = 60
    """expert episodes a task for the behaviour-cloning term"""
    first_seed: int = DEMONSTRATION.start
    """scene of the first of them"""
    smoothing: float = SMOOTHING
    """as in sft, for the behaviour-cloning term"""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "episodes", "epochs", "minibatch", "behaviour_batch", "demonstrations"):
            if getattr(self, name) < 1:
                raise UserError(f"expected rl.{name} >= 1, found {getattr(self, name)}")
        for name in ("rate", "value_rate", "clip", "temperature", "target_kl", "smoothing"):
            if not getattr(self, name) > 0:
                raise UserError(f"expected rl.{name} > 0, found {getattr(self, name)}")
        for name in ("warmup", "behaviour_cloning", "seed"):
            if not getattr(self, name) >= 0:
                raise UserError(f"expected rl.{name} >= 0, found {getattr(self, name)}")
        for name in ("gamma", "lam", "correlation"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"expected rl.{name} within [0, 1], found {getattr(self, name)}")


def gae(rewards: Tensor, values: Tensor, last: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimate (Schulman et al., 2016, arXiv 1506.02438, equation 16).

    rewards, values, last (N,) of several episodes end to end; ``last`` marks the final decision of an episode, after
    which nothing is worth anything.
    """
    following_advantage = following_value = 0.0
    advantages = []
    # Plain floats: indexing tensors would take longer than the network.
    for reward, value, ends in reversed(list(zip(rewards.tolist(), values.tolist(), last.tolist(), strict=True))):
        if ends:
            following_advantage = following_value = 0.0
        delta = reward + gamma * following_value - value
        following_advantage = delta + gamma * lam * following_advantage
        following_value = value
        advantages.append(following_advantage)
    return torch.tensor(advantages[::-1])


def ppo_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float) -> tuple[Tensor, dict[str, float]]:
    """Clipped surrogate (Schulman et al., 2017, arXiv 1707.06347, equation 7), to be minimised.

    log_prob, old_log_prob (B, K, D); advantage (B,). Sums over the tokens of a decision, averages over decisions.
    """
    difference = log_prob - old_log_prob
    ratio = difference.exp()
    a = advantage[:, None, None]
    surrogate = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
    with torch.no_grad():
        metrics = {
            "approx_kl": (ratio - 1 - difference).mean().item(),  # k3 of Schulman, "Approximating KL divergence"
            "clip_fraction": ((ratio - 1).abs() > clip).float().mean().item(),
        }
    return -surrogate.sum((1, 2)).mean(), metrics


def value_head(width: int) -> nn.Sequential:
    """Hidden state of the first action token (B, width) -> value (B, 1); starts at zero."""
    last = nn.Linear(256, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, 256), nn.SiLU(), last)


@dataclass
class Rollout:
    """Decisions of all episodes end to end.

    image_tokens (N, M, width), ids (N, L), state (N, S) normalised, tokens (N, K, D), rewards and last (N,).
    """

    image_tokens: Tensor
    ids: Tensor
    state: Tensor
    tokens: Tensor
    rewards: Tensor
    last: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @staticmethod
    def of(episodes: list[Episode], driver: Driver) -> Rollout:
        lengths = [len(episode.tokens) for episode in episodes]
        ends = np.cumsum(lengths) - 1
        rewards, last = torch.zeros(sum(lengths)), torch.zeros(sum(lengths), dtype=torch.bool)
        rewards[ends] = torch.tensor([float(episode.success) for episode in episodes])
        last[ends] = True
        state = np.concatenate([np.stack(episode.state) for episode in episodes])
        return Rollout(
            torch.from_numpy(np.concatenate([np.stack(episode.image_tokens) for episode in episodes])),
            torch.cat([driver.ids[episode.task].expand(len(episode.tokens), -1) for episode in episodes]),
            driver.normalised_state(state),
            torch.from_numpy(np.concatenate([np.stack(episode.tokens) for episode in episodes])),
            rewards,
            last,
        )


def token_log_probs(
    policy: TinyPolicy, rollout: Rollout, rows: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the taken tokens and entropy (B, K, D), hidden state of the first action token (B, width)."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = policy.hidden(rollout.image_tokens[rows].float(), rollout.ids[rows], rollout.state[rows])
        logits = policy.logits(hidden)
    log_probs = torch.log_softmax(logits / temperature, -1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, rollout.tokens[rows][..., None])[..., 0], entropy, hidden[:, 0].float()


def requests(config: PPOConfig, iteration: int, failures: dict[str, float]) -> list[Request]:
    """An iteration's episodes: tasks drawn by how often they fail, scenes never seen before."""
    rng = np.random.default_rng((config.seed, iteration))
    weight = np.array([0.1 + failures.get(task, 1.0) for task in TASKS])
    tasks = rng.choice(list(TASKS), config.episodes, p=weight / weight.sum())
    first = config.seed * 100_000 + iteration * config.episodes
    return [Request(str(task), scene(REINFORCEMENT, first + i)) for i, task in enumerate(tasks)]


def explained_variance(values: Tensor, returns: Tensor) -> float:
    return float(1 - (returns - values).var() / returns.var().clamp(min=1e-8))


class Learner:
    """The actor's and critic's optimisers and one iteration's update."""

    def __init__(self, policy: TinyPolicy, config: PPOConfig, batches: Batches) -> None:
        self.policy, self.config, self.batches = policy, config, batches
        self.value = value_head(policy.towers["decoder"].width)
        trained = [p for name, p in policy.named_parameters() if not name.startswith(("vision.", "projector."))]
        self.actor_optimizer = torch.optim.AdamW(
            trained, lr=config.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.value_optimizer = torch.optim.AdamW(self.value.parameters(), lr=config.value_rate, weight_decay=0.0)
        self.trained = trained

    def state_dict(self) -> dict[str, Any]:
        return {
            "value": self.value.state_dict(),
            "actor_optimizer": self.actor_optimizer.state_dict(),
            "value_optimizer": self.value_optimizer.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.value.load_state_dict(saved["value"])
        self.actor_optimizer.load_state_dict(saved["actor_optimizer"])
        self.value_optimizer.load_state_dict(saved["value_optimizer"])

    def update(self, rollout: Rollout, iteration: int) -> dict[str, float]:
        config, policy = self.config, self.policy
        with torch.no_grad():
            parts = [
                token_log_probs(policy, rollout, rows, config.temperature)
                for rows in torch.arange(len(rollout)).split(512)
            ]
        old_log_prob, entropy, hidden = (torch.cat(column) for column in zip(*parts, strict=True))
        with torch.no_grad():
            values = self.value(hidden)[:, 0]
        advantages = gae(rollout.rewards, values, rollout.last, config.gamma, config.lam)
        returns = advantages + values
        metrics = {"explained_variance": explained_variance(values, returns), "entropy": entropy.mean().item()}
        metrics["value_loss"] = self.fit_value(hidden, returns, passes=8 if iteration < config.warmup else 3)
        if iteration >= config.warmup:
            normalised = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
            metrics |= self.fit_policy(rollout, old_log_prob, normalised)
        return metrics

    def fit_value(self, hidden: Tensor, returns: Tensor, passes: int) -> float:
        losses = []
        for _ in range(passes):
            for rows in torch.randperm(len(hidden)).split(self.config.minibatch):
                loss = F.huber_loss(self.value(hidden[rows])[:, 0], returns[rows])
                self.value_optimizer.zero_grad()
                loss.backward()
                self.value_optimizer.step()
                losses.append(loss.item())
        return float(np.mean(losses))

    def fit_policy(self, rollout: Rollout, old_log_prob: Tensor, advantages: Tensor) -> dict[str, float]:
        config, rows_of_metrics = self.config, list[dict[str, float]]()
        for _ in range(config.epochs):
            for rows in torch.randperm(len(rollout)).split(config.minibatch):
                log_prob, _, _ = token_log_probs(self.policy, rollout, rows, config.temperature)
                loss, metrics = ppo_loss(log_prob, old_log_prob[rows], advantages[rows], config.clip)
                if config.behaviour_cloning > 0:
                    cloning = self.cloning_loss()
                    metrics["bc_loss"] = cloning.item()
                    # The surrogate is a sum over tokens, the cross-entropy a mean: the same scale for both.
                    loss = loss + config.behaviour_cloning * old_log_prob[0].numel() * cloning
                self.actor_optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
                self.actor_optimizer.step()
                rows_of_metrics.append(metrics)
            if np.mean([row["approx_kl"] for row in rows_of_metrics]) > config.target_kl:
                break
        means = {name: float(np.mean([row[name] for row in rows_of_metrics])) for name in rows_of_metrics[0]}
        return means | {"updates": float(len(rows_of_metrics))}

    def cloning_loss(self) -> Tensor:
        batch = self.batches.draw(self.config.behaviour_batch)
        inputs = batch.inputs
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                image_tokens = decode.look(self.policy, inputs)
            logits = self.policy.decode(image_tokens.float(), inputs.ids, inputs.mask, inputs.state)
        return smoothed_cross_entropy(logits, batch.actions, self.config.smoothing).mean()


def ppo(
    policy: TinyPolicy,
    config: PPOConfig,
    batches: Batches,
    rollouts: Rollouts,
    run: Run,
    progress: Callable[[int, str], None],
) -> None:
    """Train ``policy`` in place; ``progress(iteration, text)`` after every iteration. A saved run is resumed."""
    torch.manual_seed(config.seed)
    learner = Learner(policy, config, batches)
    mode = Mode(sample=True, temperature=config.temperature, correlation=config.correlation, keep="image_tokens")
    driver = Driver(policy, rollouts.load_tokenizer(), mode)
    first, failures = 0, dict[str, float]()
    if (saved := run.load()) is not None:
        first, failures = saved["step"], saved["failures"]
        policy.load_state_dict(saved["policy"])
        learner.load_state_dict(saved)
        batches.restore(saved["batches"])
    for iteration in range(first, config.iterations):
        episodes = rollouts.run(requests(config, iteration, failures), policy, mode)
        for task in {episode.task for episode in episodes}:
            rate = 1 - float(np.mean([episode.success for episode in episodes if episode.task == task]))
            failures[task] = 0.5 * failures.get(task, rate) + 0.5 * rate
        metrics: dict[str, Any] = learner.update(Rollout.of(episodes, driver), iteration)
        speed = sum(episode.steps for episode in episodes) / rollouts.seconds
        # Tasks are drawn by their failures: a mean over episodes would fall as the policy improves, one over tasks not.
        metrics |= {"success": 1 - float(np.mean(list(failures.values()))), "environment_steps_per_second": speed}
        run.log("rl", iteration + 1, episodes=len(episodes), **metrics)
        state = {"policy": policy.state_dict(), "failures": failures, "batches": batches.state()}
        run.save(iteration + 1, **state, **learner.state_dict())
        kl = metrics.get("approx_kl", 0.0)
        progress(iteration + 1, f"sampled success {metrics['success']:.3f} kl {kl:.4f} {speed:.0f} steps/s")
    policy.eval()
