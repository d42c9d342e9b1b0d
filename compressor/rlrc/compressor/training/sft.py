"""Supervised fine-tuning: every family by its own loss (rlrc.compressor.training.losses), on demonstrations.

With ``dagger_rounds`` the policy also plays in between, and the expert labels what it gets into: see dagger.py. Under
``accelerate launch`` every process takes its share of a batch that is as many times larger. Everything is reproducible
by seed for a given number of threads, workers and processes, resumed runs included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from rlrc import interrupts
from rlrc.compressor.models import precision
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.training import lora
from rlrc.compressor.training.batches import Batch, TrainingData
from rlrc.compressor.training.distributed import Team
from rlrc.compressor.training.losses import SMOOTHING, chunk_loss, drawn
from rlrc.compressor.training.run_state import Keeper, RunState
from rlrc.envs.seeds import DEMONSTRATION
from rlrc.errors import UserError

LOG_EVERY = 50  # steps
EMBEDDINGS = ("embedding", "query", "latent", "position", "vision.position", "vision2.position")
Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class SFTConfig:
    STAGE: ClassVar[str] = "sft"  # what errors and the curve call it

    steps: int = 2000
    """optimiser steps"""
    batch: int = 128
    """samples a step (of every process, under accelerate launch)"""
    accumulate: int = 1
    """parts that a process's batch is cut into, to need less memory"""
    rate: float = 8e-4
    """peak learning rate of AdamW"""
    warmup: int = 100
    """steps of linear warm-up"""
    schedule: Literal["linear", "cosine"] = "linear"
    """how the rate falls to 2 %: linearly over the last ``decay`` of the steps, or along a cosine over all of them"""
    decay: float = 0.45
    """last part of the steps over which a linear schedule falls"""
    weight_decay: float = 0.02
    lora: int = 0
    """rank of the adapters that are trained instead of the weights, and merged at the end; 0: all weights"""
    smoothing: float = SMOOTHING
    """standard deviation, in bins, of the target distribution around the expert's action (logits over bins only)"""
    state_noise: float = 0.01
    """standard deviation of the noise on the normalised state"""
    held_out: float = 0.0
    """part of the demonstrations that is not trained on: the weights with the lowest loss there are kept"""
    check_every: int = 100
    """steps between two looks at the held-out loss"""
    patience: int = 0
    """looks without a lower held-out loss after which training stops; 0: never"""
    data: str = ""
    """LeRobotDataset folder with the demonstrations; empty: the simulator's scripted experts (reference family)"""
    cameras: dict[str, str] = field(default_factory=dict)
    """pairs of a camera of the policy and one of the data set, where their names differ; none: do without it"""
    statistics: Literal["policy", "data"] = "policy"
    """whose statistics normalise: the policy's, and the data set's for what it has none of; or the data set's for all,
    as LeRobot's training does"""
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
        for name in ("steps", "batch", "accumulate", "check_every", "demonstrations", "dagger_episodes"):
            if getattr(self, name) < 1:
                raise UserError(f"expected {self.STAGE}.{name} >= 1, found {getattr(self, name)}")
        for name in ("rate", "smoothing"):
            if not getattr(self, name) > 0:
                raise UserError(f"expected {self.STAGE}.{name} > 0, found {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "lora", "state_noise", "patience", "dagger_rounds", "seed"):
            if not getattr(self, name) >= 0:
                raise UserError(f"expected {self.STAGE}.{name} >= 0, found {getattr(self, name)}")
        for name in ("decay", "dagger_start", "dagger_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"expected {self.STAGE}.{name} within [0, 1], found {getattr(self, name)}")
        if not 0 <= self.held_out < 1:
            raise UserError(f"expected {self.STAGE}.held_out from 0 to below 1, found {self.held_out}")
        if self.schedule not in ("linear", "cosine"):
            raise UserError(f"expected {self.STAGE}.schedule linear or cosine, found {self.schedule!r}")
        if self.batch % self.accumulate:
            raise UserError(
                f"expected {self.STAGE}.accumulate to divide the batch of {self.batch}, found {self.accumulate}; "
                "change either"
            )
        if self.patience and not self.held_out:
            raise UserError(
                f"expected {self.STAGE}.held_out > 0 with {self.STAGE}.patience {self.patience}, found 0; "
                "hold episodes out"
            )
        self._check_scenes()

    def _check_scenes(self) -> None:
        last = self.first_seed + self.scenes() - 1
        if self.first_seed not in DEMONSTRATION or last not in DEMONSTRATION:
            raise UserError(
                f"expected {self.STAGE}.first_seed within {DEMONSTRATION.start} to "
                f"{DEMONSTRATION.stop - self.scenes()}, the scenes for demonstrations, found {self.first_seed}"
            )
        if self.dagger_start > self.dagger_end:
            raise UserError(
                f"expected {self.STAGE}.dagger_start <= {self.STAGE}.dagger_end, found {self.dagger_start} and "
                f"{self.dagger_end}"
            )
        if self.data and self.dagger_rounds:
            raise UserError(
                f"expected {self.STAGE}.dagger_rounds 0 with {self.STAGE}.data, found {self.dagger_rounds}; only the "
                "simulator has an expert to ask"
            )
        if (possible := len(self.rounds())) != self.dagger_rounds:
            raise UserError(
                f"expected {self.STAGE}.dagger_rounds to fall on different steps, found {self.dagger_rounds} rounds "
                f"on {possible} of {self.steps} steps; ask for fewer rounds or more steps"
            )

    def scenes(self) -> int:
        """Simulated demonstrations a task, those held out included, which are further ones."""
        return self.demonstrations + math.ceil(self.held_out * self.demonstrations)

    def rounds(self) -> dict[int, int]:
        """Step -> number of the DAgger round before it."""
        spread = np.linspace(self.dagger_start, self.dagger_end, self.dagger_rounds)
        return {min(int(part * self.steps), self.steps - 1): i for i, part in enumerate(spread)}

    def rate_at(self, step: int) -> float:
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if self.schedule == "cosine":
            return self.rate * warm * (0.51 + 0.49 * math.cos(math.pi * step / self.steps))
        remaining = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.rate * warm * max(0.02, min(1.0, remaining))


class SFTObjective(nn.Module):
    """What is minimised: the chunk's loss, in this process's precision. A module, so that DDP and FSDP can wrap it."""

    def __init__(self, policy: PolicyModule, smoothing: float) -> None:
        super().__init__()
        self.policy, self.smoothing = policy, smoothing

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """-> ``loss``, with gradient, and what the curve shows besides."""
        with precision.autocast(batch.actions.device.type):
            loss, error = chunk_loss(self.policy, batch, self.smoothing)
        return {"loss": loss, "l1": error}


def optimizer(policy: nn.Module, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW of what requires a gradient, that decays matrices only: not norms, biases, positions or embeddings."""
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    decayed = {name for name, p in trained.items() if p.ndim == 2 and not name.startswith(EMBEDDINGS)}
    groups = [
        {"params": [p for name, p in trained.items() if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trained.items() if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


class Best:
    """The weights with the lowest held-out loss so far, and for how many looks there was none lower.

    ``seen``: the step of the last look.
    """

    _KEPT = ("loss", "step", "looks", "seen", "weights")

    def __init__(self, team: Team, objective: nn.Module, policy: nn.Module, held_out: list[Batch]) -> None:
        self.team, self.objective, self.policy, self.held_out = team, objective, policy, held_out
        self.loss, self.step, self.looks, self.seen = math.inf, 0, 0, 0
        self.weights: dict[str, Tensor] = {}

    def measure(self, step: int) -> float:
        self.policy.eval()
        with torch.no_grad():
            losses = [(self.objective(batch)["loss"].item(), len(batch)) for batch in self.held_out]
        loss = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
        self.looks, self.seen = self.looks + 1, step
        if loss < self.loss:
            self.loss, self.step, self.looks = loss, step, 0
            weights = self.team.weights(self.objective, "policy.")
            self.weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
        return loss

    def state(self) -> dict[str, Any]:
        """Later looks do not change it."""
        return {name: getattr(self, name) for name in self._KEPT}

    def restore(self, saved: dict[str, Any]) -> None:
        for name in self._KEPT:
            setattr(self, name, saved[name])


def fixed(policy: PolicyModule, held_out: list[Batch]) -> list[Batch]:
    """With the same noise and times at every look; torch's generator is left where it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [drawn(policy, batch) for batch in held_out]


def check_finite(metrics: dict[str, float], step: int, run: RunState) -> None:
    """Raises UserError for a loss or a gradient that is not finite, before it spoils the weights."""
    for name, what in (("loss", "loss"), ("gradient_norm", "norm of the gradient")):
        if not math.isfinite(metrics[name]):
            kept = "" if run.saved is None else f", then remove {run.folder}, which keeps the state of step {run.saved}"
            raise UserError(
                f"expected a finite {what}, found {metrics[name]} at step {step}; lower --rate or look for outliers "
                f"with rlrc data inspect{kept}"
            )


def gradients(team: Team, objective: nn.Module, batches: list[Batch]) -> dict[str, float]:
    """Of the mean of these batches, which are of one size. -> means of the metrics, and the gradients' norm."""
    sums: dict[str, float] = {}
    for batch in batches:
        metrics = objective(batch)
        team.backward(metrics["loss"] / len(batches))
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + team.mean(value.detach()) / len(batches)
    sums["gradient_norm"] = team.clip(objective, 1.0)
    return sums


def interruptible(parameters: Iterable[nn.Parameter]) -> None:
    """A signal ends a backward pass between two layers: their hooks give Python its turn."""
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_nothing)


def _nothing(_: Tensor) -> None: ...


class BeforeStep(Protocol):
    """What is done between steps of the training, such as DAgger's rounds (rlrc.compressor.rl.dagger)."""

    name: str
    """of its rows in the training curve"""

    def __call__(
        self, step: int, policy: PolicyModule, weights: Callable[[], dict[str, Tensor]], progress: Progress
    ) -> dict[str, float] | None:
        """Before this step. -> a row of the training curve, or None where nothing was done.

        ``weights``: those of ``policy`` where it is sharded among several processes."""
        ...

    def state(self) -> dict[str, Any]:
        """What ``restore`` needs to go on."""
        ...

    def restore(self, saved: dict[str, Any]) -> None: ...


def sft(
    policy: PolicyModule,
    config: SFTConfig,
    lessons: TrainingData,
    run: RunState,
    progress: Progress,
    before_step: BeforeStep | None = None,
    objective: Callable[[PolicyModule, float], nn.Module] = SFTObjective,
) -> dict[str, Any]:
    """Train ``policy`` in place; ``progress(step, text)`` now and then. A run folder with a saved state is resumed.

    -> what the history tells besides. Raises UserError when the loss is no longer finite; Interrupted, with the last
    step saved, within a layer's time of a signal.
    """
    torch.manual_seed(config.seed)
    team, batches = Team(), lessons.batches
    if config.lora:
        lora.adapt(policy, config.lora)
    optim = optimizer(policy, config.rate, config.weight_decay)
    objective_, optim = team.prepare(objective(policy, config.smoothing), optim)
    best = Best(team, objective_, policy, [batch.to(team.device) for batch in fixed(policy, lessons.held_out)])
    first, sums = 0, dict[str, float]()
    if (saved := run.load()) is not None:
        first, sums = saved["step"], saved["sums"]
        team.load_weights(objective_, saved["policy"], "policy.")
        team.load_optimizer(objective_, optim, saved["optimizer"])
        batches.restore(saved["batches"])
        best.restore(saved["best"])
        if before_step is not None:
            before_step.restore(saved["before_step"])
    if team.size == 1:
        interruptible(policy.parameters())

    def weights() -> dict[str, Any]:
        return {
            "policy": team.weights(objective_, "policy."),
            "optimizer": team.optimizer_state(objective_, optim),
        }

    def keep(step: int) -> None:
        hook = before_step.state() if before_step else {}
        keeper(step, batches=batches.state(), best=best.state(), before_step=hook, sums=dict(sums))

    progress(first, text := "training")
    size = config.batch // config.accumulate
    with Keeper(run, team, weights) as keeper, team.together():
        keep(first)
        for step in range(first, config.steps + 1):
            if best.held_out and step > best.seen and (step % config.check_every == 0 or step == config.steps):
                loss = best.measure(step)
                with interrupts.hold():
                    run.log("held-out", step, loss=loss)
                    keep(step)
            if step == config.steps or (config.patience and best.looks >= config.patience):
                break
            if before_step and (
                found := before_step(step, policy, lambda: team.weights(objective_, "policy."), progress)
            ):
                with interrupts.hold():
                    run.log(before_step.name, step + 1, **found)
                    keep(step)
            policy.train()
            for group in optim.param_groups:
                group["lr"] = config.rate_at(step)
            # Everything random is drawn for all processes alike; each takes its share.
            whole = drawn(policy, batches.draw(team.size * config.batch).noisy(config.state_noise)).to(team.device)
            mine = range(team.rank * config.batch, (team.rank + 1) * config.batch, size)
            metrics = gradients(team, objective_, [whole.part(slice(i, i + size)) for i in mine])
            check_finite(metrics, step + 1, run)
            with interrupts.hold():
                optim.step()
                optim.zero_grad()
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0.0) + value
                if (step + 1) % LOG_EVERY == 0:
                    means = {name: value / LOG_EVERY for name, value in sums.items()}
                    sums.clear()
                    run.log(config.STAGE, step + 1, samples=len(batches), **means)
                    text = f"loss {means['loss']:.3f} l1 {means['l1']:.4f}"
                keep(step + 1)
            progress(step + 1, text)
    report: dict[str, Any] = {}
    if best.weights:
        report = {"held_out_loss": round(best.loss, 5), "best_step": best.step}
    team.finish(policy, best.weights or team.weights(objective_, "policy."))
    if config.lora:
        lora.merge(policy)
    return report
