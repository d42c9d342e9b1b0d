"""Supervised fine-tuning on demonstrations, with the loss of the policy's family (rlrc.compressor.training.losses).

Under ``accelerate launch`` every process takes its share of a batch that is larger by the number of processes. For a
given number of threads, workers and processes, a seed reproduces a run exactly, even a resumed one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from rlrc import interrupts
from rlrc.compressor.models import precision
from rlrc.compressor.models.nn.linear import recompute
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.training import lora
from rlrc.compressor.training.batches import Batch, TrainingData
from rlrc.compressor.training.config import SFTConfig
from rlrc.compressor.training.distributed import Team, rank
from rlrc.compressor.training.loss_watch import LossWatch, ignorant_chunk_loss, print_warning
from rlrc.compressor.training.losses import chunk_loss, draw_noise
from rlrc.compressor.training.run_state import Keeper, RunState
from rlrc.errors import UserError

LOG_EVERY = 50  # steps
EMBEDDINGS = ("embedding", "query", "latent", "position", "vision.position", "vision2.position")
Progress = Callable[[int, str], None]


class SFTObjective(nn.Module):
    """The chunk's loss, in this process's precision. A module, so that DDP and FSDP can wrap it."""

    def __init__(self, policy: PolicyModule, smoothing: float) -> None:
        super().__init__()
        self.policy, self.smoothing = policy, smoothing

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """-> ``loss``, with gradient, and the other metrics of the training curve."""
        with precision.autocast(batch.actions.device.type):
            loss, error = chunk_loss(self.policy, batch, self.smoothing)
        return {"loss": loss, "l1": error}


def build_optimizer(policy: nn.Module, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW of the trainable parameters. Only matrices decay: no norms, biases, positions or embeddings."""
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    decayed = {name for name, p in trained.items() if p.ndim == 2 and not name.startswith(EMBEDDINGS)}
    groups = [
        {"params": [p for name, p in trained.items() if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trained.items() if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


class BestWeights:
    """The weights with the lowest held-out loss so far.

    ``step``: when they were measured; ``checked``: the last measurement; ``stale``: measurements since ``step``.
    """

    def __init__(
        self, policy: nn.Module, objective: nn.Module, held_out: list[Batch], read: Callable[[], dict[str, Tensor]]
    ) -> None:
        """``read`` returns the trained weights."""
        self.policy, self.objective, self.held_out, self.read = policy, objective, held_out, read
        self.loss, self.step, self.stale, self.checked = math.inf, 0, 0, 0
        self.weights: dict[str, Tensor] = {}

    def measure(self, step: int) -> float:
        """The held-out loss; copies the weights if it is the lowest so far."""
        self.policy.eval()
        with torch.no_grad():
            losses: list[float] = torch.stack([self.objective(batch)["loss"] for batch in self.held_out]).tolist()
        counts = [len(batch) for batch in self.held_out]
        loss = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
        self.stale, self.checked = self.stale + 1, step
        if loss < self.loss:
            self.loss, self.step, self.stale = loss, step, 0
            self.weights = {name: tensor.detach().clone() for name, tensor in self.read().items()}
        return loss

    def state(self) -> dict[str, Any]:
        """Later measurements do not change it."""
        return {
            "loss": self.loss,
            "step": self.step,
            "looks": self.stale,
            "seen": self.checked,
            "weights": self.weights,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        self.loss, self.step, self.weights = saved["loss"], saved["step"], saved["weights"]
        self.stale, self.checked = saved["looks"], saved["seen"]


def fix_noise(policy: PolicyModule, held_out: list[Batch]) -> list[Batch]:
    """Draw the noise and times of held-out batches once, from a fixed seed; torch's generator is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [draw_noise(policy, batch) for batch in held_out]


def check_finite(metrics: dict[str, float], step: int, run: RunState) -> None:
    """Raises UserError for a loss or a gradient that is not finite, before the weights are updated."""
    for name, text in (("loss", "loss"), ("gradient_norm", "norm of the gradient")):
        if not math.isfinite(metrics[name]):
            kept = "" if run.saved is None else f", then remove {run.folder}, which keeps the state of step {run.saved}"
            raise UserError(
                f"expected a finite {text}, found {metrics[name]} at step {step}; lower --rate or look for outliers "
                f"with rlrc data inspect{kept}"
            )


def compute_gradients(team: Team, objective: nn.Module, batches: list[Batch]) -> dict[str, float]:
    """Gradients of the mean loss of batches of equal size, clipped. -> mean metrics, and the norm before clipping."""
    names, values = list[str](), list[Tensor]()
    for batch in batches:
        metrics = objective(batch)
        team.backward(metrics["loss"] / len(batches))
        names += metrics
        values += [value.detach() for value in metrics.values()]
    norm = team.clip(objective, 1.0)
    sums: dict[str, float] = {}
    *means, sums_norm = team.means([*values, norm])  # all at once: the host waits for the device
    for name, mean in zip(names, means, strict=True):
        sums[name] = sums.get(name, 0.0) + mean / len(batches)
    return sums | {"gradient_norm": sums_norm}


def make_interruptible(parameters: Iterable[nn.Parameter]) -> None:
    """Let a signal end a backward pass between two layers: Python handles signals whenever a hook runs."""
    for parameter in parameters:
        if parameter.requires_grad:
            cast(Any, parameter).register_post_accumulate_grad_hook(lambda _: None)


class BeforeStep(Protocol):
    """A hook between the steps of the training, such as DAgger's rounds (rlrc.compressor.rl.dagger)."""

    name: str
    """of its rows in the training curve"""

    def __call__(
        self, step: int, policy: PolicyModule, weights: Callable[[], dict[str, Tensor]], progress: Progress
    ) -> dict[str, float] | None:
        """Called before a step. -> a row of the training curve, or None if nothing was done.

        ``weights()`` gives the policy's whole weights, which may be sharded among processes."""
        ...

    def state(self) -> dict[str, Any]:
        """The state that ``restore`` takes."""
        ...

    def restore(self, saved: dict[str, Any]) -> None: ...


def sft(
    policy: PolicyModule,
    config: SFTConfig,
    data: TrainingData,
    run: RunState,
    progress: Progress,
    before_step: BeforeStep | None = None,
    objective: Callable[[PolicyModule, float], nn.Module] = SFTObjective,
    learned: bool = False,
) -> dict[str, Any]:
    """Train ``policy`` in place, calling ``progress(step, text)``; a run folder with a saved state is resumed.

    ``learned``: the policy was trained before and not cut since, so that its first loss should be low; a loss that is
    not, or that rises, is reported (rlrc.compressor.training.loss_watch). -> metrics for the history. Raises UserError
    if the loss is not finite. A signal raises Interrupted within the time of one layer, with the state of the last step
    saved.
    """
    torch.manual_seed(config.seed)
    team, batches = Team(), data.batches
    if config.lora:
        lora.adapt(policy, config.lora)
    frozen = {name for name, parameter in policy.named_parameters() if not parameter.requires_grad}
    optimizer = build_optimizer(policy, config.rate, config.weight_decay)
    loss_module, optimizer = team.prepare(objective(policy, config.smoothing), optimizer)

    def weights() -> dict[str, Tensor]:
        return team.weights(loss_module, "policy.")

    def trained_weights() -> dict[str, Tensor]:
        return {name: tensor for name, tensor in weights().items() if name not in frozen}

    held_out = [batch.to(team.device) for batch in fix_noise(policy, data.held_out)]
    best = BestWeights(policy, loss_module, held_out, trained_weights)
    watch = LossWatch(_warn(run), config.rate, str(run.folder))
    first, sums = 0, dict[str, float]()
    if (saved := run.load()) is not None:
        first, sums = saved["step"], saved["sums"]
        team.load_weights(loss_module, saved["policy"], "policy.", partial=bool(frozen))
        team.load_optimizer(loss_module, optimizer, saved["optimizer"])
        batches.restore(saved["batches"])
        best.restore(saved["best"])
        watch.restore(saved.get("watch", {}))  # earlier versions saved none
        if before_step is not None:
            before_step.restore(saved["before_step"])
    if team.size == 1:
        make_interruptible(policy.parameters())

    def large_state() -> dict[str, Any]:
        return {"policy": trained_weights(), "optimizer": team.optimizer_state(loss_module, optimizer)}

    def keep(step: int) -> None:
        hook = before_step.state() if before_step else {}
        keeper(step, batches=batches.state(), best=best.state(), before_step=hook, sums=dict(sums), watch=watch.state())

    progress(first, text := "training")
    size = config.batch // config.accumulate
    with Keeper(run, team, large_state) as keeper, team.together(), recompute(policy, config.checkpointing):
        keep(first)
        for step in range(first, config.steps + 1):
            if best.held_out and step > best.checked and (step % config.check_every == 0 or step == config.steps):
                loss = best.measure(step)
                with interrupts.hold():
                    run.log("held-out", step, loss=loss)
                    watch.held_out(step, loss)
                    keep(step)
            if step == config.steps or (config.patience and best.stale >= config.patience):
                break
            if before_step and (row := before_step(step, policy, weights, progress)):
                with interrupts.hold():
                    run.log(before_step.name, step + 1, **row)
                    watch.renew()
                    keep(step)
            policy.train()
            for group in optimizer.param_groups:
                group["lr"] = config.rate_at(step)
            # Every process draws the whole batch, so that all generators stay alike, and trains on its share.
            whole = batches.draw(team.size * config.batch).add_state_noise(config.state_noise)
            whole = draw_noise(policy, whole).to(team.device)
            starts = range(team.rank * config.batch, (team.rank + 1) * config.batch, size)
            metrics = compute_gradients(team, loss_module, [whole.part(slice(i, i + size)) for i in starts])
            check_finite(metrics, step + 1, run)
            with interrupts.hold():
                if step == 0:  # before any update
                    limit = config.ignorant_loss(ignorant_chunk_loss(policy.spec, whole))
                    watch.first(metrics["loss"], limit, learned)
                watch.step(metrics["loss"])
                optimizer.step()
                optimizer.zero_grad()
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0.0) + value
                if (step + 1) % LOG_EVERY == 0:
                    means = {name: value / LOG_EVERY for name, value in sums.items()}
                    sums.clear()
                    run.log(config.STAGE, step + 1, samples=len(batches), **means)
                    watch.window(step + 1)
                    text = f"loss {means['loss']:.3f} l1 {means['l1']:.4f}"
                keep(step + 1)
            progress(step + 1, text)
    team.finish(policy, weights() | best.weights)
    if config.lora:
        lora.merge(policy)
    report: dict[str, Any] = {"warnings": list(watch.given.values())} if watch.given else {}
    return report | ({"held_out_loss": round(best.loss, 5), "best_step": best.step} if best.weights else {})


def _warn(run: RunState) -> Callable[[int, str, float, float], None]:
    def warn(step: int, text: str, loss: float, limit: float) -> None:
        run.log("warning", step, loss=loss, limit=limit)
        if rank() == 0:
            print_warning(text)

    return warn
