"""Write a SmolVLA of the official size with random weights as a complete checkpoint folder of lerobot.

Processors, statistics and a small tokenizer come from the golden checkpoint in tests/data; dimensions are the official
ones (rlrc.compressor.checkpoints.geometry). Weights are scaled to keep activations near one and stored in bfloat16, as
in lerobot's checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from rlrc import artifact as artifacts
from rlrc.checkpoint_folder import Flags
from rlrc.compressor.checkpoints import shapes
from rlrc.compressor.checkpoints.geometry import SMOLLM2, SMOLVLA_EXPERT, SMOLVLM_VISION, SMOLVLM_VOCABULARY
from rlrc.compressor.prune.lossless import cut_lossless
from rlrc.compressor.quantize.quantize import QuantizeConfig, quantize
from rlrc.compressor.stages import artifact_io
from rlrc.compressor.stages.sources import OfficialSource

DATA = Path(__file__).resolve().parents[2] / "tests" / "data" / "smolvla"
CAMERAS, PICTURE, RESIZED, DIM, CHUNK, WIDTH = ("top", "wrist"), 256, 512, 6, 50, 32
MERGE, EVERY = 4, 2


def write(folder: Path, seed: int = 0) -> None:
    """Write ``checkpoint``, ``smolvlm``, ``hints.json`` (both needed to read it) and ``observation.npz``."""
    checkpoint, language = folder / "checkpoint", folder / "smolvlm"
    shutil.copytree(DATA / "checkpoint", checkpoint)
    shutil.copytree(DATA / "tiny_smolvlm", language)
    _edit(language / "config.json", _language)
    _edit(checkpoint / "config.json", lambda config: _policy(config, language))
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        _edit(checkpoint / name, lambda steps: _processors(steps, language))
    torch.manual_seed(seed)
    tensors = shapes.smolvla(SMOLVLM_VISION, MERGE, SMOLLM2, SMOLVLA_EXPERT, EVERY, SMOLVLM_VOCABULARY, WIDTH, WIDTH)
    save_file({name: _weight(name, shape) for name, shape in tensors.items()}, checkpoint / "model.safetensors")
    heads = {"num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64}
    hints = {"geometry": {"text": heads, "vision": {"num_attention_heads": 12}}}
    (folder / "hints.json").write_text(json.dumps(hints))
    np.savez(folder / "observation.npz", **observation(seed))  # type: ignore[arg-type]


def compress(folder: Path) -> None:
    """Convert the checkpoint to artifacts ``dense`` and ``int4``, as `rlrc prune --lossless` and `rlrc quantize` do.

    The race's observation is their only golden observation.
    """
    source = OfficialSource(folder / "checkpoint", Flags(folder / "hints.json", tokenizer=folder / "smolvlm"))
    policy, _ = cut_lossless(source.load(), source.unread)
    with np.load(folder / "observation.npz") as stored:
        raw = {name: stored[name][None] for name in stored.files if name != "instruction"}
        raw["instructions"] = stored["instruction"][None]
    assert source.tokenizer is not None
    raw["ids"] = source.tokenizer(str(raw["instructions"][0]), raw["state"][0])[None]
    for name, result in (("dense", None), ("int4", quantize(policy, QuantizeConfig()))):
        with artifacts.create_artifact(folder / name) as draft:
            source.copy_files(draft)
            artifact_io.write_policy(draft, policy, raw, source.history, result)


def observation(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    pictures = {f"image.{name}": random.integers(0, 256, (PICTURE, PICTURE, 3), np.uint8) for name in CAMERAS}
    return {
        **pictures,
        "state": random.uniform(-1, 1, DIM).astype(np.float32),
        "instruction": np.array("pick up the red cube"),
        "noise": random.standard_normal((CHUNK, WIDTH), np.float32),
    }


def _weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    noise = torch.randn(shape)
    if name.endswith("bias"):
        noise *= 0.02
    elif len(shape) == 1:
        noise = 1 + 0.1 * noise
    else:
        noise /= np.prod(shape[1:]) ** 0.5
    return noise.to(torch.bfloat16)


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.chmod(0o644)
    path.write_text(json.dumps(values, indent=2))


def _language(config: dict[str, Any]) -> None:
    """Dimensions of SmolVLM2-500M-Video-Instruct, with only the blocks that SmolVLA reads."""
    config["scale_factor"] = MERGE
    config["text_config"] |= {
        "hidden_size": SMOLLM2.width,
        "intermediate_size": SMOLLM2.mlp,
        "num_hidden_layers": SMOLLM2.depth,
        "num_attention_heads": SMOLLM2.heads,
        "num_key_value_heads": SMOLLM2.kv_heads,
        "head_dim": SMOLLM2.head_dim,
        "vocab_size": SMOLVLM_VOCABULARY,
    }
    config["vision_config"] |= {
        "hidden_size": SMOLVLM_VISION.width,
        "intermediate_size": SMOLVLM_VISION.mlp,
        "num_hidden_layers": SMOLVLM_VISION.depth,
        "num_attention_heads": 12,
        "image_size": RESIZED,
        "patch_size": SMOLVLM_VISION.patch,
    }


def _policy(config: dict[str, Any], language: Path) -> None:
    config["input_features"] = {
        **{f"observation.images.{name}": {"type": "VISUAL", "shape": [3, PICTURE, PICTURE]} for name in CAMERAS},
        "observation.state": {"type": "STATE", "shape": [DIM]},
    }
    config["output_features"] = {"action": {"type": "ACTION", "shape": [DIM]}}
    config |= {
        "resize_imgs_with_padding": [RESIZED, RESIZED],
        "chunk_size": CHUNK,
        "n_action_steps": CHUNK,
        "num_vlm_layers": SMOLLM2.depth,
        "vlm_model_name": str(language.resolve()),
        "num_steps": 10,
    }


def _processors(values: dict[str, Any], language: Path) -> None:
    for step in values["steps"]:
        config = step.get("config") or {}
        if "tokenizer_name" in config:
            config["tokenizer_name"] = str(language.resolve())
        if "observation.state" in config.get("features", {}):
            config["features"] = {
                **{
                    f"observation.images.{name}": {"type": "VISUAL", "shape": [3, PICTURE, PICTURE]} for name in CAMERAS
                },
                "observation.state": {"type": "STATE", "shape": [DIM]},
                "action": {"type": "ACTION", "shape": [DIM]},
            }
