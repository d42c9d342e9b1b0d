"""Vectorised episodes: several worker processes, each with many environments and one batched inference for all.

The same loop runs evaluation (argmax), PPO's rollouts (sampled), demonstrations (expert with noise) and DAgger (the
policy drives, the expert labels), so that observations and chunks are the same in all of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rlrc.artifact import Manifest
from rlrc.compressor.models import device, precision
from rlrc.compressor.models.decode import check_finite_outputs
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.policy import Inputs, PolicyModule
from rlrc.compressor.models.weights import read_wide
from rlrc.compressor.rl.actors import EncodedObservation, build_actor
from rlrc.compressor.rl.observations import Observer
from rlrc.compressor.rl.shared_policy import AskingSampler, Sampler, SharedPolicy
from rlrc.compressor.training import distributed
from rlrc.envs.experts import Expert, expert, relabel
from rlrc.envs.metaworld import ACTION_NAMES, HORIZON, TASKS, MetaWorldEnv, MetaWorldTask
from rlrc.folders import replace_file
from rlrc.processes import WorkerPool
from rlrc.runtime.inference.preprocess import unnormalise
from rlrc.runtime.inference.prompts import Tokenizer

SLOTS = 20  # environments of a process, which share one batched inference
TIMEOUT, EPISODE_TIMEOUT = 600.0, 10.0  # seconds until a worker counts as stuck: at least, and for each episode


@dataclass(frozen=True)
class Request:
    """One episode. The expert takes over at decision ``handover`` (0: it drives from the start; None: never)."""

    task: str
    seed: int
    handover: int | None = None
    noise: float = (
        0.0  # standard deviation of the noise on the expert's actions; half the variance is constant over a chunk
    )


@dataclass(frozen=True)
class SamplingMode:
    sample: bool = False  # sample actions; otherwise the deployed, deterministic policy
    temperature: float = 1.0  # of tokens
    correlation: float = 0.0  # of the sampling noise over the steps of a chunk (see actors.py)
    label: bool = False  # ask the expert at every decision
    keep: Literal["", "pictures", "image_tokens"] = ""  # which part of the observations to keep
    horizon: int = HORIZON


@dataclass
class RolloutEpisode:
    """Lists have one entry for each decision; which ones are filled depends on the SamplingMode.

    Picture uint8 (H, W, 3), raw state (S,), image tokens fp16 (N, width), chunk (K, D); ``sampled``: see Actor.
    """

    task: str
    seed: int
    success: bool = False
    steps: int = 0
    pictures: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    state: list[npt.NDArray[np.float32]] = field(default_factory=list)
    image_tokens: list[npt.NDArray[np.float16]] = field(default_factory=list)
    sampled: list[npt.NDArray[Any]] = field(default_factory=list)
    chunk: list[npt.NDArray[np.float32]] = field(default_factory=list)  # the expert's


class ActionSampler:
    """Batched inference: raw observations -> chunks of actions. ``noise``: state dict of the actor's learned noise."""

    def __init__(
        self,
        policy: PolicyModule,
        tokenizer: Tokenizer | None,
        mode: SamplingMode,
        noise: dict[str, Tensor] | None = None,
    ) -> None:
        self.policy, self.mode, self.spec = policy.eval(), mode, policy.spec
        self.observer = Observer(policy.spec, tokenizer)
        self.actor = build_actor(policy, mode.temperature, mode.correlation)
        if noise and self.actor.noise is not None:
            self.actor.noise.load_state_dict(noise)

    def __call__(
        self, tasks: list[str], images: np.ndarray, state: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pictures (B, H, W, 3), raw state (B, S) -> image tokens (B, N, width), ``sampled``, actions (B, K, D)."""
        image_tokens, sampled, actions = (x.cpu() for x in self.act(self.observer(tasks, images, state)))
        check_finite_outputs(actions, "actions")
        return image_tokens.numpy(), sampled.numpy(), unnormalise(actions.numpy(), self.spec.action.norm)

    def act(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Image tokens fp16 (B, N, width), ``sampled``, normalised actions (B, K, D): on the policy's device."""
        where = device.of_module(self.policy)
        with torch.inference_mode(), precision.autocast(where.type):
            observation = self.actor.encode(inputs.to(where))
            actions, sampled = self.actor.act(observation, self.mode.sample)
        return observation.image_tokens.half(), sampled, actions

    def restore_observations(
        self, tasks: Sequence[str], state: np.ndarray, image_tokens: np.ndarray
    ) -> EncodedObservation:
        """Encoded observations from what an episode keeps: raw states (B, S), image tokens (B, N, width)."""
        prompt = self.observer.prompt(tasks, state)
        return EncodedObservation(
            torch.from_numpy(image_tokens), prompt.ids, self.observer.state(state), prompt.mask, prompt.lengths
        )


_idle: list[MetaWorldEnv] = []  # at most SLOTS unused environments, the most recently used last


def _borrow(task: MetaWorldTask, size: int) -> MetaWorldEnv:
    """An idle environment of the same simulation, or else a new one."""
    for i in reversed(range(len(_idle))):
        if (_idle[i].task.environment, _idle[i].size) == (task.environment, size):
            env = _idle.pop(i)
            env.task = task  # a task and its shared variant only draw scenes differently
            return env
    return MetaWorldEnv(task, size)


def _give_back(env: MetaWorldEnv) -> None:
    _idle.append(env)
    del _idle[:-SLOTS]


@dataclass
class _Slot:
    request: Request
    env: MetaWorldEnv
    episode: RolloutEpisode
    act: Expert
    rng: np.random.Generator


def _start(request: Request, size: int) -> _Slot:
    env = _borrow(TASKS[request.task], size)
    env.np_random = np.random.default_rng(request.seed)
    env.reset_scene()
    return _Slot(
        request,
        env,
        RolloutEpisode(request.task, request.seed),
        expert(TASKS[request.task]),
        np.random.default_rng(request.seed + 1),
    )


def _plan_chunks(slots: list[_Slot], sampler: Sampler | None, horizon: int, mode: SamplingMode) -> list[np.ndarray]:
    """One decision for every slot. -> the chunks to execute. Records what the mode keeps."""
    images = np.stack([slot.env.render() for slot in slots])
    state = np.stack([slot.env.state() for slot in slots])
    chunks: list[np.ndarray] = [np.empty(0)] * len(slots)
    if sampler is not None:
        image_tokens, sampled, actions = sampler([slot.request.task for slot in slots], images, state)
        chunks = list(actions)
    for i, slot in enumerate(slots):
        decision = slot.episode.steps // horizon
        takes_over = slot.request.handover is not None and decision >= slot.request.handover
        if mode.keep:
            slot.episode.state.append(state[i])
            if mode.keep == "pictures":
                slot.episode.pictures.append(images[i])
            if sampler is not None:
                slot.episode.sampled.append(sampled[i])
                if mode.keep == "image_tokens":
                    slot.episode.image_tokens.append(image_tokens[i])
        if mode.label or takes_over:
            label = relabel(slot.env, slot.act, horizon)
            slot.episode.chunk.append(label)
            if takes_over:
                sigma, rng = slot.request.noise * 0.5**0.5, slot.rng
                noise = rng.normal(0, sigma, label.shape) + rng.normal(0, sigma, label.shape[1])
                noise[:, ACTION_NAMES.index("gripper")] = 0  # the gripper executes the expert's own action
                chunks[i] = label + noise
    return chunks


def run_episodes(
    requests: Iterable[Request], sampler: Sampler | None, horizon: int, mode: SamplingMode, size: int
) -> Iterator[RolloutEpisode]:
    """Yield episodes in the order in which they end. Without a sampler the expert must drive from the start."""
    waiting = iter(requests)
    slots = [_start(request, size) for request in islice(waiting, SLOTS)]
    while slots:
        chunks = _plan_chunks(slots, sampler, horizon, mode)
        running = []
        for slot, chunk in zip(slots, chunks, strict=True):
            for action in chunk:
                slot.episode.steps += 1
                if slot.env.advance(action):
                    break
            slot.episode.success = slot.env.success
            if not slot.episode.success and slot.episode.steps < mode.horizon:
                running.append(slot)
                continue
            _give_back(slot.env)
            yield slot.episode
            if (request := next(waiting, None)) is not None:
                running.append(_start(request, size))
        slots = running


def _work(
    requests: list[Request],
    weights: str | None,
    manifest: Manifest,
    tokenizer: str | None,
    mode: SamplingMode,
    products: precision.PrecisionByDevice,
    asks: bool = False,
) -> tuple[list[RolloutEpisode], float]:
    """Run episodes in a worker process. -> episodes, and the CPU-seconds they took.

    ``asks``: the process that started it answers the decisions (see SharedPolicy). Otherwise ``weights`` do.
    """
    began = time.process_time()
    torch.set_num_threads(1)
    precision.use(products)
    sampler: Sampler | None = None
    if asks:
        sampler = AskingSampler((requests[0].task, requests[0].seed))
    elif weights is not None:
        policy = build_on_meta(manifest.policy, manifest.towers)
        saved = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)  # the workers share its pages
        policy.load_state_dict(saved["policy"], assign=True)
        sampler = ActionSampler(policy, load_tokenizer(manifest, tokenizer), mode, saved["noise"])
    torch.manual_seed(requests[0].seed)
    size = manifest.policy.cameras[0].height
    episodes = list(run_episodes(requests, sampler, manifest.policy.action.horizon, mode, size))
    return episodes, time.process_time() - began


