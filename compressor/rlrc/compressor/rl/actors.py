"""A policy as reinforcement learning sees it: chunks that are drawn, and how probable it was to draw them.

- Tokens (family tiny, discrete OpenVLA-OFT; OpenVLA one after the other): every token has its own distribution, at a
  temperature, and its own ratio (RL4VLA, arXiv 2505.19789; SimpleVLA-RL, 2509.09674).
- Numbers (L1 heads of OpenVLA-OFT, ACT): a Gaussian around the answer, its standard deviation learned, one for each
  dimension and no function of the state (as in PPO, arXiv 1707.06347, section 6.1).
- Flow (pi0, pi0.5, SmolVLA): Flow-Noise (pi_RL, arXiv 2510.25889, after ReinFlow, 2505.22094): noise after every Euler
  step makes each a Gaussian transition whose mean is the step itself, so that the chain has an exact log-probability.
  Not Flow-SDE (Flow-GRPO, 2505.05470): it changes the mean by a score that is singular at t = 1, and what is deployed,
  the plain Euler steps, would no longer be this policy without its noise. ReinFlow's noise network is a table here, a
  learned standard deviation for each step and dimension. Dimensions beyond the robot's follow the plain steps.

The noise of a dimension is correlated over the steps of a chunk: independent noise averages out within one and explores
nothing. Ratios are those of single numbers all the same; the gradient is then the policy's own times the correlation
matrix, which is positive definite: it still goes uphill, and alike for all steps of a chunk.

What the critic reads is the hidden state of the first action token, as in the paper (arXiv 2506.17639, stage 2b), which
has seen the whole observation and no sampled action: the last module's input at the first place. A flow policy's expert
would also see the sampled noise; its hidden state is therefore that of one more pass, at t = 1 from zeros (pi_RL
averages over the sampled chain instead; its other choice, the prefix, does not know pi0's state).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from rlrc.compressor.models import decode
from rlrc.compressor.models.policy import Inputs, PolicyModule

NARROWEST = 3.0  # a learned standard deviation stays within this factor of the one it starts from


@dataclass
class EncodedObservation:
    """Observations behind the vision tower: image tokens (B, N, width), and the others as in Inputs."""

    image_tokens: Tensor
    ids: Tensor | None = None
    state: Tensor | None = None
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.image_tokens)

    def rows(self, rows: Tensor) -> EncodedObservation:
        """Some of them, image tokens in float32 whatever they were kept in."""
        others = (None if x is None else x[rows] for x in (self.ids, self.state, self.mask))
        return EncodedObservation(self.image_tokens[rows].float(), *others)

    def to(self, device: torch.device) -> EncodedObservation:
        others = (None if x is None else x.to(device) for x in (self.ids, self.state, self.mask))
        return EncodedObservation(self.image_tokens.to(device), *others)


class ActionEvaluation(NamedTuple):
    """``log_prob`` and ``entropy`` (B, ...): one number for every token, or number, or number and flow step.

    ``hidden`` (B, width): what the critic reads.
    """

    log_prob: Tensor
    entropy: Tensor
    hidden: Tensor


class Noise(nn.Module):
    """Learned standard deviations of this shape, which start at ``std`` and stay within a factor of NARROWEST."""

    def __init__(self, shape: tuple[int, ...], std: float) -> None:
        super().__init__()
        self.std = std
        self.raw = nn.Parameter(torch.zeros(shape))

    def forward(self) -> Tensor:
        # ReinFlow bounds its noise by a tanh as well: unbounded, it grows until the steps no longer make sense.
        return self.std * torch.exp(math.log(NARROWEST) * self.raw.tanh())


class Actor(nn.Module, ABC):
    """``trace``: what was drawn, all that ``evaluate`` needs to know of it; its first dimension is the batch's."""

    def __init__(self, policy: PolicyModule, temperature: float, correlation: float) -> None:
        super().__init__()
        self.policy, self.temperature, self.correlation = policy, temperature, correlation
        self.noise: Noise | None = None
        self.width = policy.towers["decoder"].width  # of what the critic reads

    def encode(self, inputs: Inputs) -> EncodedObservation:
        return EncodedObservation(decode.encode_images(self.policy, inputs), inputs.ids, inputs.state, inputs.mask)

    @abstractmethod
    def act(self, seen: EncodedObservation, sample: bool) -> tuple[Tensor, Tensor]:
        """-> normalised actions (B, K, D), and the trace. ``sample``: drawn; otherwise what is deployed."""

    @abstractmethod
    def evaluate(self, seen: EncodedObservation, trace: Tensor) -> ActionEvaluation:
        """How probable what was drawn is now. Differentiable."""

    def chunk_noise(self, batch: int) -> Tensor:
        """Standard normal (B, K, D), correlated over the K steps of a chunk."""
        action = self.policy.spec.action
        return chunk_noise(batch, action.horizon, action.dim, self.correlation)


