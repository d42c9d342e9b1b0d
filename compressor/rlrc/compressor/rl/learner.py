"""PPO's formulas, and the update of actor and critic from the decisions of one iteration: see ppo.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrc.compressor.models import precision
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.rl.actors import ActionEvaluation, Actor, EncodedObservation, actor_of
from rlrc.compressor.rl.config import PPOConfig
from rlrc.compressor.rl.rollout import ActionSampler, RolloutEpisode
from rlrc.compressor.training.batches import Batch, Batches
from rlrc.compressor.training.distributed import Team
from rlrc.compressor.training.losses import chunk_loss, draw_noise

VISION = ("vision.", "vision2.", "projector.")  # frozen


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

    log_prob, old_log_prob (B, ...), a number for every token; advantage (B,). Sums over the tokens of a decision,
    averages over decisions.
    """
    difference = log_prob - old_log_prob
    ratio = difference.exp()
    a = advantage.reshape(-1, *[1] * (ratio.ndim - 1))
    surrogate = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
    with torch.no_grad():
        metrics = {
            "approx_kl": (ratio - 1 - difference).mean().item(),  # k3 of Schulman, "Approximating KL divergence"
            "clip_fraction": ((ratio - 1).abs() > clip).float().mean().item(),
        }
    return -surrogate.flatten(1).sum(1).mean(), metrics


def value_head(width: int) -> nn.Sequential:
    """Hidden state of the first action token (B, width) -> value (B, 1); starts at zero."""
    last = nn.Linear(256, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(width, 256), nn.SiLU(), last)


@dataclass
class Rollout:
    """Decisions of all episodes end to end: what was seen and drawn (see Actor), rewards and last (N,)."""

    seen: EncodedObservation
    trace: Tensor
    rewards: Tensor
    last: Tensor

    def __len__(self) -> int:
        return len(self.trace)

    @staticmethod
    def of(episodes: list[RolloutEpisode], driver: ActionSampler) -> Rollout:
        lengths = [len(episode.trace) for episode in episodes]
        ends = np.cumsum(lengths) - 1
        rewards, last = torch.zeros(sum(lengths)), torch.zeros(sum(lengths), dtype=torch.bool)
        rewards[ends] = torch.tensor([float(episode.success) for episode in episodes])
        last[ends] = True
        tasks = [episode.task for episode, length in zip(episodes, lengths, strict=True) for _ in range(length)]
        state = np.concatenate([np.stack(episode.state) for episode in episodes])
        image_tokens = np.concatenate([np.stack(episode.image_tokens) for episode in episodes])
        trace = np.concatenate([np.stack(episode.trace) for episode in episodes])
        return Rollout(driver.seen(tasks, state, image_tokens), torch.from_numpy(trace), rewards, last)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    return float(1 - (returns - values).var() / returns.var().clamp(min=1e-8))


