"""The reference policy: family "tiny" on Meta-World, 10.7 M parameters, 92 % of them in the decoder."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from rlrc.artifact import (
    TOKENIZER,
    ActionSpec,
    CameraSpec,
    HistoryEntry,
    LayerSpec,
    Manifest,
    NormStats,
    PolicySpec,
    PromptSpec,
    StateSpec,
    TowerSpec,
    create_artifact,
)
from rlrc.compressor.models.tiny import FAMILY, TinyPolicy
from rlrc.compressor.stages.artifact_io import write_policy
from rlrc.envs.experts import expert
from rlrc.envs.metaworld import ACTION_NAMES, PICTURE, STATE_NAMES, STATE_UNITS, TASKS, make
from rlrc.envs.render import CAMERA
from rlrc.envs.seeds import VALIDATION
from rlrc.runtime.inference.prompts import Tokenizer

PAD, UNKNOWN = "[PAD]", "[UNK]"
GOLDEN_SCENES = 3  # of every task: observed at the start, and after ten steps of the expert


def vocabulary() -> dict[str, int]:
    words = sorted({word for task in TASKS.values() for word in task.instruction.split()})
    return {word: i for i, word in enumerate([PAD, UNKNOWN, *words])}


def write_tokenizer(file: Path) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(file))


def policy_spec(size: int = 96, bins: int = 128, horizon: int = 5) -> PolicySpec:
    return PolicySpec(
        family=FAMILY,
        decode="parallel",
        cameras=(CameraSpec(CAMERA, size, size, "none", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "HWC"),),
        # Rounded workspace: the hand moves 40 x 30 x 30 cm around (0, 0.6, 0.2) m, a few centimetres each step.
        state=StateSpec(
            STATE_NAMES,
            STATE_UNITS,
            NormStats((0.0, 0.6, 0.2, 0.5, 0.0, 0.0, 0.0), (0.2, 0.15, 0.15, 0.5, 0.02, 0.02, 0.02), clip=5.0),
        ),
        prompt=PromptSpec("{instruction}", max_tokens=6, pad_id=0),
        action=ActionSpec(
            horizon,
            ACTION_NAMES,
            ("delta", "delta", "delta", "gripper"),
            ("cm", "cm", "cm", "1"),
            NormStats((0.0,) * 4, (1.0,) * 4),
            bins,
        ),
        geometry={"vocabulary": len(vocabulary()), "stem_factors": [4, 2, 2], "stem_widths": [64, 128], "merge": 2},
    )


def towers() -> dict[str, TowerSpec]:
    """Ten heads and 640 channels in each decoder block: a tenth is one head and 64 channels, two groups of 32."""
    return {
        "vision": TowerSpec(128, (LayerSpec(heads=4, kv_heads=4, head_dim=32, mlp=384),) * 3),
        "decoder": TowerSpec(256, (LayerSpec(heads=10, kv_heads=10, head_dim=32, mlp=640),) * 12),
    }


def create_reference(out: Path, seed: int = 0) -> Manifest:
    """Write a reference policy with random weights, from which training starts."""
    torch.manual_seed(seed)
    with create_artifact(out) as draft:
        policy = TinyPolicy(policy_spec(), towers())
        write_tokenizer(draft.file(TOKENIZER))
        assert policy.spec.prompt is not None
        tokenizer = Tokenizer(draft.file(TOKENIZER), policy.spec.prompt)
        entry = HistoryEntry("new", {"seed": seed}, version("rlrc"), None, 0.0)
        return write_policy(draft, policy, golden_observations(tokenizer), (entry,))


def golden_observations(tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """Raw observations of every task, in the form of golden.npz (see artifact_io.py)."""
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
