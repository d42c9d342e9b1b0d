"""One iteration of PPO: advantages, value loss, clipped policy loss. The formulas are in objectives.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlrc.compressor.models.device import upload
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.rl.actors import ActionEvaluation, EncodedObservation, build_actor
from rlrc.compressor.rl.config import PPOConfig
from rlrc.compressor.rl.objectives import Critic, PolicyObjective, explained_variance, gae
from rlrc.compressor.rl.rollout_buffer import RolloutBuffer, minibatches
from rlrc.compressor.training.batches import Batch, Batches
from rlrc.compressor.training.distributed import Team
from rlrc.compressor.training.losses import draw_noise

VISION = ("vision.", "vision2.", "projector.")  # frozen


class NotFinite(ArithmeticError):
    """What was expected, and what was found."""


class Learner:
    """Actor, critic and their optimisers."""

    def __init__(self, policy: PolicyModule, config: PPOConfig, batches: Batches, team: Team | None = None) -> None:
        self.policy, self.config, self.batches, self.team = policy, config, batches, team or Team()
        self.actor = build_actor(policy, config.temperature, config.correlation, config.noise)
        critic = Critic(self.actor.width)
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(not name.startswith(VISION))
        trained = [p for p in self.actor.parameters() if p.requires_grad]
        actor_optimizer = torch.optim.AdamW(trained, lr=config.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        value_optimizer = torch.optim.AdamW(critic.parameters(), lr=config.value_rate, weight_decay=0.0)
        self.objective, self.actor_optimizer = self.team.prepare(PolicyObjective(self.actor, config), actor_optimizer)
        self.critic, self.value_optimizer = self.team.prepare(critic, value_optimizer)

    def update(self, rollout: RolloutBuffer, iteration: int) -> dict[str, float]:
        """Train the critic, and after the warm-up the actor. -> metrics.

        Raises NotFinite before any weight changes if rewards, log-probabilities or values are not finite.
        """
        config, team = self.config, self.team
        counts = team.gather(torch.tensor([len(rollout)])).tolist()
        old = self.evaluate(rollout, counts)
        with torch.no_grad():
            values = self.critic(old.hidden.to(team.device)).cpu()
        for name, tensor in (("rewards", rollout.rewards), ("log-probabilities", old.log_prob), ("values", values)):
            self.check(name, tensor)

        advantages = gae(rollout.rewards, values, rollout.last, config.gamma, config.lam)
        returns = advantages + values
        metrics = {
            "explained_variance": explained_variance(team.gather(values), team.gather(returns)),
            "entropy": team.gather(old.entropy.flatten(1).mean(1)).mean().item(),
        }
        passes = 8 if iteration < config.warmup else 3
        metrics["value_loss"] = self.fit_value(old.hidden, returns, counts, passes)
        if iteration < config.warmup:
            return metrics
        everywhere = team.gather(advantages)  # of all processes
        advantages = (advantages - everywhere.mean()) / (everywhere.std() + 1e-6)
        return metrics | self.fit_policy(rollout, old.log_prob, advantages, counts)

    def evaluate(self, rollout: RolloutBuffer, counts: Sequence[int]) -> ActionEvaluation:
        """Log-probabilities, entropies and hidden states of all decisions under the current weights."""
        parts = list[ActionEvaluation]()
        with torch.no_grad():
            for rows, weight in minibatches(counts, self.team.rank, 512, torch.arange(len(rollout))):
                evaluation = self.objective(*self._select(rollout, rows))
                if weight:
                    parts.append(evaluation)
        return ActionEvaluation(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))

    def fit_value(self, hidden: Tensor, returns: Tensor, counts: Sequence[int], passes: int) -> float:
        """-> mean value loss."""
        losses, device = list[Tensor](), self.team.device
        for _ in range(passes):
            for rows, weight in self._shuffle(counts):
                loss = self.critic(upload(hidden[rows], device), upload(returns[rows], device)) * weight
                self.value_optimizer.zero_grad()
                self.team.backward(loss)
                self.value_optimizer.step()
                losses.append(loss.detach())
        means = self.team.means(losses)
        self.check("value losses", torch.tensor(means))
        return float(np.mean(means))

    def fit_policy(
        self, rollout: RolloutBuffer, old_log_prob: Tensor, advantages: Tensor, counts: Sequence[int]
    ) -> dict[str, float]:
        """Epochs of minibatches until the mean KL exceeds ``target_kl``. -> mean metrics."""
        steps, device = list[dict[str, float]](), self.team.device
        for _ in range(self.config.epochs):
            for rows, weight in self._shuffle(counts):
                observation, sampled = self._select(rollout, rows)
                old, advantage = upload(old_log_prob[rows], device), upload(advantages[rows], device)
                loss, metrics = self.objective(observation, sampled, old, advantage, weight, self.draw_demonstrations())
                self.actor_optimizer.zero_grad()
                self.team.backward(loss)
                metrics["gradient_norm"] = self.team.clip(self.objective, 1.0)
                # All numbers of a step at once: the host waits for the device.
                *means, mean_loss = self.team.means([*metrics.values(), loss.detach()])
                self.check("losses", torch.tensor([mean_loss, means[-1]]))
                self.actor_optimizer.step()
                steps.append(dict(zip(metrics, means, strict=True)))
            if np.mean([step["approx_kl"] for step in steps]) > self.config.target_kl:
                break
        mean = {name: float(np.mean([step[name] for step in steps])) for name in steps[0]}
        return mean | {"updates": float(len(steps))}

    def draw_demonstrations(self) -> Batch | None:
        """This process's share of the demonstrations of one step."""
        if not self.config.behaviour_cloning:
            return None
        size, team = self.config.behaviour_batch, self.team
        whole = draw_noise(self.policy, self.batches.draw(team.size * size))
        return whole.part(slice(team.rank * size, (team.rank + 1) * size)).to(team.device)

    def check(self, name: str, values: Tensor) -> None:
        """Raises NotFinite in every process if a value of any process is not finite."""
        broken = values[~values.isfinite()]
        if self.team.mean(torch.tensor(float(len(broken)), device=self.team.device)):
            raise NotFinite(f"finite {name}, found {broken[0].item() if len(broken) else 'others in another process'}")

    def _select(self, rollout: RolloutBuffer, rows: Tensor) -> tuple[EncodedObservation, Tensor]:
        return rollout.observations.rows(rows).to(self.team.device), upload(rollout.sampled[rows], self.team.device)

    def _shuffle(self, counts: Sequence[int]) -> Iterator[tuple[Tensor, float]]:
        orders = [torch.randperm(count) for count in counts]  # of all processes, so that all generators stay alike
        return minibatches(counts, self.team.rank, self.config.minibatch, orders[self.team.rank])

    def state_dict(self) -> dict[str, Any]:
        """The actor (policy and learned noise), the critic, and the states of their optimisers."""
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
