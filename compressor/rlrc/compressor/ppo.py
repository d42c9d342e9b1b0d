"""Recovery by reinforcement learning: PPO on the policy's own episodes with a sparse success reward.

As in the paper (arXiv 2506.17639, stage 2b): actor and critic share the transformer, the value is a small MLP on the
hidden state of the first action token, the critic is warmed up alone, and a behaviour-cloning term on demonstrations
stays in the objective. One decision is one chunk; ratio and clip are per token (as in RL4VLA, arXiv 2505.19789), or per
number and flow step: rlrc.compressor.actors says what is drawn and how probable it was. The vision tower is frozen.

Under ``accelerate launch`` every process plays its share of the episodes in simulators of its own, and gradients are
averaged over all decisions of a step. Everything random is drawn for all processes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrc.compressor.actors import Actor, Judged, Seen, actor_of
from rlrc.compressor.batches import Batch, Batches
from rlrc.compressor.distributed import Team
from rlrc.compressor.losses import SMOOTHING, chunk_loss, drawn
from rlrc.compressor.policy import Policy
from rlrc.compressor.rollout import Driver, Episode, Mode, Request, Rollouts
from rlrc.compressor.run import Run
from rlrc.envs.metaworld import TASKS
from rlrc.envs.seeds import DEMONSTRATION, REINFORCEMENT, scene
from rlrc.errors import UserError

VISION = ("vision.", "vision2.", "projector.")  # frozen


@dataclass(frozen=True)
class PPOConfig:
    iterations: int = 30
    """rollout and update, this many times"""
    episodes: int = 208
    """episodes an iteration, all tasks and processes together; tasks that fail more get more"""
    warmup: int = 2
    """first iterations, in which only the critic learns"""
    epochs: int = 2
    """passes over the rollouts of an iteration"""
    minibatch: int = 256
    """decisions a step (of every process, under accelerate launch)"""
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
    """weight of the family's own loss on demonstrations"""
    behaviour_batch: int = 128
    """demonstration samples a step (of every process, under accelerate launch)"""
    temperature: float = 1.0
    """of sampling tokens in the rollouts"""
    noise: float = 0.1
    """initial standard deviation of the sampling noise of policies without tokens, in normalised actions; learned"""
    correlation: float = 0.8
    """of the sampling noise over the steps of a chunk"""
    target_kl: float = 0.02
    """an iteration's updates stop when the mean KL a token exceeds this"""
    data: str = ""
    """LeRobotDataset folder for the behaviour-cloning term; empty: the simulator's scripted experts"""
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
        for name in ("rate", "value_rate", "clip", "temperature", "noise", "target_kl", "smoothing"):
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

    seen: Seen
    trace: Tensor
    rewards: Tensor
    last: Tensor

    def __len__(self) -> int:
        return len(self.trace)

    @staticmethod
    def of(episodes: list[Episode], driver: Driver) -> Rollout:
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


def requests(config: PPOConfig, iteration: int, failures: dict[str, float]) -> list[Request]:
    """An iteration's episodes: tasks drawn by how often they fail, scenes never seen before."""
    rng = np.random.default_rng((config.seed, iteration))
    weight = np.array([0.1 + failures.get(task, 1.0) for task in TASKS])
    tasks = rng.choice(list(TASKS), config.episodes, p=weight / weight.sum())
    first = config.seed * 100_000 + iteration * config.episodes
    return [Request(str(task), scene(REINFORCEMENT, first + i)) for i, task in enumerate(tasks)]


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


