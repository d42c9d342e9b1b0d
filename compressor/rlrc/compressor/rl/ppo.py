"""Recovery by reinforcement learning: PPO on the policy's own episodes with a sparse success reward.

As in the paper (arXiv 2506.17639, stage 2b): actor and critic share the transformer, the value is a small MLP on the
hidden state of the first action token, the critic is warmed up alone, and a behaviour-cloning term on demonstrations
stays in the objective. One decision is one chunk; ratio and clip are per token (as in RL4VLA, arXiv 2505.19789), or per
number and flow step: rlrc.compressor.rl.actors says what is drawn and how probable it was. The vision tower is frozen.

Under ``accelerate launch`` every process plays its share of the episodes in simulators of its own, and gradients are
averaged over all decisions of a step. Everything random is drawn for all processes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.rl.config import PPOConfig
from rlrc.compressor.rl.learner import Learner, NotFinite, Rollout
from rlrc.compressor.rl.rollout import ActionSampler, Request, Rollouts, SamplingMode
from rlrc.compressor.training.batches import Batches
from rlrc.compressor.training.distributed import Team
from rlrc.compressor.training.run_state import RunState
from rlrc.compressor.training.sft import interruptible
from rlrc.envs.metaworld import TASKS
from rlrc.envs.seeds import REINFORCEMENT, scene
from rlrc.errors import UserError


def requests(config: PPOConfig, iteration: int, failures: dict[str, float]) -> list[Request]:
    """An iteration's episodes: tasks drawn by how often they fail, scenes never seen before."""
    rng = np.random.default_rng((config.seed, iteration))
    weight = np.array([0.1 + failures.get(task, 1.0) for task in TASKS])
    tasks = rng.choice(list(TASKS), config.episodes, p=weight / weight.sum())
    first = config.seed * 100_000 + iteration * config.episodes
    return [Request(str(task), scene(REINFORCEMENT, first + i)) for i, task in enumerate(tasks)]


@contextmanager
def _kept(run: RunState, iteration: int) -> Iterator[None]:
    """Raises UserError for numbers that are not finite: what to change, and which state was saved."""
    try:
        yield
    except NotFinite as error:
        raise UserError(
            f"expected {error} in iteration {iteration + 1}; lower --rate or --noise, then remove {run.folder}, "
            f"which keeps the last good state, that of iteration {iteration}"
        ) from None


def ppo(
    policy: PolicyModule,
    config: PPOConfig,
    batches: Batches,
    rollouts: Rollouts,
    run: RunState,
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
    mode = SamplingMode(
        sample=True, temperature=config.temperature, correlation=config.correlation, keep="image_tokens"
    )
    driver = ActionSampler(policy, rollouts.load_tokenizer(), mode)
    first, failures = 0, dict[str, float]()
    if (saved := run.load()) is not None:
        first, failures = saved["step"], saved["failures"]
        learner.load_state_dict(saved)
        batches.restore(saved["batches"])
    if team.size == 1:
        interruptible(learner.actor.parameters())
    for iteration in range(first, config.iterations):
        weights, noise = (team.weights(learner.objective, f"actor.{part}.") for part in ("policy", "noise"))
        asked = requests(config, iteration, failures)
        with _kept(run, iteration):  # no episode can be played with weights that are nan
            learner.check("weights", torch.stack([tensor.abs().max().float() for tensor in weights.values()]))
        shares = [asked[rank :: team.size] for rank in range(team.size)]
        episodes = rollouts.run(shares[team.rank], policy, mode, weights, noise)
        outcomes = team.gather(torch.tensor([float(episode.success) for episode in episodes])).numpy()
        tasks = np.array([request.task for share in shares for request in share])
        for task in sorted(set(tasks.tolist())):
            rate = 1 - float(np.mean(outcomes[tasks == task]))
            failures[task] = 0.5 * failures.get(task, rate) + 0.5 * rate
        with _kept(run, iteration):
            metrics: dict[str, Any] = learner.update(Rollout.of(episodes, driver), iteration)
        steps = torch.tensor(sum(episode.steps for episode in episodes) / rollouts.seconds, device=team.device)
        # Tasks are drawn by their failures: a mean over episodes would fall as the policy improves, one over tasks not.
        metrics |= {"success": 1 - float(np.mean(list(failures.values())))}
        metrics |= {"environment_steps_per_second": team.mean(steps) * team.size}
        run.log("rl", iteration + 1, episodes=len(asked), **metrics)
        run.save(iteration + 1, failures=failures, batches=batches.state(), **learner.state_dict())
        kl, speed = metrics.get("approx_kl", 0.0), metrics["environment_steps_per_second"]
        progress(iteration + 1, f"sampled success {metrics['success']:.3f} kl {kl:.4f} {speed:.0f} steps/s")
    team.finish(policy, team.weights(learner.objective, "actor.policy."))
