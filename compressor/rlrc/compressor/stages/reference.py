"""The reference policy's specification: family "tiny" on Meta-World, 10.7 M parameters, 92 % of them in the decoder."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from rlrc.artifact import ActionSpec, CameraSpec, LayerSpec, NormStats, PolicySpec, PromptSpec, StateSpec, TowerSpec
from rlrc.compressor.models.tiny import FAMILY
from rlrc.envs.metaworld import ACTION_NAMES, STATE_NAMES, STATE_UNITS, TASKS
from rlrc.envs.render import CAMERA

PAD, UNKNOWN = "[PAD]", "[UNK]"


def vocabulary() -> dict[str, int]:
    words = sorted({word for task in TASKS.values() for word in task.instruction.split()})
    return {word: i for i, word in enumerate([PAD, UNKNOWN, *words])}


def write_tokenizer(file: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(file))


def policy_spec(size: int = 96, bins: int = 128, horizon: int = 5) -> PolicySpec:
    return PolicySpec(
        family=FAMILY,
        decode="parallel",
        cameras=(CameraSpec(CAMERA, size, size, "none", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "HWC"),),
        # Round figures of the workspace: hand within 40 x 30 x 30 cm around (0, 0.6, 0.2) m, a few centimetres a step.
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
    """Ten heads and 640 channels a decoder block: a tenth of each is one head and 64 channels, whole groups of 32."""
    return {
        "vision": TowerSpec(128, (LayerSpec(heads=4, kv_heads=4, head_dim=32, mlp=384),) * 3),
        "decoder": TowerSpec(256, (LayerSpec(heads=10, kv_heads=10, head_dim=32, mlp=640),) * 12),
    }
