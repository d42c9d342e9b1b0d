"""Stochastic policies for PPO: each actor samples chunks of actions and gives their log-probabilities.

- Tokens (family tiny, discrete OpenVLA-OFT; OpenVLA autoregressively): one categorical distribution, at a temperature,
  and one ratio for every token (RL4VLA, arXiv 2505.19789; SimpleVLA-RL, 2509.09674).
- Numbers (L1 heads of OpenVLA-OFT, ACT): a Gaussian around the policy's action. Its standard deviation is learned, one
  for each dimension, and does not depend on the state (PPO, arXiv 1707.06347, section 6.1).
- Flow (pi0, pi0.5, SmolVLA): Flow-Noise (pi_RL, arXiv 2510.25889, after ReinFlow, 2505.22094). Noise after every Euler
  step makes each step a Gaussian transition whose mean is the step itself, so the chain has an exact log-probability.
  Flow-SDE (Flow-GRPO, 2505.05470) is not used: it changes the mean by a score that is singular at t = 1, so the
  deployed policy, plain Euler steps, would not be the trained policy without noise. ReinFlow's noise network is a table
  here: a learned standard deviation for each step and dimension. Padded dimensions get no noise.

The noise of a dimension is correlated over the steps of a chunk, because independent noise averages out within a chunk
and explores little. The ratios nevertheless treat the numbers as independent. The gradient is then the policy's own
times the correlation matrix, which is positive definite, so it still ascends.

The critic reads the hidden state of the first action token (arXiv 2506.17639, stage 2b): the input of the last module
at the first position. It depends on the whole observation and on no sampled action. A flow policy's expert also
depends on the sampled noise, so its hidden state comes from one more pass, at t = 1 from zeros. (pi_RL averages over
the sampled chain instead; its alternative, the prefix, does not contain pi0's state.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from rlrc.compressor.models import decode
from rlrc.compressor.models.device import of_module, upload
from rlrc.compressor.models.policy import Inputs, Outputs, PolicyModule, select_lengths
from rlrc.compressor.rl.draws import TORCH, Draws

MAX_STD_FACTOR = 3.0  # a learned standard deviation stays within this factor of its initial value


@dataclass
class EncodedObservation:
    """Observations after the vision tower: image tokens (B, N, width); the other fields as in Inputs."""

    image_tokens: Tensor
    ids: Tensor | None = None
    state: Tensor | None = None
    mask: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.image_tokens)

    def rows(self, rows: Tensor) -> EncodedObservation:
        """Select rows, all of it on the host; image tokens become float32."""
        ids, state, mask = (None if x is None else x[rows] for x in (self.ids, self.state, self.mask))
        lengths = select_lengths(self.lengths, rows)
        return EncodedObservation(self.image_tokens[rows].float(), ids, state, mask, lengths)

    def to(self, device: torch.device) -> EncodedObservation:
        ids, state, mask = (None if x is None else upload(x, device) for x in (self.ids, self.state, self.mask))
        return EncodedObservation(upload(self.image_tokens, device), ids, state, mask, self.lengths)


class ActionEvaluation(NamedTuple):
    """``log_prob`` and ``entropy`` (B, ...): one value for each token, number, or number and flow step.

    ``hidden`` (B, width): the input of the critic.
    """

    log_prob: Tensor
    entropy: Tensor
    hidden: Tensor


class Noise(nn.Module):
    """Learned standard deviations, initially ``std`` and always within a factor of MAX_STD_FACTOR of it."""

    def __init__(self, shape: tuple[int, ...], std: float, device: torch.device | None = None) -> None:
        super().__init__()
        self.std = std
        self.raw = nn.Parameter(torch.zeros(shape, device=device))

    def forward(self) -> Tensor:
        # As in ReinFlow, a tanh bounds the noise; unbounded, it grows until the actions are useless.
        return self.std * torch.exp(math.log(MAX_STD_FACTOR) * self.raw.tanh())


class Actor(nn.Module, ABC):
    """A policy that samples actions. ``act`` returns ``sampled`` (B, ...): tokens, actions or a flow chain.

    ``evaluate`` computes the log-probability of ``sampled`` under the current weights.
    """

    def __init__(self, policy: PolicyModule, temperature: float, correlation: float) -> None:
        super().__init__()
        self.policy, self.temperature, self.correlation = policy, temperature, correlation
        self.noise: Noise | None = None
        self.draws = TORCH
        self.width = policy.towers["decoder"].width  # of the critic's input

    def encode(self, inputs: Inputs) -> EncodedObservation:
        image_tokens = decode.encode_images(self.policy, inputs)
        return EncodedObservation(image_tokens, inputs.ids, inputs.state, inputs.mask, inputs.lengths)

    @abstractmethod
    def act(self, observation: EncodedObservation, sample: bool) -> tuple[Tensor, Tensor]:
        """-> normalised actions (B, K, D), and ``sampled``. Without ``sample``: the deployed, deterministic policy."""

    @abstractmethod
    def evaluate(self, observation: EncodedObservation, sampled: Tensor) -> ActionEvaluation:
        """Log-probability and entropy of ``sampled`` under the current weights. Differentiable."""

    def chunk_noise(self, batch: int) -> Tensor:
        """Standard normal (B, K, D), correlated over the K steps of a chunk."""
        action = self.policy.spec.action
        return chunk_noise(batch, action.horizon, action.dim, self.correlation, self.draws)


class ParallelActor(Actor):
    """Tokens of one parallel pass."""

    def act(self, observation: EncodedObservation, sample: bool) -> tuple[Tensor, Tensor]:
        action, logits = self.policy.spec.action, self._logits(observation)
        if not sample:
            return _actions_and_tokens(decode.outputs_from_logits(logits, action))
        rows = sample_tokens(torch.log_softmax(logits / self.temperature, -1), self.correlation, self.draws)
        actions, tokens = _actions_and_tokens(decode.outputs_from_rows(rows, action))
        return actions.masked_fill(~logits.isfinite().all(-1), float("nan")), tokens

    def evaluate(self, observation: EncodedObservation, sampled: Tensor) -> ActionEvaluation:
        with record_inputs(last_module(self.policy)) as inputs:
            logits = self._logits(observation)
        return evaluate_tokens(
            logits / self.temperature, logit_rows(sampled, self.policy), inputs[0][:, 0, : self.width]
        )

    def _logits(self, observation: EncodedObservation) -> Tensor:
        policy = cast(decode.Parallel, self.policy)
        return policy.decode(observation.image_tokens, observation.ids, observation.mask, observation.state).float()


class AutoregressiveActor(Actor):
    """Tokens one after the other, each conditioned on those before it (the chunk is one step)."""

    def act(self, observation: EncodedObservation, sample: bool) -> tuple[Tensor, Tensor]:
        action = self.policy.spec.action

        def steps(image_tokens: Tensor, ids: Tensor, rows: decode.Rows) -> Tensor:
            def choose(logits: Tensor) -> Tensor:
                """(B, rows) -> (B, 1)."""
                if not sample:
                    return logits.argmax(-1, keepdim=True)
                noise = self.draws.exponential(rows.numbers, logits.shape[1])
                return draw_row(torch.softmax(logits / self.temperature, -1), noise)

            return self._steps(image_tokens, ids, choose)

        # The rows of the logits, and whether these were finite, together, so that they are reordered together.
        both = self._by_length(observation, steps)
        rows, finite = both.unflatten(1, (2, action.horizon, action.dim)).unbind(1)
        actions, tokens = _actions_and_tokens(decode.outputs_from_rows(rows, action))
        return actions.masked_fill(finite == 0, float("nan")), tokens

    def _steps(self, image_tokens: Tensor, ids: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """-> the chosen rows (B, N), then 1 or 0 for each: whether its logits are finite."""
        policy, action = cast(decode.Autoregressive, self.policy), self.policy.spec.action
        assert action.tokens is not None
        past, chosen, finite = None, list[Tensor](), list[Tensor]()
        for _ in range(action.horizon * action.dim):
            logits, past = policy.step(None if chosen else image_tokens, ids, past)
            chosen.append(choose(logits))
            finite.append(logits.isfinite().all(-1, keepdim=True).to(chosen[-1].dtype))
            ids = action.tokens.offset + chosen[-1]
        return torch.cat([*chosen, *finite], 1)

    def evaluate(self, observation: EncodedObservation, sampled: Tensor) -> ActionEvaluation:
        tokens = sampled.flatten(1)

        def teacher_forced(image_tokens: Tensor, ids: Tensor, rows: decode.Rows) -> Tensor:
            """Logits and the hidden state of the first token, concatenated, so that they are reordered together."""
            sequence = torch.cat([ids, tokens[rows.index, :-1]], 1)
            with record_inputs(last_module(self.policy)) as inputs:
                logits = cast(decode.Autoregressive, self.policy).last_logits(image_tokens, sequence, tokens.shape[1])
            return torch.cat([logits.flatten(1), inputs[0][:, 0].float()], 1)

        joint = self._by_length(observation, teacher_forced)
        logits, hidden = joint[:, : -self.width], joint[:, -self.width :]
        logits = logits.reshape(*sampled.shape, -1)
        return evaluate_tokens(logits / self.temperature, logit_rows(sampled, self.policy), hidden)

    def _by_length(
        self, observation: EncodedObservation, one: Callable[[Tensor, Tensor, decode.Rows], Tensor]
    ) -> Tensor:
        assert observation.ids is not None
        return decode.map_by_length(
            observation.image_tokens, observation.ids, observation.mask, observation.lengths, one
        )


class GaussianActor(Actor):
    """Gaussian noise around the numbers of one pass."""

    def __init__(self, policy: PolicyModule, temperature: float, correlation: float, std: float) -> None:
        super().__init__(policy, temperature, correlation)
        self.noise: Noise = Noise((policy.spec.action.dim,), std, of_module(policy))

    def act(self, observation: EncodedObservation, sample: bool) -> tuple[Tensor, Tensor]:
        actions = self._mean(observation)
        if sample:
            actions = actions + self.noise() * upload(self.chunk_noise(len(observation)), actions.device)
        return actions, actions

    def evaluate(self, observation: EncodedObservation, sampled: Tensor) -> ActionEvaluation:
        with record_inputs(last_module(self.policy)) as inputs:
            mean = self._mean(observation)
        return evaluate_gaussian(mean, self.noise(), sampled, inputs[0][:, 0, : self.width])

    def _mean(self, observation: EncodedObservation) -> Tensor:
        policy = cast(decode.Parallel, self.policy)
        return policy.decode(observation.image_tokens, observation.ids, observation.mask, observation.state).float()


class FlowActor(Actor):
    """Euler steps with noise after each. ``sampled`` is the chain (B, steps + 1, K, width), from noise to actions.

    The first state of the chain does not depend on the policy, so it does not contribute to the log-probability.
    """

    def __init__(self, policy: PolicyModule, temperature: float, correlation: float, std: float) -> None:
        super().__init__(policy, temperature, correlation)
        assert policy.spec.flow is not None
        self.steps = policy.spec.flow.steps
        self.noise: Noise = Noise((self.steps, policy.spec.action.dim), std, of_module(policy))
        self.width = policy.towers["expert"].width

    def act(self, observation: EncodedObservation, sample: bool) -> tuple[Tensor, Tensor]:
        spec = self.policy.spec
        assert spec.flow is not None
        step, dim = self._steps(observation), spec.action.dim
        noise = self.draws.normal(len(observation), spec.action.horizon, spec.flow.width)
        x = upload(noise, observation.image_tokens.device)
        chain = [x]
        for i in range(self.steps):
            x = step(x, i)
            if sample:
                noise = self.noise()[i] * upload(self.chunk_noise(len(observation)), x.device)
                x = torch.cat([x[..., :dim] + noise, x[..., dim:]], -1)
            chain.append(x)
        return x[..., :dim], torch.stack(chain, 1)

    def evaluate(self, observation: EncodedObservation, sampled: Tensor) -> ActionEvaluation:
        step, dim = self._steps(observation), self.policy.spec.action.dim
        mean = torch.stack([step(sampled[:, i], i)[..., :dim] for i in range(self.steps)], 1)
        with record_inputs(last_module(self.policy)) as inputs:
            step(torch.zeros_like(sampled[:, 0]), 0)
        return evaluate_gaussian(mean, self.noise()[:, None], sampled[:, 1:, :, :dim], inputs[0][:, 0])

    def _steps(self, observation: EncodedObservation) -> Callable[[Tensor, int], Tensor]:
        """Encode the prefix once. -> a function (x (B, K, width), step number) -> x after that step, without noise."""
        policy = cast(decode.Flow, self.policy)
        past, mask = policy.prefix(observation.image_tokens, observation.ids, observation.mask, observation.state)

        def step(x: Tensor, i: int) -> Tensor:
            t = torch.full((len(x),), 1 - i / self.steps, device=x.device)
            return x - policy.velocity(past, mask, observation.state, x, t).float() / self.steps

        return step


def build_actor(policy: PolicyModule, temperature: float = 1.0, correlation: float = 0.0, std: float = 0.1) -> Actor:
    """``temperature`` applies to tokens; ``std``, the initial standard deviation of the noise, to other actions."""
    if policy.spec.flow is not None:
        return FlowActor(policy, temperature, correlation, std)
    if not policy.spec.action.bins:
        return GaussianActor(policy, temperature, correlation, std)
    actor = AutoregressiveActor if policy.spec.decode == "autoregressive" else ParallelActor
    return actor(policy, temperature, correlation)


def chunk_noise(batch: int, steps: int, dims: int, correlation: float, draws: Draws = TORCH) -> Tensor:
    """Standard normal (B, K, D); the K values of a dimension have this pairwise correlation."""
    shared, own = draws.normal(batch, 1, dims), draws.normal(batch, steps, dims)
    noise: Tensor = correlation**0.5 * shared + (1 - correlation) ** 0.5 * own
    return noise


def _actions_and_tokens(outputs: Outputs) -> tuple[Tensor, Tensor]:
    assert outputs.tokens is not None
    return outputs.actions, outputs.tokens


def draw_row(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Draw one row (B, 1) of each distribution (B, rows) with exponential noise of the same shape.

    On the CPU bit for bit ``torch.multinomial``, which on a GPU draws from another generator and waits for its input.
    """
    return (probabilities / upload(noise, probabilities.device)).argmax(-1, keepdim=True)