class Objective(nn.Module):
    """What the actor minimises, under bfloat16 autocast. A module, so that DDP and FSDP can wrap it."""

    def __init__(self, actor: Actor, config: PPOConfig) -> None:
        super().__init__()
        self.actor, self.config = actor, config

    def forward(
        self,
        seen: Seen,
        trace: Tensor,
        old_log_prob: Tensor | None = None,
        advantage: Tensor | None = None,
        weight: float = 1.0,
        lesson: Batch | None = None,
    ) -> Any:
        """-> loss and metrics; without an old policy to compare with, what ``Actor.evaluate`` says."""
        config = self.config
        with torch.autocast(trace.device.type, torch.bfloat16):
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

    def __init__(self, policy: Policy, config: PPOConfig, batches: Batches, team: Team | None = None) -> None:
        self.policy, self.config, self.batches, self.team = policy, config, batches, team or Team()
        self.actor = actor_of(policy, config.temperature, config.correlation, config.noise)
        critic = Critic(self.actor.width)
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(not name.startswith(VISION))
        trained = [p for p in self.actor.parameters() if p.requires_grad]
        actor_optimizer = torch.optim.AdamW(trained, lr=config.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        value_optimizer = torch.optim.AdamW(critic.parameters(), lr=config.value_rate, weight_decay=0.0)
        self.objective, self.actor_optimizer = self.team.prepare(Objective(self.actor, config), actor_optimizer)
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

    def judge(self, rollout: Rollout, counts: Sequence[int]) -> Judged:
        """All decisions by the policy as it is."""
        parts = list[Judged]()
        with torch.no_grad():
            for rows, weight in minibatches(counts, self.team.rank, 512, torch.arange(len(rollout))):
                seen, trace = rollout.seen.rows(rows).to(self.team.device), rollout.trace[rows].to(self.team.device)
                judged = self.objective(seen, trace)
                if weight:
                    parts.append(judged)
        return Judged(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))

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
        whole = drawn(self.policy, self.batches.draw(team.size * size))
        return whole.part(slice(team.rank * size, (team.rank + 1) * size)).to(team.device)

    def check(self, name: str, values: Tensor) -> None:
        """Raises NotFinite in every process if the values of one are not finite."""
        broken = values[~values.isfinite()]
        if self.team.mean(torch.tensor(float(len(broken)), device=self.team.device)):
            raise NotFinite(f"finite {name}, found {broken[0].item() if len(broken) else 'others in another process'}")


class NotFinite(ArithmeticError):
    """What was expected, and what was found."""


def ppo(
    policy: Policy,
    config: PPOConfig,
    batches: Batches,
    rollouts: Rollouts,
    run: Run,
    progress: Callable[[int, str], None],
) -> None:
    """Train ``policy`` in place; ``progress(iteration, text)`` after every iteration. A saved run is resumed.

    Raises UserError when a reward, a log-probability or a loss is no longer finite.
    """
    torch.manual_seed(config.seed)
    team = Team()
    if config.episodes < team.size:
        raise UserError(f"expected rl.episodes >= {team.size}, one for each process, found {config.episodes}")
    learner = Learner(policy, config, batches, team)
    mode = Mode(sample=True, temperature=config.temperature, correlation=config.correlation, keep="image_tokens")
    driver = Driver(policy, rollouts.load_tokenizer(), mode)
    first, failures = 0, dict[str, float]()
    if (saved := run.load()) is not None:
        first, failures = saved["step"], saved["failures"]
        learner.load_state_dict(saved)
        batches.restore(saved["batches"])
    for iteration in range(first, config.iterations):
        weights, noise = (team.weights(learner.objective, f"actor.{part}.") for part in ("policy", "noise"))
        asked = requests(config, iteration, failures)
        shares = [asked[rank :: team.size] for rank in range(team.size)]
        episodes = rollouts.run(shares[team.rank], policy, mode, weights, noise)
        outcomes = team.gather(torch.tensor([float(episode.success) for episode in episodes])).numpy()
        tasks = np.array([request.task for share in shares for request in share])
        for task in sorted(set(tasks.tolist())):
            rate = 1 - float(np.mean(outcomes[tasks == task]))
            failures[task] = 0.5 * failures.get(task, rate) + 0.5 * rate
        try:
            metrics: dict[str, Any] = learner.update(Rollout.of(episodes, driver), iteration)
        except NotFinite as error:
            raise UserError(
                f"expected {error} in iteration {iteration + 1}; lower --rate or --noise, then remove {run.folder}, "
                f"which keeps the last good state, that of iteration {iteration}"
            ) from None
        steps = torch.tensor(sum(episode.steps for episode in episodes) / rollouts.seconds, device=team.device)
        # Tasks are drawn by their failures: a mean over episodes would fall as the policy improves, one over tasks not.
        metrics |= {"success": 1 - float(np.mean(list(failures.values())))}
        metrics |= {"environment_steps_per_second": team.mean(steps) * team.size}
        run.log("rl", iteration + 1, episodes=len(asked), **metrics)
        run.save(iteration + 1, failures=failures, batches=batches.state(), **learner.state_dict())
        kl, speed = metrics.get("approx_kl", 0.0), metrics["environment_steps_per_second"]
        progress(iteration + 1, f"sampled success {metrics['success']:.3f} kl {kl:.4f} {speed:.0f} steps/s")
    team.finish(policy, team.weights(learner.objective, "actor.policy."))