class ParallelActor(Actor):
    """Tokens of one pass."""

    def act(self, seen: EncodedObservation, sample: bool) -> tuple[Tensor, Tensor]:
        action, logits = self.policy.spec.action, self._logits(seen)
        outputs = decode.outputs_from_logits(logits, action)
        if sample and outputs.actions.isfinite().all():  # nothing is drawn of logits that are not
            drawn = sample_tokens(torch.log_softmax(logits / self.temperature, -1), self.correlation)
            outputs = decode.outputs_from_rows(drawn, action)
        assert outputs.tokens is not None
        return outputs.actions, outputs.tokens

    def evaluate(self, seen: EncodedObservation, trace: Tensor) -> ActionEvaluation:
        with reading(last_module(self.policy)) as read:
            logits = self._logits(seen)
        return judged_tokens(logits / self.temperature, rows_of(trace, self.policy), read[0][:, 0, : self.width])

    def _logits(self, seen: EncodedObservation) -> Tensor:
        policy = cast(decode.Parallel, self.policy)
        return policy.decode(seen.image_tokens, seen.ids, seen.mask, seen.state).float()


class AutoregressiveActor(Actor):
    """Tokens one after the other, each drawn from what the ones before it leave (the chunk is one step)."""

    def act(self, seen: EncodedObservation, sample: bool) -> tuple[Tensor, Tensor]:
        action = self.policy.spec.action

        def choose(logits: Tensor) -> Tensor:
            """(B, rows) -> (B, 1)."""
            decode.check_finite_outputs(logits, "logits")
            if not sample:
                return logits.argmax(-1, keepdim=True)
            return torch.multinomial(torch.softmax(logits / self.temperature, -1), 1)

        rows = self._by_length(seen, lambda image_tokens, ids, _: self._steps(image_tokens, ids, choose))
        outputs = decode.outputs_from_rows(rows.unflatten(1, (action.horizon, action.dim)), action)
        assert outputs.tokens is not None
        return outputs.actions, outputs.tokens

    def _steps(self, image_tokens: Tensor, ids: Tensor, choose: Callable[[Tensor], Tensor]) -> Tensor:
        policy, action = cast(decode.Autoregressive, self.policy), self.policy.spec.action
        assert action.tokens is not None
        past, chosen = None, list[Tensor]()
        for _ in range(action.horizon * action.dim):
            logits, past = policy.step(None if chosen else image_tokens, ids, past)
            chosen.append(choose(logits))
            ids = action.tokens.offset + chosen[-1]
        return torch.cat(chosen, 1)

    def evaluate(self, seen: EncodedObservation, trace: Tensor) -> ActionEvaluation:
        given = trace.flatten(1)

        def force(image_tokens: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
            """Logits, and behind them the hidden state of the first: one tensor, to be put in order together."""
            sequence = torch.cat([ids, given[rows, :-1]], 1)
            with reading(last_module(self.policy)) as read:
                logits = cast(decode.Autoregressive, self.policy).last_logits(image_tokens, sequence, given.shape[1])
            return torch.cat([logits.flatten(1), read[0][:, 0].float()], 1)

        found = self._by_length(seen, force)
        logits, hidden = found[:, : -self.width], found[:, -self.width :]
        logits = logits.reshape(*trace.shape, -1)
        return judged_tokens(logits / self.temperature, rows_of(trace, self.policy), hidden)

    def _by_length(self, seen: EncodedObservation, one: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        assert seen.ids is not None
        return decode.map_by_length(seen.image_tokens, seen.ids, seen.mask, one)


class GaussianActor(Actor):
    """Numbers of one pass, with noise around them."""

    def __init__(self, policy: PolicyModule, temperature: float, correlation: float, std: float) -> None:
        super().__init__(policy, temperature, correlation)
        self.noise: Noise = Noise((policy.spec.action.dim,), std)

    def act(self, seen: EncodedObservation, sample: bool) -> tuple[Tensor, Tensor]:
        actions = self._mean(seen)
        if sample:
            actions = actions + self.noise() * self.chunk_noise(len(seen)).to(actions)
        return actions, actions

    def evaluate(self, seen: EncodedObservation, trace: Tensor) -> ActionEvaluation:
        with reading(last_module(self.policy)) as read:
            mean = self._mean(seen)
        around = Normal(mean, self.noise().expand_as(mean), validate_args=False)
        return ActionEvaluation(around.log_prob(trace), around.entropy(), read[0][:, 0, : self.width].float())

    def _mean(self, seen: EncodedObservation) -> Tensor:
        policy = cast(decode.Parallel, self.policy)
        return policy.decode(seen.image_tokens, seen.ids, seen.mask, seen.state).float()


class FlowActor(Actor):
    """Euler steps with noise after each. The trace is the chain (B, steps + 1, K, width), from noise to actions.

    Its first link is drawn before the policy has a say, and so has no part in the ratio.
    """

    def __init__(self, policy: PolicyModule, temperature: float, correlation: float, std: float) -> None:
        super().__init__(policy, temperature, correlation)
        assert policy.spec.flow is not None
        self.steps = policy.spec.flow.steps
        self.noise: Noise = Noise((self.steps, policy.spec.action.dim), std)
        self.width = policy.towers["expert"].width

    def act(self, seen: EncodedObservation, sample: bool) -> tuple[Tensor, Tensor]:
        spec = self.policy.spec
        assert spec.flow is not None
        step, dim = self._steps(seen), spec.action.dim
        x = torch.randn(len(seen), spec.action.horizon, spec.flow.width).to(seen.image_tokens.device)
        chain = [x]
        for i in range(self.steps):
            x = step(x, i)
            if sample:
                noise = self.noise()[i] * self.chunk_noise(len(seen)).to(x)
                x = torch.cat([x[..., :dim] + noise, x[..., dim:]], -1)
            chain.append(x)
        return x[..., :dim], torch.stack(chain, 1)

    def evaluate(self, seen: EncodedObservation, trace: Tensor) -> ActionEvaluation:
        step, dim = self._steps(seen), self.policy.spec.action.dim
        mean = torch.stack([step(trace[:, i], i)[..., :dim] for i in range(self.steps)], 1)
        around = Normal(mean, self.noise()[:, None].expand_as(mean), validate_args=False)
        with reading(last_module(self.policy)) as read:
            step(torch.zeros_like(trace[:, 0]), 0)
        return ActionEvaluation(around.log_prob(trace[:, 1:, :, :dim]), around.entropy(), read[0][:, 0].float())

    def _steps(self, seen: EncodedObservation) -> Callable[[Tensor, int], Tensor]:
        """Reads the prefix once; -> (x (B, K, width), number of the step) -> x after it, without noise."""
        policy = cast(decode.Flow, self.policy)
        past, mask = policy.prefix(seen.image_tokens, seen.ids, seen.mask, seen.state)

        def step(x: Tensor, i: int) -> Tensor:
            t = torch.full((len(x),), 1 - i / self.steps, device=x.device)
            return x - policy.velocity(past, mask, seen.state, x, t).float() / self.steps

        return step


def actor_of(policy: PolicyModule, temperature: float = 1.0, correlation: float = 0.0, std: float = 0.1) -> Actor:
    """``temperature`` of tokens; ``std``: the initial standard deviation of the noise of all others."""
    if policy.spec.flow is not None:
        return FlowActor(policy, temperature, correlation, std)
    if not policy.spec.action.bins:
        return GaussianActor(policy, temperature, correlation, std)
    kind = AutoregressiveActor if policy.spec.decode == "autoregressive" else ParallelActor
    return kind(policy, temperature, correlation)


def chunk_noise(batch: int, steps: int, dims: int, correlation: float) -> Tensor:
    """Standard normal (B, K, D); the numbers of a dimension have this correlation over the K steps."""
    shared, own = torch.randn(batch, 1, dims), torch.randn(batch, steps, dims)
    return correlation**0.5 * shared + (1 - correlation) ** 0.5 * own


def sample_tokens(log_probs: Tensor, correlation: float) -> Tensor:
    """Draw tokens (B, K, D) from log-probabilities (B, K, D, bins).

    Every token has exactly its own distribution, but the noise of a dimension is shared over the K steps of the chunk
    with the given correlation (a Gaussian copula).
    """
    batch, steps, dims, bins = log_probs.shape
    uniform = torch.special.ndtr(chunk_noise(batch, steps, dims, correlation)).to(log_probs.device)
    cumulative = log_probs.exp().cumsum(-1)
    return (cumulative < uniform[..., None] * cumulative[..., -1:]).sum(-1).clamp(max=bins - 1)


def judged_tokens(logits: Tensor, rows: Tensor, hidden: Tensor) -> ActionEvaluation:
    """Of the logits (B, K, D, rows) that the tokens' rows (B, K, D) were drawn from."""
    log_probs = torch.log_softmax(logits, -1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return ActionEvaluation(log_probs.gather(-1, rows[..., None])[..., 0], entropy, hidden.float())


def rows_of(tokens: Tensor, policy: PolicyModule) -> Tensor:
    """Tokens as ``decode`` gives them -> their rows in the logits."""
    vocabulary = policy.spec.action.tokens
    return tokens if vocabulary is None else tokens - vocabulary.offset


def last_module(policy: PolicyModule) -> nn.Module:
    """What makes actions, logits or velocities of hidden states."""
    module = policy.head if policy.spec.flow is None else policy.action_out
    assert isinstance(module, nn.Module)
    return module


@contextmanager
def reading(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the module is given."""
    read = list[Tensor]()
    hook = module.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    try:
        yield read
    finally:
        hook.remove()
