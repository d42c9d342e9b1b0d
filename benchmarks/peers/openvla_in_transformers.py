"""OpenVLA assembled from modules of transformers, with the weights of a dense artifact that has one vision tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel, SiglipVisionConfig, SiglipVisionModel

from rlrc import artifact as artifacts
from rlrc.artifact import Manifest, weight_files
from rlrc.runtime.inference import decode, preprocess

BLOCK = {
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj", "attention.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip
VISION = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attention.out": "self_attn.out_proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}


class TransformersOpenVLA:
    """``encode_image`` and ``step`` are the passes that torch.compile may replace."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        artifact = artifacts.load(folder, verify=())
        manifest, self.spec = artifact.manifest, artifact.manifest.policy
        state = {}
        for file in weight_files(manifest):
            state |= load_file(artifact.file(file))
        assert self.spec.prompt is not None
        self.tokenizer = preprocess.Tokenizer(artifact.file("tokenizer/tokenizer.json"), self.spec.prompt)
        self.dtype = dtype
        self.vision = _vision(manifest, state).to(dtype).eval()  # type: ignore[arg-type]
        self.projector = _projector(state).to(dtype).eval()
        self.language = _language(manifest, state).to(dtype).eval()  # type: ignore[arg-type]
        self.head = state["head.weight"].to(dtype)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(1, 3, H, W) -> (1, N, width of the language model). The final norm of the vision tower is not applied."""
        tower = getattr(self.vision, "vision_model", self.vision)
        return self.projector(tower.encoder(inputs_embeds=tower.embeddings(pixels)).last_hidden_state)

    def step(self, x: Tensor, cache: Any) -> Tensor:
        """Logits (rows,) after the vectors (1, L, width)."""
        hidden = self.language(inputs_embeds=x, past_key_values=cache, use_cache=True).last_hidden_state
        return (hidden[0, -1] @ self.head.T).float()

    def infer(self, observation: dict[str, Any]) -> np.ndarray:
        prepared = preprocess.prepare(observation, self.spec, self.tokenizer)
        assert prepared.ids is not None
        pixels = torch.from_numpy(prepared.pixels[0]).permute(2, 0, 1)[None].to(self.dtype)
        patches, words = self.encode_image(pixels), self.language.embed_tokens(torch.from_numpy(prepared.ids)[None])
        x, cache = torch.cat([words[:, :1], patches, words[:, 1:]], 1), DynamicCache()
        action, tokens = self.spec.action, list[int]()
        assert action.tokens is not None
        while len(tokens) < action.horizon * action.dim:
            tokens.append(int(self.step(x, cache).argmax()) + action.tokens.offset)
            x = self.language.embed_tokens(torch.tensor([[tokens[-1]]]))
        return decode.tokens_to_actions(np.array(tokens).reshape(action.horizon, action.dim), action)


def _vision(manifest: Manifest, state: dict[str, Tensor]) -> SiglipVisionModel:
    tower, geometry = manifest.towers["vision"], manifest.policy.geometry
    layer, patch = tower.layers[0], int(geometry["patch"])
    config = SiglipVisionConfig(
        hidden_size=tower.width, intermediate_size=layer.mlp, num_hidden_layers=len(tower.layers),
        num_attention_heads=layer.heads, image_size=manifest.policy.cameras[0].height, patch_size=patch,
        hidden_act="gelu", layer_norm_eps=tower.eps, vision_use_head=False,
    )  # fmt: skip
    model = SiglipVisionModel(config)
    stem = state["vision.stem.steps.0.weight"].unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2)
    weights = {
        "embeddings.patch_embedding.weight": stem,
        "embeddings.patch_embedding.bias": state["vision.stem.steps.0.bias"],
        "embeddings.position_embedding.weight": state["vision.position"],
    }
    for i in range(len(tower.layers)):
        for kind in ("weight", "bias"):
            source, target = f"vision.layers.{i}.", f"encoder.layers.{i}."
            weights |= {f"{target}{b}.{kind}": state[f"{source}{a}.{kind}"] for a, b in VISION.items()}
            parts = state[f"{source}attention.qkv.{kind}"].chunk(3)
            weights |= {f"{target}self_attn.{n}_proj.{kind}": part for n, part in zip("qkv", parts, strict=True)}
    _load(getattr(model, "vision_model", model), weights, unread=("post_layernorm", "position_ids"))
    return model


def _language(manifest: Manifest, state: dict[str, Tensor]) -> LlamaModel:
    tower = manifest.towers["decoder"]
    layer = tower.layers[0]
    config = LlamaConfig(
        hidden_size=tower.width, intermediate_size=layer.mlp, num_hidden_layers=len(tower.layers),
        num_attention_heads=layer.heads, num_key_value_heads=layer.kv_heads, head_dim=layer.head_dim,
        vocab_size=len(state["embedding.weight"]), rms_norm_eps=tower.eps, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": tower.theta},
    )  # fmt: skip
    model = LlamaModel(config)
    weights = {"embed_tokens.weight": state["embedding.weight"], "norm.weight": state["decoder.norm.weight"]}
    for i in range(len(tower.layers)):
        weights |= {f"layers.{i}.{b}.weight": state[f"decoder.layers.{i}.{a}.weight"] for a, b in BLOCK.items()}
    _load(model, weights)
    return model


def _projector(state: dict[str, Tensor]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for name in sorted(name for name in state if name.startswith("projector.") and name.endswith("weight")):
        outputs, inputs = state[name].shape
        linear = nn.Linear(inputs, outputs)
        linear.load_state_dict({"weight": state[name], "bias": state[name.replace("weight", "bias")]})
        layers += [nn.GELU(), linear] if layers else [linear]
    return nn.Sequential(*layers)


def _load(module: nn.Module, weights: dict[str, Tensor], unread: tuple[str, ...] = ()) -> None:
    """Load the weights. Raises RuntimeError if names differ, except for ``unread`` tensors of the module."""
    missing, unexpected = module.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)
    missing = [name for name in missing if not any(part in name for part in unread)]
    if missing or unexpected:
        raise RuntimeError(f"expected matching weights, found {missing[:3]} missing and {unexpected[:3]} left over")
