"""The real dimensions of the official checkpoints without their weights: folders in memory that hold only shapes.

The readers treat them as real folders (recognise, layout, build on the meta device), so memory plans and full-size
benchmarks need no download. Their statistics change nothing: low -1, high 1, mean 0, deviation 1.

``python -m rlrc.compressor.checkpoints.geometry`` writes the readers' result to rlrc/geometries.json, for machines
without torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import isqrt
from pathlib import Path
from typing import Any

import torch

from rlrc.artifact import geometries
from rlrc.compressor.checkpoints import reader, shapes
from rlrc.compressor.checkpoints.folder import Folder, ReadOptions
from rlrc.compressor.checkpoints.shapes import Language, Vision
from rlrc.compressor.models.storage import tensors as models_tensors
from rlrc.compressor.models.storage.tensors import Tensors
from rlrc.strict import encode

DINOV2 = Vision(1024, 24, 4096, patch=14, tokens=256)  # ViT-L/14 with registers at 224 pixels
SIGLIP = Vision(1152, 27, 4304, patch=14, tokens=256)  # SoViT-400M/14 at 224 pixels
LLAMA2 = LLAMA_DEFAULTS = Language(4096, 32, 32, 32, 128, 11008)  # Llama 2 7B
GEMMA_2B = Language(2048, 18, 8, 1, 256, 16384)
GEMMA_300M = Language(1024, 18, 8, 1, 256, 4096)
# The first 16 of 32 blocks of SmolVLM2-500M-Video-Instruct, and the expert of 0.75 times its width.
SMOLVLM_VISION = Vision(768, 12, 3072, patch=16, tokens=1024)
SMOLLM2 = Language(960, 16, 15, 5, 64, 2560)
SMOLVLA_EXPERT = Language(720, 16, 15, 5, 64, 2048)

PATCHED_LLAMA_VOCABULARY = 32064  # Llama 2's 32,000, <PAD>, and rows up to a multiple of 64
PALIGEMMA_VOCABULARY = 257152
SMOLVLM_VOCABULARY = 49280


def folder(name: str) -> tuple[Folder, ReadOptions]:
    """The official checkpoint of a known name, and the options that it needs. Raises UserError for another name."""
    if name not in GEOMETRIES:
        name = geometries.canonical_name(name)
    return GEOMETRIES[name](name)


def describe_geometry(name: str) -> dict[str, Any]:
    """An entry of rlrc/geometries.json: the policy, its towers, and the parameters of each module."""
    opened, options = folder(name)
    layout = reader.layout(opened, options)
    modules: dict[str, int] = {}
    for tensor, value in reader.build(layout).state_dict().items():
        part = tensor.split(".")[0]
        modules[part] = modules.get(part, 0) + value.numel()
    return {"policy": encode(layout.spec), "towers": encode(layout.towers), "modules": modules}


def _openvla(name: str) -> tuple[Folder, ReadOptions]:
    """openvla/openvla-7b."""
    tensors = models_tensors.tensors_from_shapes(name, shapes.openvla(DINOV2, SIGLIP, LLAMA2, PATCHED_LLAMA_VOCABULARY))
    config = {
        "model_type": "openvla",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "use_fused_vision_backbone": True,
        "image_sizes": [_pixels(DINOV2)] * 2,
        "image_resize_strategy": "resize-naive",
        "n_action_bins": 256,
        "pad_to_multiple_of": 64,
        "text_config": _text_config(LLAMA2),
        "norm_stats": {"normalised": {"action": _bound_statistics(7, gripper=True), "proprio": _bound_statistics(8)}},
    }
    return Folder(Path(name), config, tensors), ReadOptions()


def _openvla_oft(name: str) -> tuple[Folder, ReadOptions]:
    """moojink/openvla-7b-oft-finetuned-libero-spatial: two pictures, proprioception, an L1 head, chunks of 8."""
    base, _ = _openvla(name)
    head, proprio = "action_head--150000_checkpoint.pt", "proprio_projector--150000_checkpoint.pt"
    virtual = {
        head: models_tensors.tensors_from_shapes(f"{name}/{head}", shapes.oft_head(LLAMA2.width, 7), file=head),
        proprio: models_tensors.tensors_from_shapes(
            f"{name}/{proprio}", shapes.oft_proprioception(LLAMA2.width, 8), file=proprio
        ),
        "dataset_statistics.json": base.config["norm_stats"],
    }
    return Folder(base.path, base.config, base.tensors, virtual), ReadOptions({"num_actions_chunk": 8}, images=2)


def _pi0(name: str) -> tuple[Folder, ReadOptions]:
    """lerobot/pi0_base and lerobot/pi05_base."""
    adaptive = name == "pi05"
    tensors = shapes.pi0(SIGLIP, GEMMA_2B, GEMMA_300M, PALIGEMMA_VOCABULARY, 32, 32, adaptive)
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    config = {
        **_features(cameras, (224, 224), state=32, action=32),
        "type": name,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "chunk_size": 50,
        "n_action_steps": 50,
        "max_state_dim": 32,
        "max_action_dim": 32,
        "num_inference_steps": 10,
        "min_period": 4e-3,
        "max_period": 4.0,
        "image_resolution": [_pixels(SIGLIP)] * 2,
        "empty_cameras": 0,
        "tokenizer_max_length": 200 if adaptive else 48,
        "normalization_mapping": _modes("IDENTITY", "QUANTILES" if adaptive else "MEAN_STD"),
    }
    steps = ["pi05_prepare_state_tokenizer_processor_step" if adaptive else "pi0_new_line_processor"]
    return _lerobot(name, config, tensors, steps)


def _smolvla(name: str) -> tuple[Folder, ReadOptions]:
    """lerobot/smolvla_base."""
    tensors = shapes.smolvla(SMOLVLM_VISION, 4, SMOLLM2, SMOLVLA_EXPERT, 2, SMOLVLM_VOCABULARY, 32, 32)
    config = {
        **_features(("camera1", "camera2", "camera3"), (256, 256), state=6, action=6),
        "type": "smolvla",
        "vlm_model_name": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        "chunk_size": 50,
        "n_action_steps": 50,
        "max_state_dim": 32,
        "max_action_dim": 32,
        "resize_imgs_with_padding": [_pixels(SMOLVLM_VISION)] * 2,
        "empty_cameras": 0,
        "tokenizer_max_length": 48,
        "num_steps": 10,
        "attention_mode": "cross_attn",
        "prefix_length": 0,
        "pad_language_to": "max_length",
        "num_expert_layers": 0,
        "num_vlm_layers": SMOLLM2.depth,
        "self_attn_every_n_layers": 2,
        "expert_width_multiplier": 0.75,
        "min_period": 4e-3,
        "max_period": 4.0,
        "add_image_special_tokens": False,
        "adapt_to_pi_aloha": False,
        "normalization_mapping": _modes("IDENTITY", "MEAN_STD"),
    }
    return _lerobot(name, config, tensors, ["smolvla_new_line_processor"])


def _act(name: str) -> tuple[Folder, ReadOptions]:
    """lerobot's defaults of ACT, with ALOHA's one camera and two arms in simulation."""
    tensors = shapes.act(64, 512, 3200, (4, 1, 4), latent=32, chunk=100, state=14, action=14)
    config = {
        **_features(("top",), (480, 640), state=14, action=14),
        "type": "act",
        "chunk_size": 100,
        "n_action_steps": 100,
        "vision_backbone": "resnet18",
        "replace_final_stride_with_dilation": False,
        "pre_norm": False,
        "dim_model": 512,
        "n_heads": 8,
        "dim_feedforward": 3200,
        "feedforward_activation": "relu",
        "n_encoder_layers": 4,
        "n_decoder_layers": 1,
        "use_vae": True,
        "latent_dim": 32,
        "n_vae_encoder_layers": 4,
        "normalization_mapping": _modes("MEAN_STD", "MEAN_STD"),
    }
    return _lerobot(name, config, tensors, [])


GEOMETRIES: dict[str, Callable[[str], tuple[Folder, ReadOptions]]] = {
    "openvla-7b": _openvla,
    "openvla-oft-7b": _openvla_oft,
    "pi0": _pi0,
    "pi05": _pi0,
    "smolvla-450m": _smolvla,
    "act": _act,
}


def _pixels(vision: Vision) -> int:
    """Height and width of the square pictures."""
    return isqrt(vision.tokens) * vision.patch


def _text_config(llama: Language) -> dict[str, Any]:
    """As saved by transformers 4.40.1: only what differs from LlamaConfig's defaults, which are Llama 2 7B."""
    dimensions = {
        "hidden_size": llama.width,
        "intermediate_size": llama.mlp,
        "num_hidden_layers": llama.depth,
        "num_attention_heads": llama.heads,
        "num_key_value_heads": llama.kv_heads,
        "head_dim": llama.head_dim,
    }
    kept = {"model_type": "llama", "vocab_size": PATCHED_LLAMA_VOCABULARY, "pad_token_id": 32000}
    return kept | (dimensions if llama != LLAMA_DEFAULTS else {})


