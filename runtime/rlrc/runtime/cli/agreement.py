"""How far the graphs of one artifact are from those of another, on golden or simulator observations.

Golden observations are few, and their pictures are random if the artifact came from an official checkpoint. In the
simulator, the other artifact plays episodes, and both infer every observation on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlrc.artifact import VerifiedSpec
from rlrc.envs.environment import open_environment
from rlrc.envs.seeds import EVALUATION
from rlrc.errors import UserError
from rlrc.runtime.control.episodes import Rate, play_episodes
from rlrc.runtime.inference import verify
from rlrc.runtime.inference.policy import LocalPolicy, Result


class RecordingPolicy:
    """Records a policy's observations, with the noise drawn, and its results."""

    def __init__(self, policy: LocalPolicy) -> None:
        self._policy, self._noise = policy, np.random.default_rng(0)
        self.observations: list[Mapping[str, Any]] = []
        self.results: list[Result] = []

    def infer(self, observation: Mapping[str, Any]) -> Result:
        spec = self._policy.spec
        if spec.flow is not None:
            shape = (spec.action.horizon, spec.flow.width)
            observation = {**observation, "noise": self._noise.standard_normal(shape, np.float32)}
        result = self._policy.infer(observation)
        self.observations.append(observation)
        self.results.append(result)
        return result

    def reset(self) -> None:
        self._policy.reset()


def check_comparable(policy: LocalPolicy, other: LocalPolicy) -> None:
    """Raises UserError unless both have the same inputs and outputs."""
    for part in ("cameras", "state", "prompt", "action", "flow"):
        ours, theirs = getattr(policy.spec, part), getattr(other.spec, part)
        if ours != theirs:
            raise UserError(
                f"expected the same {part} in {policy.artifact.path} and {other.artifact.path}, found {ours} and "
                f"{theirs}; compare artifacts made from the same policy"
            )


def play(policy: LocalPolicy, names: Sequence[str], mapping: Path | None, episodes: int) -> verify.Golden:
    """Plays the environments' first evaluation episodes. -> the observations with the policy's actions"""
    if not 1 <= episodes <= len(EVALUATION):
        raise UserError(f"expected 1 to {len(EVALUATION)} episodes, found {episodes}; change --episodes")
    recording = RecordingPolicy(policy)
    for name in names:
        env = open_environment(name, policy.spec, mapping)
        try:
            for _ in play_episodes(recording, env, EVALUATION[:episodes], Rate(0)):
                pass
        finally:
            env.close()
    return reference(recording.observations, recording.results)


def replay(policy: LocalPolicy, golden: verify.Golden) -> verify.Golden:
    """The same observations with this policy's actions."""
    recording = RecordingPolicy(policy)
    for i in range(len(golden)):
        recording.infer(golden.observation(i, policy.spec))
    return reference(recording.observations, recording.results)


def reference(observations: Sequence[Mapping[str, Any]], results: Sequence[Result]) -> verify.Golden:
    """Observations with the same entries, and results, as a golden set."""
    cameras = [name for name in observations[0] if name.startswith("image.")]
    tokens = [result["tokens"] for result in results if result["tokens"] is not None]

    def stack(name: str) -> Any:
        return np.array([observation[name] for observation in observations]) if name in observations[0] else None

    return verify.Golden(
        images={name.removeprefix("image."): stack(name) for name in cameras},
        actions=np.stack([result["actions"] for result in results]),
        state=stack("state"),
        instructions=stack("instruction"),
        noise=stack("noise"),
        tokens=np.stack(tokens) if tokens else None,
    )


def measure(policy: LocalPolicy, golden: verify.Golden) -> VerifiedSpec:
    """With a tolerance relative to the range, since there are no logits by which to excuse flips at ties."""
    graphs = [graph for graph in policy.artifact.manifest.graphs if graph.backend == policy.backend]
    precision = graphs[-1].precision
    return verify.measure(policy, golden, verify.default_tolerances(policy.spec.action, precision))