def minibatches(counts: Sequence[int], rank: int, size: int, order: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Rows of a process's decisions, in this order, and their weight: as many pairs for every process.

    ``counts``: decisions of every process. Weighted means, averaged over the processes, are the mean over all decisions
    of a step. A process that has run out repeats its first decision with weight zero.
    """
    for start in range(0, max(counts), size):
        lengths = [min(max(count - start, 0), size) for count in counts]
        yield order[start : start + size] if lengths[rank] else order[:1], lengths[rank] * len(counts) / sum(lengths)


class PPOObjective(nn.Module):
    """What the actor minimises, in the precision of this process. A module, so that DDP and FSDP can wrap it."""

    def __init__(self, actor: Actor, config: PPOConfig) -> None:
        super().__init__()
        self.actor, self.config = actor, config

    def forward(
        self,
        seen: EncodedObservation,
        trace: Tensor,
        old_log_prob: Tensor | None = None,
        advantage: Tensor | None = None,
        weight: float = 1.0,
        lesson: Batch | None = None,
    ) -> Any:
        """-> loss and metrics; without an old policy to compare with, what ``Actor.evaluate`` says."""
        config = self.config
        with precision.autocast(trace.device.type):
            judged = self.actor.evaluate(seen, trace)
            if old_log_prob is None:
                return judged
            assert advantage is not None
            loss, metrics = ppo_loss(judged.log_prob, old_log_prob, advantage, config.clip)
            loss, metrics = loss * weight, {name: value * weight for name, value in metrics.items()}
            if lesson is not None:
                cloning, _ = chunk_loss(self.actor.policy, lesson, config.smoothing)
                metrics["bc_loss"] = cloning.item()
                # The surrogate is a sum over tokens, the cloning loss a mean: the same scale for both.
                loss = loss + config.behaviour_cloning * old_log_prob[0].numel() * cloning
        return loss, metrics


class Critic(nn.Module):
    """The value head, and its loss as a module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = value_head(width)

    def forward(self, hidden: Tensor, returns: Tensor | None = None) -> Tensor:
        """hidden (B, width) -> values (B,), or with returns (B,) their loss."""
        values = self.value(hidden)[:, 0]
        return values if returns is None else F.huber_loss(values, returns)


class Learner:
    """The actor's and critic's optimisers and one iteration's update."""

    def __init__(self, policy: PolicyModule, config: PPOConfig, batches: Batches, team: Team | None = None) -> None:
        self.policy, self.config, self.batches, self.team = policy, config, batches, team or Team()
        self.actor = actor_of(policy, config.temperature, config.correlation, config.noise)
        critic = Critic(self.actor.width)
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(not name.startswith(VISION))
        trained = [p for p in self.actor.parameters() if p.requires_grad]
        actor_optimizer = torch.optim.AdamW(trained, lr=config.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        value_optimizer = torch.optim.AdamW(critic.parameters(), lr=config.value_rate, weight_decay=0.0)
        self.objective, self.actor_optimizer = self.team.prepare(PPOObjective(self.actor, config), actor_optimizer)
        self.critic, self.value_optimizer = self.team.prepare(critic, value_optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The policy, the learned part of its noise, the critic, and what their optimisers know."""
        return {
            "actor": self.team.weights(self.objective),
            "actor_optimizer": self.team.optimizer_state(self.objective, self.actor_optimizer),
            "critic": self.team.weights(self.critic),
            "value_optimizer": self.team.optimizer_state(self.critic, self.value_optimizer),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.team.load_weights(self.objective, saved["actor"])
        self.team.load_optimizer(self.objective, self.actor_optimizer, saved["actor_optimizer"])
        self.team.load_weights(self.critic, saved["critic"])
        self.team.load_optimizer(self.critic, self.value_optimizer, saved["value_optimizer"])

    def update(self, rollout: Rollout, iteration: int) -> dict[str, float]:
        """Raises NotFinite before anything is learned from numbers that are none."""
        config, counts = self.config, self.team.gather(torch.tensor([len(rollout)])).tolist()
        old = self.judge(rollout, counts)
        with torch.no_grad():
            values = self.critic(old.hidden.to(self.team.device)).cpu()
        advantages = gae(rollout.rewards, values, rollout.last, config.gamma, config.lam)
        returns = advantages + values
        for name, tensor in (("rewards", rollout.rewards), ("log-probabilities", old.log_prob), ("values", values)):
            self.check(name, tensor)
        every = self.team.gather(advantages)
        metrics = {
            "explained_variance": explained_variance(self.team.gather(values), self.team.gather(returns)),
            "entropy": self.team.gather(old.entropy.flatten(1).mean(1)).mean().item(),
        }
        metrics["value_loss"] = self.fit_value(
            old.hidden, returns, counts, passes=8 if iteration < config.warmup else 3
        )
        if iteration >= config.warmup:
            normalised = (advantages - every.mean()) / (every.std() + 1e-6)
            metrics |= self.fit_policy(rollout, old.log_prob, normalised, counts)
        return metrics

    def judge(self, rollout: Rollout, counts: Sequence[int]) -> ActionEvaluation:
        """All decisions by the policy as it is."""
        parts = list[ActionEvaluation]()
        with torch.no_grad():
            for rows, weight in minibatches(counts, self.team.rank, 512, torch.arange(len(rollout))):
                seen, trace = rollout.seen.rows(rows).to(self.team.device), rollout.trace[rows].to(self.team.device)
                judged = self.objective(seen, trace)
                if weight:
                    parts.append(judged)
        return ActionEvaluation(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))

    def shuffled(self, counts: Sequence[int]) -> Iterator[tuple[Tensor, float]]:
        orders = [torch.randperm(count) for count in counts]
        return minibatches(counts, self.team.rank, self.config.minibatch, orders[self.team.rank])

    def fit_value(self, hidden: Tensor, returns: Tensor, counts: Sequence[int], passes: int) -> float:
        losses, device = list[float](), self.team.device
        for _ in range(passes):
            for rows, weight in self.shuffled(counts):
                loss = self.critic(hidden[rows].to(device), returns[rows].to(device)) * weight
                self.value_optimizer.zero_grad()
                self.team.backward(loss)
                self.value_optimizer.step()
                losses.append(self.team.mean(loss.detach()))
        self.check("value losses", torch.tensor(losses))
        return float(np.mean(losses))

    def fit_policy(
        self, rollout: Rollout, old_log_prob: Tensor, advantages: Tensor, counts: Sequence[int]
    ) -> dict[str, float]:
        rows_of_metrics, device = list[dict[str, float]](), self.team.device
        for _ in range(self.config.epochs):
            for rows, weight in self.shuffled(counts):
                seen, trace = rollout.seen.rows(rows).to(device), rollout.trace[rows].to(device)
                old, advantage = old_log_prob[rows].to(device), advantages[rows].to(device)
                loss, metrics = self.objective(seen, trace, old, advantage, weight, self.lesson())
                self.actor_optimizer.zero_grad()
                self.team.backward(loss)
                means = {name: self.team.mean(torch.tensor(value, device=device)) for name, value in metrics.items()}
                means["gradient_norm"] = self.team.clip(self.objective, 1.0)
                self.check("losses", torch.tensor([self.team.mean(loss.detach()), means["gradient_norm"]]))
                self.actor_optimizer.step()
                rows_of_metrics.append(means)
            if np.mean([row["approx_kl"] for row in rows_of_metrics]) > self.config.target_kl:
                break
        mean = {name: float(np.mean([row[name] for row in rows_of_metrics])) for name in rows_of_metrics[0]}
        return mean | {"updates": float(len(rows_of_metrics))}

    def lesson(self) -> Batch | None:
        """This process's share of demonstrations for one step."""
        if not self.config.behaviour_cloning:
            return None
        size, team = self.config.behaviour_batch, self.team
        whole = draw_noise(self.policy, self.batches.draw(team.size * size))
        return whole.part(slice(team.rank * size, (team.rank + 1) * size)).to(team.device)

    def check(self, name: str, values: Tensor) -> None:
        """Raises NotFinite in every process if the values of one are not finite."""
        broken = values[~values.isfinite()]
        if self.team.mean(torch.tensor(float(len(broken)), device=self.team.device)):
            raise NotFinite(f"finite {name}, found {broken[0].item() if len(broken) else 'others in another process'}")


class NotFinite(ArithmeticError):
    """What was expected, and what was found."""
