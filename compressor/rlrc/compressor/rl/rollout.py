"""Vectorised episodes: many environments a process, one batched inference for all of them, several processes.

The same loop drives evaluation (argmax), PPO's rollouts (sampled, with log-probabilities), demonstrations (expert with
noise) and DAgger (the policy drives, the expert labels), so that all of them see the same observations and play the
same chunks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from rlrc.compressor.models import precision
from rlrc.compressor.models.decode import check_sound
from rlrc.compressor.models.families import build
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.rl.actors import EncodedObservation, actor_of
from rlrc.compressor.rl.observations import Observer
from rlrc.compressor.training import distributed
from rlrc.envs.experts import expert, relabel
from rlrc.envs.metaworld import HORIZON, TASKS, MetaWorldEnv, MetaWorldTask
from rlrc.folders import replace_file
from rlrc.processes import WorkerPool
from rlrc.runtime.inference.preprocess import Tokenizer, unnormalise

SLOTS = 20  # environments that run side by side in a process: what one batched inference serves
TIMEOUT, EPISODE_TIMEOUT = 600.0, 10.0  # seconds, and more of them an episode, after which a worker is taken for stuck


@dataclass(frozen=True)
class Request:
    """One episode to run. The expert takes over from the policy at decision ``handover`` (0: it drives all along)."""

    task: str
    seed: int
    handover: int | None = None
    noise: float = 0.0  # standard deviation of the noise on the expert's actions, half of it held over a chunk


@dataclass(frozen=True)
class SamplingMode:
    sample: bool = False  # draw actions; otherwise play what is deployed
    temperature: float = 1.0  # of tokens
    correlation: float = 0.0  # of the sampling noise over the steps of a chunk, see rlrc.compressor.rl.actors
    label: bool = False  # ask the expert at every decision
    keep: Literal["", "pictures", "image_tokens"] = ""  # what of an observation to keep
    horizon: int = HORIZON


@dataclass
class RolloutEpisode:
    """Lists have one entry a decision.

    Picture uint8 (H, W, 3), raw state (S,), image tokens fp16 (N, width), chunk (K, D), trace: see Actor.
    """

    task: str
    seed: int
    success: bool = False
    steps: int = 0
    pictures: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    state: list[npt.NDArray[np.float32]] = field(default_factory=list)
    image_tokens: list[npt.NDArray[np.float16]] = field(default_factory=list)
    trace: list[npt.NDArray[Any]] = field(default_factory=list)  # what the policy drew
    chunk: list[npt.NDArray[np.float32]] = field(default_factory=list)  # the expert's, if asked


class ActionSampler:
    """Turns a batch of observations into chunks of actions. ``noise``: the learned part of sampling, see Actor."""

    def __init__(
        self,
        policy: PolicyModule,
        tokenizer: Tokenizer | None,
        mode: SamplingMode,
        noise: dict[str, Tensor] | None = None,
    ) -> None:
        self.policy, self.mode, self.spec = policy.eval(), mode, policy.spec
        self.observer = Observer(policy.spec, tokenizer)
        self.actor = actor_of(policy, mode.temperature, mode.correlation)
        if noise and self.actor.noise is not None:
            self.actor.noise.load_state_dict(noise)

    def __call__(
        self, tasks: list[str], images: np.ndarray, state: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pictures (B, H, W, 3), raw state (B, S) -> image tokens (B, N, width), trace and actions (B, K, D)."""
        inputs = self.observer(tasks, images, state)
        with torch.inference_mode(), precision.autocast("cpu"):
            seen = self.actor.encode(inputs)
            actions, trace = self.actor.act(seen, self.mode.sample)
        check_sound(actions, "actions")
        return seen.image_tokens.half().numpy(), trace.numpy(), unnormalise(actions.numpy(), self.spec.action.norm)

    def seen(self, tasks: Sequence[str], state: np.ndarray, image_tokens: np.ndarray) -> EncodedObservation:
        """What was seen at decisions, of what was kept of them: raw states (B, S), image tokens (B, N, width)."""
        words = self.observer.words(tasks, state)
        return EncodedObservation(torch.from_numpy(image_tokens), words.ids, self.observer.state(state), words.mask)


_idle: list[MetaWorldEnv] = []  # at most SLOTS environments that no slot uses; the one used last comes last


def _borrow(task: MetaWorldTask, size: int) -> MetaWorldEnv:
    """An idle environment of the same simulation, else a new one."""
    for i in reversed(range(len(_idle))):
        if (_idle[i].task.environment, _idle[i].size) == (task.environment, size):
            env = _idle.pop(i)
            env.task = task  # a task and its shared variant differ only in how a scene is drawn
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
    act: Callable
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