def load_tokenizer(manifest: Manifest, file: str | Path | None) -> Tokenizer | None:
    """The tokenizer of the policy's prompt; None for a policy without one."""
    if manifest.policy.prompt is None:
        return None
    assert file is not None
    return Tokenizer(Path(file), manifest.policy.prompt)


class Rollouts:
    """A pool of processes that run episodes. A context manager; a worker that died or hangs raises UserError."""

    def __init__(self, manifest: Manifest, tokenizer: Path | None, scratch: Path, workers: int = 2) -> None:
        self.manifest, self.scratch = manifest, scratch
        self.tokenizer = None if tokenizer is None else str(tokenizer)
        self.workers = WorkerPool(workers)
        self.seconds = 0.0  # wall time of the last call
        self.cpu_seconds = 0.0  # of all workers, since the caller last reset it
        self._here = False  # tests and measurements: answer decisions in this process on the CPU, too

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(self, *_: object) -> None:
        self.workers.kill()

    def _answers_here(self, policy: PolicyModule) -> bool:
        whole = not any(hasattr(parameter, "full_tensor") for parameter in policy.parameters())
        return whole and (self._here or device.of_module(policy).type != "cpu")

    def load_tokenizer(self) -> Tokenizer | None:
        return load_tokenizer(self.manifest, self.tokenizer)

    def run(
        self,
        requests: Sequence[Request],
        policy: PolicyModule | None,
        mode: SamplingMode,
        weights: dict[str, Tensor] | None = None,
        noise: dict[str, Tensor] | None = None,
    ) -> list[RolloutEpisode]:
        """Run episodes with the policy's current weights. -> episodes in the order of the requests.

        A policy on an accelerator answers the decisions of all workers there, from this process, unless it is sharded.
        On the CPU every worker has the policy, and computes in one thread.

        ``weights`` replace the policy's own, if those are sharded over processes; ``noise``: see ActionSampler.
        Raises ValueError without a policy, unless the expert drives every episode from the start.
        """
        if policy is None and any(request.handover != 0 for request in requests):
            raise ValueError(
                "expected requests that the expert drives from the start (handover=0), as there is no policy"
            )
        start = time.monotonic()
        file, manifest, shared = None, self.manifest, None
        if policy is not None and self._answers_here(policy):
            shared = SharedPolicy(sampler := ActionSampler(policy, self.load_tokenizer(), mode, noise), sampler.actor)
        elif policy is not None:
            manifest = replace(manifest, towers=policy.towers)
            file = self.scratch / f"rollout-weights-{distributed.rank()}.pt"
            with replace_file(file) as new, new.open("wb") as stream:
                torch.save({"policy": weights or read_wide(policy), "noise": noise}, stream)
        shares = [list(requests[worker :: self.workers.number]) for worker in range(self.workers.number)]
        work = partial(
            _work,
            weights=str(file) if file else None,
            manifest=manifest,
            tokenizer=self.tokenizer,
            mode=mode,
            products=precision.current(),
            asks=shared is not None,
        )
        silence = TIMEOUT + EPISODE_TIMEOUT * len(shares[0])
        jobs = [share for share in shares if share]
        results = [result for _, result in self.workers.run(work, jobs, silence, shared)]
        episodes = [episode for result, _ in results for episode in result]
        self.cpu_seconds += sum(cpu for _, cpu in results)
        self.seconds = time.monotonic() - start
        by_request = {(episode.task, episode.seed): episode for episode in episodes}
        return [by_request[request.task, request.seed] for request in requests]
