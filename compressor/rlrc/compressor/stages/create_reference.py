"""The policy of the reference family that training starts from: random weights, and observations of every task."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlrc.artifact import TOKENIZER, HistoryEntry, Manifest, create_artifact
from rlrc.compressor.models.tiny import TinyPolicy
from rlrc.compressor.stages import reference
from rlrc.compressor.stages.artifact_io import write_policy
from rlrc.envs.experts import expert
from rlrc.envs.metaworld import PICTURE, TASKS, make
from rlrc.envs.seeds import VALIDATION
from rlrc.runtime.inference.preprocess import Tokenizer

GOLDEN_SCENES = 3  # of every task, at the start and half a second into the expert's way


def new(out: Path, seed: int = 0) -> Manifest:
    """A reference policy with random weights: what training starts from."""
    torch.manual_seed(seed)
    with create_artifact(out) as draft:
        policy = TinyPolicy(reference.policy_spec(), reference.towers())
        reference.write_tokenizer(draft.file(TOKENIZER))
        assert policy.spec.prompt is not None
        tokenizer = Tokenizer(draft.file(TOKENIZER), policy.spec.prompt)
        entry = HistoryEntry("new", {"seed": seed}, version("rlrc"), None, 0.0)
        return write_policy(draft, policy, golden_observations(tokenizer), (entry,))


def golden_observations(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Raw observations of every task: at the start and after ten steps of the expert."""
    rows: list[dict[str, Any]] = []
    for name, task in TASKS.items():
        env, act = make(name), expert(task)
        for scene in range(GOLDEN_SCENES):
            rows.append(env.reset(seed=VALIDATION.stop - 1 - scene)[0])
            for _ in range(10):
                env.advance(act(env.full_observation))
            rows.append(env.observe())
    return {
        PICTURE: np.stack([row[PICTURE] for row in rows]),
        "state": np.stack([row["state"] for row in rows]),
        "instructions": np.array([row["instruction"] for row in rows]),
        "ids": np.stack([tokenizer(row["instruction"]) for row in rows]),
    }
