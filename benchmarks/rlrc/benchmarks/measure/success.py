"""Success rate of policies in closed-loop episodes on the simulator, with the torch-free runtime.

Every policy gets the same scenes (the same seeds of the evaluation range), so that two can be compared scene by scene.
Finished episodes are kept in a file next to the output, from which an interrupted run continues.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlrc.benchmarks.results.results import NamedArtifact
from rlrc.benchmarks.results.stats import mcnemar, paired_difference_limit, wilson
from rlrc.errors import UserError
from rlrc.folders import sha256
from rlrc.processes import WorkerPool

if TYPE_CHECKING:
    from rlrc.envs.environment import Environment
    from rlrc.runtime.inference.policy import LocalPolicy, Policy

EPISODES_A_JOB = 5  # few, so that all workers stay busy to the end; a task's simulator stays open between jobs
SILENCE_S, LONG_SILENCE_S = 300.0, 3600.0  # timeouts; five episodes of LIBERO take minutes without a GPU


@dataclass(frozen=True)
class Scenes:
    """The episodes to play: ``episodes`` of every task from seed ``first_seed`` on, at most ``horizon`` steps each.

    A task is one of Meta-World's or, with a colon in its name, an environment. ``horizon`` None: the environment's.
    """

    episodes: Mapping[str, int]
    first_seed: int
    horizon: int | None
    mapping: Path | None = None  # file that maps the environments' values to the policy's

    def seeds(self, task: str) -> range:
        return range(self.first_seed, self.first_seed + self.episodes[task])

    def describe(self) -> dict[str, Any]:
        """The fields that must be equal for scenes to be comparable, besides their number."""
        mapping = {} if self.mapping is None else {"mapping": sha256(self.mapping)}
        return {"first_seed": self.first_seed, "horizon": self.horizon} | mapping


@dataclass(frozen=True)
class ScoredEpisode:
    task: str
    seed: int
    success: bool
    steps: int


@dataclass(frozen=True)
class Job:
    name: str
    path: Path
    threads: int
    task: str
    seeds: tuple[int, ...]
    horizon: int | None
    mapping: Path | None = None


def scenes(tasks: Sequence[str] = (), per_task: int = 50, horizon: int | None = None) -> Scenes:
    """Scenes of the evaluation range. Raises UserError for an unknown task or too many episodes.

    Without tasks: all of them, with twice as many episodes of a task without a shared variant, so that every task has
    the same weight.
    """
    from rlrc.envs.metaworld import HORIZON, PREFIX, TASKS, find_task
    from rlrc.envs.seeds import EVALUATION

    most = len(EVALUATION) // 2
    if not 1 <= per_task <= most:
        raise UserError(f"expected 1 to {most} episodes a task, found {per_task}; change --episodes-per-task")
    if tasks:
        episodes = {find_task(name.removeprefix(PREFIX)).name: per_task for name in tasks}
    else:
        variants = Counter(task.environment for task in TASKS.values())
        alone = [name for name, task in TASKS.items() if variants[task.environment] == 1]
        episodes = {name: 2 * per_task if name in alone else per_task for name in TASKS}
    return Scenes(episodes, EVALUATION.start, HORIZON if horizon is None else horizon)


def environment_scenes(
    environments: Sequence[str], opened: Sequence[NamedArtifact], per_task: int = 50, mapping: Path | None = None
) -> Scenes:
    """Scenes of environments by name; if all are Meta-World's, those of ``scenes``.

    Raises UserError for too many episodes or an environment that does not fit an artifact's policy.
    """
    from rlrc.envs.environment import check_environment
    from rlrc.envs.libero import INITIAL_STATES
    from rlrc.envs.seeds import EVALUATION

    for name in environments:
        for named in opened:
            check_environment(name, named.artifact.manifest.policy, mapping)
    if all(name.startswith("metaworld:") for name in environments):
        return scenes(environments, per_task)
    libero = any(name.startswith("libero:") for name in environments)
    most = INITIAL_STATES if libero else len(EVALUATION)
    if not 1 <= per_task <= most:
        why = " (the initial states of a LIBERO task)" if libero else ""
        raise UserError(
            f"expected 1 to {most} episodes an environment{why}, found {per_task}; change --episodes-per-task"
        )
    episodes = {name.removeprefix("metaworld:"): per_task for name in environments}
    return Scenes(episodes, EVALUATION.start, None, mapping)


def play(
    policy: Policy,
    environment: Environment,
    seed: int,
    horizon: int | None = None,
    watch: Callable[[int, Any], None] = lambda *_: None,
) -> ScoredEpisode:
    """Play one episode of at most ``horizon`` steps (None: the environment's); every chunk is executed to its end.

    ``watch`` is called with the number of steps so far and each observation given to the policy, then with the last.
    """
    horizon = environment.horizon if horizon is None else horizon
    observation, _ = environment.reset(seed=seed)
    policy.reset()
    success, over, steps = False, False, 0
    while not over and steps < horizon:
        watch(steps, observation)
        for action in policy.infer(observation)["actions"][: horizon - steps]:
            success, steps = environment.advance(action), steps + 1
            over = success or environment.over
            if over:
                break
        observation = environment.observe()
    watch(steps, observation)
    return ScoredEpisode(environment.name, seed, success, steps)


def measure(
    artifacts: Sequence[NamedArtifact],
    scenes: Scenes,
    workers: int = 2,
    threads: int = 1,
    partial: Path | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> dict[str, list[ScoredEpisode]]:
    """Name -> episodes. Those in the file ``partial`` are not played again; ``tick`` gets the number of new ones."""
    key = {
        "scenes": {"episodes": dict(scenes.episodes)} | scenes.describe(),
        "artifacts": {named.name: named.artifact.digest for named in artifacts},
    }
    with _Partial(partial, key) as kept, WorkerPool(workers) as pool:
        tick(len(kept.episodes))
        jobs = [job for named in artifacts for job in _jobs(named, scenes, threads, kept.episodes)]
        silence = LONG_SILENCE_S if any(task.startswith("libero:") for task in scenes.episodes) else SILENCE_S
        for job, episodes in pool.run(_play_job, jobs, silence):
            for episode in episodes:
                kept.add(job.name, episode)
            tick(len(episodes))
    return {
        named.name: [kept.episodes[named.name, task, seed] for task in scenes.episodes for seed in scenes.seeds(task)]
        for named in artifacts
    }


def _jobs(
    named: NamedArtifact, scenes: Scenes, threads: int, played: Mapping[tuple[str, str, int], ScoredEpisode]
) -> Iterator[Job]:
    for task in scenes.episodes:
        left = [seed for seed in scenes.seeds(task) if (named.name, task, seed) not in played]
        for i in range(0, len(left), EPISODES_A_JOB):
            seeds = tuple(left[i : i + EPISODES_A_JOB])
            yield Job(named.name, named.artifact.path, threads, task, seeds, scenes.horizon, scenes.mapping)


_playing: dict[tuple[Path, str], tuple[LocalPolicy, Environment]] = {}  # at most one pair is open in a process


def _open(job: Job) -> tuple[LocalPolicy, Environment]:
    from rlrc.envs.environment import open_environment
    from rlrc.runtime.inference.policy import LocalPolicy

    key = (job.path, job.task)
    if key not in _playing:
        while _playing:
            _playing.popitem()[1][1].close()
        policy = LocalPolicy.load(job.path, threads=job.threads)
        name = job.task if ":" in job.task else f"metaworld:{job.task}"
        _playing[key] = (policy, open_environment(name, policy.spec, job.mapping))
    return _playing[key]


def _play_job(job: Job) -> list[ScoredEpisode]:
    policy, environment = _open(job)
    return [play(policy, environment, seed, job.horizon) for seed in job.seeds]


class _Partial:
    """Episodes on disk, one a line, after a line with the artifacts and scenes. Without a path: in memory only."""

    def __init__(self, path: Path | None, key: Mapping[str, Any]) -> None:
        self.path, self.key = path, key
        self.episodes: dict[tuple[str, str, int], ScoredEpisode] = {}

    def __enter__(self) -> _Partial:
        if self.path is None:
            return self
        if self.path.exists():
            self._read()
        # Rewritten, to remove an incomplete line of a killed run.
        lines = [json.dumps(self.key), *(self._line(name, episode) for (name, _, _), episode in self.episodes.items())]
        self.path.write_text("\n".join(lines) + "\n")
        self._stream = self.path.open("a")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.path is not None:
            self._stream.close()

    def add(self, name: str, episode: ScoredEpisode) -> None:
        self.episodes[name, episode.task, episode.seed] = episode
        if self.path is not None:
            self._stream.write(self._line(name, episode) + "\n")
            self._stream.flush()

    @staticmethod
    def _line(name: str, episode: ScoredEpisode) -> str:
        return json.dumps([name, asdict(episode)])

    def _read(self) -> None:
        assert self.path is not None
        first, *lines = self.path.read_text().split("\n")
        if first != json.dumps(self.key):
            raise UserError(
                f"expected {self.path} to hold episodes of these artifacts and scenes, found another run's; "
                "finish that run, delete the file, or choose another --out"
            )
        for line in lines[:-1]:  # the last line is empty or incomplete
            name, episode = json.loads(line)
            played = ScoredEpisode(**episode)
            self.episodes[name, played.task, played.seed] = played


def row(episodes: Sequence[ScoredEpisode], scenes: Scenes, hard: Collection[str]) -> dict[str, Any]:
    """The measured part of a table row: all tasks, the ``hard`` ones, each task; Wilson intervals at 95 %.

    ``outcomes``: a 1 or 0 for every scene of a task, in the order of the seeds; ``steps``: mean of the successes.
    """
    by_task: dict[str, list[ScoredEpisode]] = {}
    for episode in episodes:
        by_task.setdefault(episode.task, []).append(episode)
    return {
        **_rate(episodes),
        "hard": _rate([episode for episode in episodes if episode.task in hard]),
        "per_task": {task: _rate(played) for task, played in by_task.items()},
        "scenes": scenes.describe(),
        "outcomes": {
            task: "".join(str(int(episode.success)) for episode in played) for task, played in by_task.items()
        },
    }


def _rate(episodes: Sequence[ScoredEpisode]) -> dict[str, Any]:
    steps = [episode.steps for episode in episodes if episode.success]
    if not episodes:
        return {"success": None, "episodes": 0, "interval": [0.0, 1.0], "steps": None}
    return {
        "success": round(len(steps) / len(episodes), 6),
        "episodes": len(episodes),
        "interval": [round(limit, 6) for limit in wilson(len(steps), len(episodes))],
        "steps": round(sum(steps) / len(steps), 1) if steps else None,
    }


def hard_tasks(scenes: Scenes) -> list[str]:
    """The hard tasks among those of Meta-World; other environments have none."""
    if all(":" in task for task in scenes.episodes):
        return []
    from rlrc.envs.metaworld import TASKS

    return [task for task in scenes.episodes if task in TASKS and TASKS[task].hard]


def same_scenes(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> bool:
    """Whether both rows hold outcomes of the same scenes."""
    if not all("outcomes" in one and "scenes" in one for one in (row, baseline)):
        return False
    counts = [{task: len(scenes) for task, scenes in one["outcomes"].items()} for one in (row, baseline)]
    return row["scenes"] == baseline["scenes"] and counts[0] == counts[1]


def compare(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """Compare scene by scene. Raises UserError unless both rows hold outcomes of the same scenes."""
    if not same_scenes(row, baseline):
        raise UserError(
            f"expected the same scenes for {row['name']} and {baseline['name']}, found others; measure both in one run"
        )
    outcomes, baseline_outcomes = row["outcomes"], baseline["outcomes"]
    pairs = [(a, b) for task in outcomes for a, b in zip(outcomes[task], baseline_outcomes[task], strict=True)]
    only, only0 = pairs.count(("1", "0")), pairs.count(("0", "1"))
    return {
        "name": row["name"],
        "baseline": baseline["name"],
        "pairs": len(pairs),
        "only": only,
        "only_baseline": only0,
        "difference": round((only - only0) / len(pairs), 6),
        "lower_limit": round(paired_difference_limit(only, only0, len(pairs)), 6),
        "mcnemar_p": round(mcnemar(only, only0), 6),
    }
