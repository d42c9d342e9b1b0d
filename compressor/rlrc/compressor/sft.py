"""Supervised fine-tuning: cross-entropy to the expert's action bins, on demonstrations and on own states (DAgger).

With ``dagger_rounds`` the policy plays episodes during training and the scripted expert, which answers in any state,
labels every decision; at a random decision the expert takes over, so that late stages of a task are seen as well (Ross
et al., 2011, arXiv 1011.0686). Everything is reproducible by seed for a given number of threads and workers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlrc.compressor.backbones.tiny import TinyPolicy
from rlrc.compressor.data import Batches, DemonstrationConfig, Samples, demonstrations
from rlrc.compressor.rollout import Mode, Request, Rollouts
from rlrc.compressor.run import Run
from rlrc.envs.metaworld import TASKS
from rlrc.envs.seeds import DEMONSTRATION, scene
from rlrc.errors import UserError
from rlrc.runtime.preprocess import Tokenizer, bin_centers

# DAgger's scenes lie in the upper half of the demonstration seeds, apart from those of plain demonstrations.
DAGGER = DEMONSTRATION[len(DEMONSTRATION) // 2 :]
LOG_EVERY, SAVE_EVERY = 50, 500  # steps; the second is a multiple of the first


@dataclass(frozen=True)
class SFTConfig:
    steps: int = 2000
    """optimiser steps"""
    batch: int = 128
    """samples a step"""
    rate: float = 8e-4
    """peak learning rate of AdamW"""
    warmup: int = 100
    """steps of linear warm-up"""
    decay: float = 0.45
    """last part of the steps over which the rate falls linearly to 2 %"""
    weight_decay: float = 0.02
    smoothing: float = 2.0
    """standard deviation, in bins, of the target distribution around the expert's action"""
    state_noise: float = 0.01
    """standard deviation of the noise on the normalised state"""
    demonstrations: int = 60
    """expert episodes a task"""
    first_seed: int = DEMONSTRATION.start
    """scene of the first demonstration"""
    dagger_rounds: int = 0
    """rounds of DAgger, spread evenly from dagger_start to dagger_end"""
    dagger_start: float = 0.1
    """part of the steps before the first round"""
    dagger_end: float = 0.85
    """part of the steps before the last round"""
    dagger_episodes: int = 208
    """episodes a round, all tasks together; tasks that fail more get more"""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "demonstrations", "dagger_episodes"):
            if getattr(self, name) < 1:
                raise UserError(f"expected sft.{name} >= 1, found {getattr(self, name)}")
        for name in ("rate", "smoothing"):
            if not getattr(self, name) > 0:
                raise UserError(f"expected sft.{name} > 0, found {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "state_noise", "dagger_rounds", "seed"):
            if not getattr(self, name) >= 0:
                raise UserError(f"expected sft.{name} >= 0, found {getattr(self, name)}")
        for name in ("decay", "dagger_start", "dagger_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"expected sft.{name} within [0, 1], found {getattr(self, name)}")
        scenes = range(self.first_seed, self.first_seed + self.demonstrations)
        if scenes[0] not in DEMONSTRATION or scenes[-1] not in DEMONSTRATION:
            raise UserError(
                f"expected sft.first_seed within {DEMONSTRATION.start} to {DEMONSTRATION.stop - self.demonstrations}, "
                f"the scenes for demonstrations, found {self.first_seed}"
            )
        if self.dagger_start > self.dagger_end:
            raise UserError(
                f"expected sft.dagger_start <= sft.dagger_end, found {self.dagger_start} and {self.dagger_end}"
            )
        if (possible := len(self.rounds())) != self.dagger_rounds:
            raise UserError(
                f"expected sft.dagger_rounds to fall on different steps, found {self.dagger_rounds} rounds "
                f"on {possible} of {self.steps} steps; ask for fewer rounds or more steps"
            )

    def rounds(self) -> dict[int, int]:
        """Step -> number of the DAgger round before it."""
        spread = np.linspace(self.dagger_start, self.dagger_end, self.dagger_rounds)
        return {min(int(part * self.steps), self.steps - 1): i for i, part in enumerate(spread)}

    def rate_at(self, step: int) -> float:
        remaining = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.rate * min(1.0, (step + 1) / max(1, self.warmup)) * max(0.02, min(1.0, remaining))


def smoothed_cross_entropy(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy of logits (..., bins) to a Gaussian of ``smoothing`` bins around target (...) in [-1, 1]."""
    bins = logits.shape[-1]
    centers = torch.from_numpy(bin_centers(bins)).to(logits.device)
    distance = (target.clamp(float(centers[0]), float(centers[-1]))[..., None] - centers) * (bins / (2 * smoothing))
    weight = torch.softmax(-0.5 * distance**2, -1)
    return -(weight * F.log_softmax(logits, -1)).sum(-1).mean()


def optimizer(policy: TinyPolicy, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices only: not norms, biases, positions or embeddings."""
    matrices = [
        p
        for n, p in policy.named_parameters()
        if p.ndim == 2 and not n.startswith(("embedding", "query", "vision.position"))
    ]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in policy.parameters() if id(parameter) not in chosen]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def train_step(
    policy: TinyPolicy, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...], smoothing: float
) -> dict[str, float]:
    pixels, ids, state, chunk = batch
    with torch.autocast("cpu", torch.bfloat16):
        logits = policy(pixels, ids, state)
    loss = smoothed_cross_entropy(logits, chunk, smoothing)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    error = (torch.from_numpy(bin_centers(logits.shape[-1]))[logits.argmax(-1)] - chunk).abs().mean()
    return {"loss": loss.item(), "l1": error.item(), "gradient_norm": float(norm)}


def dagger_requests(config: SFTConfig, number: int, failures: dict[str, float]) -> list[Request]:
    """Episodes of one round: more for tasks that fail; in most the expert takes over at a random decision."""
    rng = np.random.default_rng((config.seed, number))
    weight = np.array([0.15 + failures.get(task, 1.0) for task in TASKS])
    tasks = rng.choice(list(TASKS), config.dagger_episodes, p=weight / weight.sum())
    first = number * config.dagger_episodes + config.seed * 100_000
    handover = [int(decision) if rng.random() < 0.6 else None for decision in rng.integers(2, 30, len(tasks))]
    return [Request(str(task), scene(DAGGER, first + i), handover[i]) for i, task in enumerate(tasks)]


def ids_of_tasks(tokenizer: Tokenizer) -> np.ndarray:
    return np.stack([tokenizer(task.instruction) for task in TASKS.values()])


def sft(
    policy: TinyPolicy, config: SFTConfig, rollouts: Rollouts, run: Run, progress: Callable[[int, str], None]
) -> None:
    """Train ``policy`` in place; ``progress(step, text)`` now and then. A run folder with a saved state is resumed."""
    torch.manual_seed(config.seed)
    tokenizer = rollouts.load_tokenizer()
    progress(0, "playing demonstrations, unless they are in the cache")
    samples = demonstrations(DemonstrationConfig(config.demonstrations, config.first_seed), rollouts)
    optim = optimizer(policy, config.rate, config.weight_decay)
    first, failures = 0, dict[str, float]()
    batches = Batches(samples, policy.spec, ids_of_tasks(tokenizer), config.seed)
    if (saved := run.load()) is not None:
        first, failures = saved["step"], saved["failures"]
        policy.load_state_dict(saved["policy"])
        optim.load_state_dict(saved["optimizer"])
        rounds = [Samples.load(run.folder / f"dagger-{i}.npz") for i in range(saved["rounds"])]
        batches.samples = Samples.join([samples, *rounds])
        batches.rng.bit_generator.state = json.loads(saved["rng"])

    progress(first, "training")
    schedule, sums = config.rounds(), dict[str, float]()
    done_rounds = sum(step < first for step in schedule)
    for step in range(first, config.steps):
        if step in schedule and schedule[step] >= done_rounds:
            number = schedule[step]
            requests = dagger_requests(config, number, failures)
            progress(step, f"DAgger round {number + 1} of {config.dagger_rounds}: {len(requests)} episodes")
            episodes = rollouts.run(requests, policy, Mode(label=True, keep="pictures"))
            fresh = Samples.of(episodes)
            fresh.save(run.folder / f"dagger-{number}.npz")
            batches.samples = Samples.join([batches.samples, fresh])
            unaided = [episode for request, episode in zip(requests, episodes, strict=True) if request.handover is None]
            for task in {episode.task for episode in unaided}:
                failures[task] = 1 - float(np.mean([episode.success for episode in unaided if episode.task == task]))
            # Tasks are drawn by their failures: a mean over episodes would understate the policy, one over tasks not.
            success = {f"success {task}": 1 - rate for task, rate in failures.items()}
            run.log(
                "dagger",
                step + 1,  # a state saved after ``step`` steps does not know this round: resuming drops and repeats it
                fresh=len(fresh),
                episodes=len(unaided),
                success=float(np.mean(list(success.values()))),
                **success,
            )
            done_rounds = number + 1
            progress(step, "training")
        policy.train()
        for group in optim.param_groups:
            group["lr"] = config.rate_at(step)
        pixels, ids, state, chunk = batches.draw(config.batch)
        state = state + config.state_noise * torch.randn_like(state)
        for name, value in train_step(policy, optim, (pixels, ids, state, chunk), config.smoothing).items():
            sums[name] = sums.get(name, 0.0) + value
        if (step + 1) % LOG_EVERY == 0:
            means = {name: value / LOG_EVERY for name, value in sums.items()}
            sums.clear()
            run.log("sft", step + 1, samples=len(batches.samples), **means)
            progress(step + 1, f"loss {means['loss']:.3f} l1 {means['l1']:.4f}")
        if (step + 1) % SAVE_EVERY == 0:
            rng = json.dumps(batches.rng.bit_generator.state)
            training = {"policy": policy.state_dict(), "optimizer": optim.state_dict(), "failures": failures}
            run.save(step + 1, **training, rounds=done_rounds, rng=rng)
    policy.eval()