def _bound_statistics(dim: int, gripper: bool = False) -> dict[str, list[Any]]:
    low, high = [-1.0] * dim, [1.0] * dim
    mask = [True] * (dim - gripper) + [False] * gripper
    return {"q01": low, "q99": high, "min": low, "max": high, "mask": mask}


def _features(cameras: tuple[str, ...], size: tuple[int, int], state: int, action: int) -> dict[str, Any]:
    visual = {f"observation.images.{camera}": {"type": "VISUAL", "shape": [3, *size]} for camera in cameras}
    return {
        "input_features": visual | {"observation.state": {"type": "STATE", "shape": [state]}},
        "output_features": {"action": {"type": "ACTION", "shape": [action]}},
    }


def _modes(pictures: str, numbers: str) -> dict[str, str]:
    return {"VISUAL": pictures, "STATE": numbers, "ACTION": numbers}


def _lerobot(
    name: str, config: dict[str, Any], tensors: shapes.Shapes, prompt: list[str]
) -> tuple[Folder, ReadOptions]:
    """A folder with lerobot's processors; ``prompt``: the steps before the tokenizer (none: no language)."""
    features, file = config["input_features"] | config["output_features"], "normalizer_processor.safetensors"
    norm = {"eps": 1e-8, "features": features, "norm_map": config["normalization_mapping"]}
    tokens = {"max_length": config.get("tokenizer_max_length"), "padding": "max_length", "truncation": True}
    normalizer = {"registry_name": "normalizer_processor", "config": norm, "state_file": file}
    language = [{"registry_name": step, "config": {}} for step in prompt]
    language += [{"registry_name": "tokenizer_processor", "config": tokens}] * bool(prompt)
    virtual = {
        file: _statistics(features),
        "policy_preprocessor.json": {"steps": [normalizer, *language]},
        "policy_postprocessor.json": {"steps": [normalizer | {"registry_name": "unnormalizer_processor"}]},
    }
    return Folder(Path(name), config, models_tensors.tensors_from_shapes(name, tensors), virtual), ReadOptions()


def _statistics(features: dict[str, Any]) -> Tensors:
    """Statistics with data, because they become part of the policy's description."""
    values = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "q01": -1.0, "q99": 1.0}
    stored = {
        f"{name}.{statistic}": torch.full((feature["shape"][0],), value)
        for name, feature in features.items()
        for statistic, value in values.items()
    }
    return Tensors("statistics", stored)


def write_geometries() -> None:
    """Writes rlrc/geometries.json: a line for every geometry."""
    lines = (f"{json.dumps(name)}: {json.dumps(describe_geometry(name))}" for name in GEOMETRIES)
    geometries.FILE.write_text('{"geometries": {\n' + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    write_geometries()