def _decide(slots: list[_Slot], driver: ActionSampler | None, horizon: int, mode: SamplingMode) -> list[np.ndarray]:
    """One decision for every slot: the chunks to play. Keeps what the mode asks for."""
    images = np.stack([slot.env.render() for slot in slots])
    state = np.stack([slot.env.state() for slot in slots])
    chunks: list[np.ndarray] = [np.empty(0)] * len(slots)
    if driver is not None:
        image_tokens, trace, actions = driver([slot.request.task for slot in slots], images, state)
        chunks = list(actions)
    for i, slot in enumerate(slots):
        decision = slot.episode.steps // horizon
        takes_over = slot.request.handover is not None and decision >= slot.request.handover
        if mode.keep:
            slot.episode.state.append(state[i])
            if mode.keep == "pictures":
                slot.episode.pictures.append(images[i])
            if driver is not None:
                slot.episode.trace.append(trace[i])
                if mode.keep == "image_tokens":
                    slot.episode.image_tokens.append(image_tokens[i])
        if mode.label or takes_over:
            label = relabel(slot.env, slot.act, horizon)
            slot.episode.chunk.append(label)
            if takes_over:
                sigma, rng = slot.request.noise * 0.5**0.5, slot.rng
                noise = rng.normal(0, sigma, label.shape) + rng.normal(0, sigma, label.shape[1])
                noise[:, 3] = 0  # the gripper stays as the expert wants it
                chunks[i] = label + noise
    return chunks


def run_episodes(
    requests: Iterable[Request], driver: ActionSampler | None, horizon: int, mode: SamplingMode, size: int
) -> Iterator[RolloutEpisode]:
    """Episodes in the order they end. Without a driver the expert must drive from the start."""
    waiting = iter(requests)
    slots = [_start(request, size) for request in islice(waiting, SLOTS)]
    while slots:
        chunks = _decide(slots, driver, horizon, mode)
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
    products: precision.Chosen,
) -> tuple[list[RolloutEpisode], float]:
    """In a worker: episodes and the CPU-seconds they took."""
    began = time.process_time()
    torch.set_num_threads(1)
    precision.use(products)
    torch.manual_seed(requests[0].seed)
    driver = None
    if weights is not None:
        policy, saved = (
            build(manifest.policy, manifest.towers),
            torch.load(weights, map_location="cpu", weights_only=True),
        )
        policy.load_state_dict(saved["policy"])
        driver = ActionSampler(policy, tokenizer_of(manifest, tokenizer), mode, saved["noise"])
    size = manifest.policy.cameras[0].height
    episodes = list(run_episodes(requests, driver, manifest.policy.action.horizon, mode, size))
    return episodes, time.process_time() - began


def tokenizer_of(manifest: Manifest, file: str | Path | None) -> Tokenizer | None:
    """Of the policy's prompt, if it has one."""
    if manifest.policy.prompt is None:
        return None
    assert file is not None
    return Tokenizer(Path(file), manifest.policy.prompt)


class Rollouts:
    """Processes that run episodes. Use as a context manager; a dead or stuck worker raises UserError."""

    def __init__(self, manifest: Manifest, tokenizer: Path | None, scratch: Path, workers: int = 2) -> None:
        self.manifest, self.scratch = manifest, scratch
        self.tokenizer = None if tokenizer is None else str(tokenizer)
        self.workers = WorkerPool(workers)
        self.seconds = 0.0  # wall time of the last call
        self.cpu_seconds = 0.0  # of all workers since the caller last set it

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(self, *_: object) -> None:
        self.workers.kill()

    def load_tokenizer(self) -> Tokenizer | None:
        return tokenizer_of(self.manifest, self.tokenizer)

    def run(
        self,
        requests: Sequence[Request],
        policy: PolicyModule | None,
        mode: SamplingMode,
        weights: dict[str, Tensor] | None = None,
        noise: dict[str, Tensor] | None = None,
    ) -> list[RolloutEpisode]:
        """Run episodes with a policy's present weights; results in the order of the requests.

        ``weights``: instead of the policy's own, where those are spread over processes; ``noise``: see Driver.
        Raises ValueError if there is no policy and a request leaves the start to it.
        """
        if policy is None and any(request.handover != 0 for request in requests):
            raise ValueError(
                "expected requests that the expert drives from the start (handover=0), as there is no policy"
            )
        start = time.monotonic()
        file, manifest = None, self.manifest
        if policy is not None:
            manifest = replace(manifest, towers=policy.towers)
            file = self.scratch / f"rollout-weights-{distributed.rank()}.pt"
            with replace_file(file) as new, new.open("wb") as stream:
                torch.save({"policy": weights or policy.state_dict(), "noise": noise}, stream)
        shares = [list(requests[worker :: self.workers.number]) for worker in range(self.workers.number)]
        work = partial(
            _work,
            weights=str(file) if file else None,
            manifest=manifest,
            tokenizer=self.tokenizer,
            mode=mode,
            products=precision.used(),
        )
        silence = TIMEOUT + EPISODE_TIMEOUT * len(shares[0])
        results = [result for _, result in self.workers.run(work, [share for share in shares if share], silence)]
        episodes = [episode for result, _ in results for episode in result]
        self.cpu_seconds += sum(cpu for _, cpu in results)
        self.seconds = time.monotonic() - start
        by_request = {(episode.task, episode.seed): episode for episode in episodes}
        return [by_request[request.task, request.seed] for request in requests]