def sample_tokens(log_probs: Tensor, correlation: float, draws: Draws = TORCH) -> Tensor:
    """Draw tokens (B, K, D) from log-probabilities (B, K, D, bins).

    Every token has exactly its own distribution. A Gaussian copula correlates the K tokens of a dimension.
    """
    batch, steps, dims, bins = log_probs.shape
    uniform = upload(torch.special.ndtr(chunk_noise(batch, steps, dims, correlation, draws)), log_probs.device)
    cumulative = log_probs.exp().cumsum(-1)
    rows: Tensor = (cumulative < uniform[..., None] * cumulative[..., -1:]).sum(-1).clamp(max=bins - 1)
    return rows


def evaluate_tokens(logits: Tensor, rows: Tensor, hidden: Tensor) -> ActionEvaluation:
    """Categorical log-probability and entropy: logits (B, K, D, rows), sampled ``rows`` (B, K, D)."""
    log_probs = torch.log_softmax(logits, -1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return ActionEvaluation(log_probs.gather(-1, rows[..., None])[..., 0], entropy, hidden.float())


def evaluate_gaussian(mean: Tensor, std: Tensor, values: Tensor, hidden: Tensor) -> ActionEvaluation:
    """Gaussian log-probability and entropy of each of the sampled ``values``."""
    distribution: Any = Normal(mean, std.expand_as(mean), validate_args=False)
    return ActionEvaluation(distribution.log_prob(values), distribution.entropy(), hidden.float())


def logit_rows(tokens: Tensor, policy: PolicyModule) -> Tensor:
    """Tokens as returned by ``decode`` -> their rows in the logits."""
    vocabulary = policy.spec.action.tokens
    return tokens if vocabulary is None else tokens - vocabulary.offset


def last_module(policy: PolicyModule) -> nn.Module:
    """The module that maps hidden states to actions, logits or velocities."""
    module = policy.head if policy.spec.flow is None else policy.action_out
    assert isinstance(module, nn.Module)
    return module


@contextmanager
def record_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the first input of every call of the module."""
    inputs = list[Tensor]()
    hook = module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        yield inputs
    finally:
        hook.remove()
