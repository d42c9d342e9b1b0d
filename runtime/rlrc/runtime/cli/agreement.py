"""How far the graphs of one artifact are from those of another, on golden or simulator observations.

The golden observations are few, and random pictures where the artifact came of an official checkpoint. What counts is
what the robot will see: the other artifact plays episodes, and both are asked about every observation on its way.
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
from rlrc.runtime.control import episodes as loop
from rlrc.runtime.inference import verify
from rlrc.runtime.inference.policy import LocalPolicy, Result


class RecordingPolicy:
    """A policy that keeps what it was asked and what it answered, with the noise that it drew."""

    def __init__(self, policy: LocalPolicy) -> None:
        self._policy, self._noise = policy, np.random.default_rng(0)
        self.asked: list[Mapping[str, Any]] = []
        self.answered: list[Result] = []

    def infer(self, observation: Mapping[str, Any]) -> Result:
        spec = self._policy.spec
        if spec.flow is not None:
            shape = (spec.action.horizon, spec.flow.width)
            observation = {**observation, "noise": self._noise.standard_normal(shape, np.float32)}
        result = self._policy.infer(observation)
        self.asked.append(observation)
        self.answered.append(result)
        return result

    def reset(self) -> None:
        self._policy.reset()


def check_comparable(policy: LocalPolicy, other: LocalPolicy) -> None:
    """Raises UserError unless both see and do the same."""
    for part in ("cameras", "state", "prompt", "action", "flow"):
        ours, theirs = getattr(policy.spec, part), getattr(other.spec, part)
        if ours != theirs:
            raise UserError(
                f"expected the same {part} in {policy.artifact.path} and {other.artifact.path}, found {ours} and "
                f"{theirs}; compare artifacts that come of one policy"
            )


def play(policy: LocalPolicy, names: Sequence[str], mapping: Path | None, episodes: int) -> verify.Golden:
    """The observations on the policy's way through the environments' first evaluation episodes, with its answers."""
    if not 1 <= episodes <= len(EVALUATION):
        raise UserError(f"expected 1 to {len(EVALUATION)} episodes, found {episodes}; change --episodes")
    remembering = RecordingPolicy(policy)
    for name in names:
        env = open_environment(name, policy.spec, mapping)
        try:
            for _ in loop.episodes(remembering, env, EVALUATION[:episodes], loop.Rate(0)):
                pass
        finally:
            env.close()
    return reference(remembering.asked, remembering.answered)


def replay(policy: LocalPolicy, golden: verify.Golden) -> verify.Golden:
    """The same observations with this policy's answers."""
    remembering = RecordingPolicy(policy)
    for i in range(len(golden)):
        remembering.infer(golden.observation(i, policy.spec))
    return reference(remembering.asked, remembering.answered)


def reference(asked: Sequence[Mapping[str, Any]], answered: Sequence[Result]) -> verify.Golden:
    """Observations of one kind, and answers, as golden ones."""
    cameras = [name for name in asked[0] if name.startswith("image.")]
    tokens = [result["tokens"] for result in answered if result["tokens"] is not None]

    def stacked(name: str) -> Any:
        return np.array([observation[name] for observation in asked]) if name in asked[0] else None

    return verify.Golden(
        images={name.removeprefix("image."): stacked(name) for name in cameras},
        actions=np.stack([result["actions"] for result in answered]),
        state=stacked("state"),
        instructions=stacked("instruction"),
        noise=stacked("noise"),
        tokens=np.stack(tokens) if tokens else None,
    )


def measure(policy: LocalPolicy, golden: verify.Golden) -> VerifiedSpec:
    """Held to a part of the range: which of two tokens that are as good wins is nobody's fault here."""
    graphs = [graph for graph in policy.artifact.manifest.graphs if graph.backend == policy.backend]
    precision = graphs[-1].precision
    return verify.measure(policy, golden, verify.default_tolerances(policy.spec.action, precision))
