"""Recovery by reinforcement learning: PPO on the policy's own episodes with a sparse success reward.

As in the paper (arXiv 2506.17639, stage 2b), actor and critic share the transformer, the critic is a small MLP on the
hidden state of the first action token and is warmed up alone, and a behaviour-cloning term on demonstrations stays in
the objective. One decision is one chunk; ratio and clip are per token (as in RL4VLA, arXiv 2505.19789), or per number
and flow step (see actors.py). The vision tower is frozen. ``Learner.update`` is the algorithm of one iteration.

Under ``accelerate launch`` every process plays its share of the episodes in its own simulators, and gradients are
averaged over all decisions of a step. Random numbers are drawn for all processes in each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.rl.config import PPOConfig
from rlrc.compressor.rl.learner import Learner, NotFinite
from rlrc.compressor.rl.rollout import ActionSampler, Request, Rollouts, SamplingMode
from rlrc.compressor.rl.rollout_buffer import RolloutBuffer
from rlrc.compressor.training.batches import Batches
from rlrc.compressor.training.distributed import Team
from rlrc.compressor.training.run_state import RunState
from rlrc.compressor.training.sft import make_interruptible
from rlrc.envs.metaworld import TASKS
from rlrc.envs.seeds import REINFORCEMENT, scene
from rlrc.errors import UserError


def ppo(
    policy: PolicyModule,
    config: PPOConfig,
    batches: Batches,
    rollouts: Rollouts,
    run: RunState,
    progress: Callable[[int, str], None],
) -> None:
    """Train ``policy`` in place; call ``progress(iteration, text)`` after every iteration. Resumes a saved run.

    Raises UserError when a weight, a reward, a log-probability or a loss is not finite.
    """
    torch.manual_seed(config.seed)
    team = Team()
    if config.episodes < team.size:
        raise UserError(f"expected rl.episodes >= {team.size}, one for each process, found {config.episodes}")
    learner = Learner(policy, config, batches, team)
    mode = SamplingMode(
        sample=True, temperature=config.temperature, correlation=config.correlation, keep="image_tokens"
    )
    sampler = ActionSampler(policy, rollouts.load_tokenizer(), mode)
    first, failures = 0, dict[str, float]()
    if (saved := run.load()) is not None:
        first, failures = saved["step"], saved["failures"]
        learner.load_state_dict(saved)
        batches.restore(saved["batches"])
    if team.size == 1:
        make_interruptible(learner.actor.parameters())
    for iteration in range(first, config.iterations):
        weights, noise = (team.weights(learner.objective, f"actor.{part}.") for part in ("policy", "noise"))
        with _report_not_finite(run, iteration):
            learner.check("weights", torch.stack([tensor.abs().max().float() for tensor in weights.values()]))
        requested = requests(config, iteration, failures)
        shares = [requested[rank :: team.size] for rank in range(team.size)]
        episodes = rollouts.run(shares[team.rank], policy, mode, weights, noise)
        successes = team.gather(torch.tensor([float(episode.success) for episode in episodes])).numpy()
        tasks = np.array([request.task for share in shares for request in share])
        for task in sorted(set(tasks.tolist())):
            rate = 1 - float(np.mean(successes[tasks == task]))
            failures[task] = 0.5 * failures.get(task, rate) + 0.5 * rate
        with _report_not_finite(run, iteration):
            metrics: dict[str, Any] = learner.update(RolloutBuffer.of(episodes, sampler), iteration)
        speed = torch.tensor(sum(episode.steps for episode in episodes) / rollouts.seconds, device=team.device)
        # Tasks that fail more are drawn more often, so a mean over episodes would be biased; a mean over tasks is not.
        metrics |= {"success": 1 - float(np.mean(list(failures.values())))}
        metrics |= {"environment_steps_per_second": team.mean(speed) * team.size}
        run.log("rl", iteration + 1, episodes=len(requested), **metrics)
        run.save(iteration + 1, failures=failures, batches=batches.state(), **learner.state_dict())
        kl, steps_per_second = metrics.get("approx_kl", 0.0), metrics["environment_steps_per_second"]
        progress(iteration + 1, f"sampled success {metrics['success']:.3f} kl {kl:.4f} {steps_per_second:.0f} steps/s")
    team.finish(policy, team.weights(learner.objective, "actor.policy."))


def requests(config: PPOConfig, iteration: int, failures: dict[str, float]) -> list[Request]:
    """An iteration's episodes: tasks drawn by their failure rates, in scenes not used before."""
    rng = np.random.default_rng((config.seed, iteration))
    weight = np.array([0.1 + failures.get(task, 1.0) for task in TASKS])
    tasks = rng.choice(list(TASKS), config.episodes, p=weight / weight.sum())
    first = config.seed * 100_000 + iteration * config.episodes
    return [Request(str(task), scene(REINFORCEMENT, first + i)) for i, task in enumerate(tasks)]


@contextmanager
def _report_not_finite(run: RunState, iteration: int) -> Iterator[None]:
    """Turn NotFinite into a UserError that says what to change and which state is saved."""
    try:
        yield
    except NotFinite as error:
        raise UserError(
            f"expected {error} in iteration {iteration + 1}; lower --rate or --noise, then remove {run.folder}, "
            f"which keeps the last good state, that of iteration {iteration}"
        ) from None
