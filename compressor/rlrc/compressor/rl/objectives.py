"""The formulas of PPO in the order of the algorithm (Schulman et al., 2017, arXiv 1707.06347), and its two losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlrc.compressor.models import precision
from rlrc.compressor.rl.actors import Actor, EncodedObservation
from rlrc.compressor.rl.config import PPOConfig
from rlrc.compressor.training.batches import Batch
from rlrc.compressor.training.losses import chunk_loss


def gae(rewards: Tensor, values: Tensor, last: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimate (Schulman et al., 2016, arXiv 1506.02438, equation 16).

    rewards, values, last (N,) hold several episodes end to end. ``last`` marks the final decision of an episode; the
    value after it is 0.
    """
    next_advantage = next_value = 0.0
    advantages = []
    # Plain floats: indexing tensors would take longer than the network.
    for reward, value, ends in reversed(list(zip(rewards.tolist(), values.tolist(), last.tolist(), strict=True))):
        if ends:
            next_advantage = next_value = 0.0
        delta = reward + gamma * next_value - value
        next_advantage = delta + gamma * lam * next_advantage
        next_value = value
        advantages.append(next_advantage)
    return torch.tensor(advantages[::-1])


def ppo_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negated clipped surrogate objective (equation 7), and metrics, which stay on the device.

    log_prob, old_log_prob (B, ...) have one value for each token; advantage (B,). The loss is a sum over the tokens of
    a decision and a mean over decisions.
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.exp()
    advantage = advantage.reshape(-1, *[1] * (ratio.ndim - 1))
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    with torch.no_grad():
        metrics = {
            "approx_kl": ((ratio - 1) - log_ratio).mean(),  # k3 of Schulman, "Approximating KL divergence"
            "clip_fraction": ((ratio - 1).abs() > clip).float().mean(),
        }
    return -surrogate.flatten(1).sum(1).mean(), metrics


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns)."""
    return float(1 - (returns - values).var() / returns.var().clamp(min=1e-8))


class PolicyObjective(nn.Module):
    """The actor's loss, in this process's precision: clipped surrogate plus behaviour cloning.

    A module, so that DDP and FSDP can wrap it.
    """

    def __init__(self, actor: Actor, config: PPOConfig) -> None:
        super().__init__()
        self.actor, self.config = actor, config

    def forward(
        self,
        observation: EncodedObservation,
        sampled: Tensor,
        old_log_prob: Tensor | None = None,
        advantage: Tensor | None = None,
        weight: float = 1.0,
        demonstrations: Batch | None = None,
    ) -> Any:
        """-> loss and metrics, or an ActionEvaluation if there is no ``old_log_prob``."""
        config = self.config
        with precision.autocast(sampled.device.type):
            evaluation = self.actor.evaluate(observation, sampled)
            if old_log_prob is None:
                return evaluation
            assert advantage is not None
            loss, metrics = ppo_loss(evaluation.log_prob, old_log_prob, advantage, config.clip)
            loss, metrics = loss * weight, {name: value * weight for name, value in metrics.items()}
            if demonstrations is not None:
                bc_loss, _ = chunk_loss(self.actor.policy, demonstrations, config.smoothing)
                metrics["bc_loss"] = bc_loss.detach()
                # The surrogate is a sum over tokens and the cloning loss a mean: bring both to the same scale.
                loss = loss + config.behaviour_cloning * old_log_prob[0].numel() * bc_loss
        return loss, metrics


class Critic(nn.Module):
    """A small MLP on the hidden state of the first action token. Its values start at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = nn.Linear(256, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.value = nn.Sequential(nn.Linear(width, 256), nn.SiLU(), last)

    def forward(self, hidden: Tensor, returns: Tensor | None = None) -> Tensor:
        """hidden (B, width) -> values (B,), or with returns (B,) the value loss."""
        values: Tensor = self.value(hidden)[:, 0]
        return values if returns is None else F.huber_loss(values, returns)
