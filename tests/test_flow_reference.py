"""pi0, pi0.5 and SmolVLA of random geometries, written as official folders, against lerobot's formulas written out.

The reference reads the official tensors by their names and computes one observation at a time in float64, with all that
rlrc leaves out: padded prompts, tokens of absent cameras, a whole prefix.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from rlrc.compressor.checkpoints import shapes
from rlrc.compressor.checkpoints.folder import ReadOptions, open_folder
from rlrc.compressor.checkpoints.reader import read
from rlrc.compressor.checkpoints.shapes import Language, Vision
from rlrc.compressor.models.policy import Inputs
from rlrc.runtime.inference.pictures import to_pixels

Array = np.ndarray
PAD = 7  # tokens of padding that the reference reads


@dataclass(frozen=True)
class Case:
    """A geometry: ``heads`` of the vision encoder, ``grid`` x ``grid`` patches, ``absent`` cameras without pictures."""

    family: str
    decoder: Language
    expert: Language
    grid: int = 4
    patch: int = 6
    heads: int = 2
    merge: int = 1
    vocabulary: int = 50
    cameras: tuple[str, ...] = ("top",)
    absent: tuple[str, ...] = ()
    state: int = 5
    action: int = 4
    width: int = 9  # of padded states and actions
    horizon: int = 5
    steps: int = 3
    every: int = 2
    mode: str = "cross_attn"

    @property
    def vision(self) -> Vision:
        return Vision(8 * self.heads, 2, 20, self.patch, self.grid**2)

    def shapes(self) -> shapes.Shapes:
        if self.family == "smolvla":
            every = self.every if "cross" in self.mode else 1
            return shapes.smolvla(
                self.vision, self.merge, self.decoder, self.expert, every, self.vocabulary, self.width, self.width
            )
        adaptive, sizes = self.family == "pi05", (self.vocabulary, self.width, self.width)
        return shapes.pi0(self.vision, self.decoder, self.expert, *sizes, adaptive, pooled=True)

    def hints(self) -> dict[str, Any]:
        names = ("num_heads", "num_kv_heads", "head_dim")
        if self.family == "smolvla":
            names = ("num_attention_heads", "num_key_value_heads", "head_dim")
        sections = {"text": self.decoder, "vlm": self.decoder, "expert": self.expert}
        heads = {
            section: dict(zip(names, (tower.heads, tower.kv_heads, tower.head_dim), strict=True))
            for section, tower in sections.items()
        }
        return heads | {"vision": {"num_attention_heads": self.heads}}

    def config(self) -> dict[str, Any]:
        seen = {f"observation.images.{name}": {"type": "VISUAL", "shape": [3, 30, 40]} for name in self.cameras}
        size, smol = [self.grid * self.patch] * 2, self.family == "smolvla"
        return {
            "type": self.family,
            "input_features": seen | {"observation.state": {"type": "STATE", "shape": [self.state]}},
            "output_features": {"action": {"type": "ACTION", "shape": [self.action]}},
            "normalization_mapping": dict.fromkeys(("VISUAL", "STATE", "ACTION"), "IDENTITY"),
            **({} if smol else {"use_relative_actions": False}),
            "chunk_size": self.horizon,
            "max_state_dim": self.width,
            "max_action_dim": self.width,
            "min_period": 4e-3,
            "max_period": 4.0,
            **({"num_steps": self.steps} if smol else {"num_inference_steps": self.steps}),
            **({"resize_imgs_with_padding": size} if smol else {"image_resolution": size}),
            **({"vlm_model_name": "somebody/own-vlm", "attention_mode": self.mode} if smol else {}),
            **({"num_vlm_layers": self.decoder.depth, "self_attn_every_n_layers": self.every} if smol else {}),
            **({"num_expert_layers": self.expert.depth} if smol else {}),
        }

    def write(self, path: Path) -> Path:
        random = np.random.default_rng(3)
        tensors = {}
        for name, shape in self.shapes().items():
            values = random.standard_normal(shape)
            if name.endswith("norm.weight") or "norm1.weight" in name or "norm2.weight" in name:
                values = values * 0.2 + ("vision" in name or self.family == "smolvla")
            elif "embed" not in name and len(shape) > 1:
                values = values / math.sqrt(math.prod(shape[1:]))
            tensors[name] = (values if len(shape) > 1 else values * 0.3).astype(np.float32)
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
        prompt = {"pi0": "pi0_new_line_processor", "pi05": "pi05_prepare_state_tokenizer_processor_step"}
        names = (prompt.get(self.family, "smolvla_new_line_processor"), "tokenizer_processor")
        files = {
            "config.json": self.config(),
            "policy_preprocessor.json": {"steps": [{"registry_name": name, "config": {}} for name in names]},
            "policy_postprocessor.json": {"steps": []},
        }
        for name, content in files.items():
            (path / name).write_text(json.dumps(content))
        return path


class Reference:
    def __init__(self, path: Path, case: Case) -> None:
        weights = load_file(path / "model.safetensors")
        self.w = {name.removeprefix("model."): value.astype(np.float64) for name, value in weights.items()}
        self.case, self.smol = case, case.family == "smolvla"
        base = "vlm_with_expert.vlm.model." if self.smol else "paligemma_with_expert.paligemma.model."
        self.V = base + ("vision_model" if self.smol else "vision_tower.vision_model")
        self.projector = base + ("connector.modality_projection.proj" if self.smol else "multi_modal_projector.linear")
        self.P = base + ("text_model" if self.smol else "language_model")
        self.E = "vlm_with_expert.lm_expert" if self.smol else "paligemma_with_expert.gemma_expert.model"
        self.eps = 1e-5 if self.smol else 1e-6

    def linear(self, x: Array, name: str) -> Array:
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def layer_norm(self, x: Array, name: str) -> Array:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def rms_norm(self, x: Array, name: str, condition: Array | None = None) -> tuple[Array, Array | float]:
        """Also the gate of the branch that follows."""
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps)
        if f"{name}.dense.weight" in self.w:
            scale, shift, gate = np.split(self.linear(condition, f"{name}.dense"), 3)
            return x * (1 + scale) + shift, gate
        return x * (self.w[f"{name}.weight"] + (not self.smol)), 1.0

    def vision(self, picture: Array) -> Array:
        case, p = self.case, self.case.patch
        kernel = self.w[f"{self.V}.embeddings.patch_embedding.weight"]
        x = np.empty((case.grid**2, case.vision.width))
        for row in range(case.grid):
            for column in range(case.grid):
                patch = picture[row * p : (row + 1) * p, column * p : (column + 1) * p]
                x[row * case.grid + column] = np.einsum("ocij,ijc->o", kernel, patch)
        x += self.w[f"{self.V}.embeddings.patch_embedding.bias"]
        x += self.w[f"{self.V}.embeddings.position_embedding.weight"]
        everything = np.ones((len(x), len(x)), bool)
        for i in range(case.vision.depth):
            block = f"{self.V}.encoder.layers.{i}"
            y = self.layer_norm(x, f"{block}.layer_norm1")
            q, k, v = (self.linear(y, f"{block}.self_attn.{n}_proj").reshape(len(x), case.heads, -1) for n in "qkv")
            x = x + self.linear(attend(q, k, v, everything), f"{block}.self_attn.out_proj")
            y = gelu(self.linear(self.layer_norm(x, f"{block}.layer_norm2"), f"{block}.mlp.fc1"))
            x = x + self.linear(y, f"{block}.mlp.fc2")
        grid = self.layer_norm(x, f"{self.V}.post_layernorm").reshape(case.grid, case.grid, -1)
        m = case.merge
        joined = [
            np.concatenate([grid[row + i, column + j] for i in range(m) for j in range(m)])
            for row in range(0, case.grid, m)
            for column in range(0, case.grid, m)
        ]
        return self.linear(np.array(joined), self.projector)

    def block(self, x: Array, name: str, tower: Language, condition: Array | None, attention: Callable) -> Array:
        y, gate = self.rms_norm(x, f"{name}.input_layernorm", condition)
        x = x + gate * self.linear(attention(y, f"{name}.self_attn"), f"{name}.self_attn.o_proj")
        y, gate = self.rms_norm(x, f"{name}.post_attention_layernorm", condition)
        opened = (silu if self.smol else gelu)(self.linear(y, f"{name}.mlp.gate_proj"))
        return x + gate * self.linear(opened * self.linear(y, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")

    def heads(self, y: Array, name: str, which: str, tower: Language) -> Array:
        return self.linear(y, f"{name}.{which}_proj").reshape(len(y), -1, tower.head_dim)

    def prefix(self, images: list[tuple[Array, bool]], ids: Array, real: Array, state: Array | None) -> None:
        tower = self.case.decoder
        tokens = [
            (self.vision(picture) * (math.sqrt(tower.width) if self.smol else 1), there) for picture, there in images
        ]
        words = self.w[f"{self.P}.embed_tokens.weight"][ids] * math.sqrt(tower.width)
        x, pad = [t for t, _ in tokens] + [words], [np.full(len(t), there) for t, there in tokens] + [real]
        if self.smol:
            x, pad = [*x, self.linear(state, "state_proj")[None]], [*pad, np.ones(1, bool)]
        block = np.zeros(sum(map(len, x)), int)
        block[-1] = self.smol
        sequence, self.pad = np.concatenate(x), np.concatenate(pad)
        allowed = (block[None] <= block[:, None]) & self.pad[None] & self.pad[:, None]
        positions, self.cache = np.cumsum(self.pad) - 1, []
        for i in range(tower.depth):

            def attention(y: Array, name: str) -> Array:
                q, k, v = (self.heads(y, name, which, tower) for which in "qkv")
                k = rope(k, positions)
                self.cache.append((k, v))
                return attend(rope(q, positions), k, v, allowed)

            sequence = self.block(sequence, f"{self.P}.layers.{i}", tower, None, attention)

    def velocity(self, x: Array, t: float, state: Array) -> Array:
        tower, case = self.case.expert, self.case
        period = 4e-3 * (4.0 / 4e-3) ** np.linspace(0, 1, tower.width // 2)
        time = np.concatenate([np.sin(2 * math.pi * t / period), np.cos(2 * math.pi * t / period)])
        actions, condition = self.linear(x, "action_in_proj"), None
        if case.family == "pi05":
            condition = silu(self.linear(silu(self.linear(time, "time_mlp_in")), "time_mlp_out"))
        else:
            both = np.concatenate([actions, np.tile(time, (len(x), 1))], 1)
            actions = self.linear(silu(self.linear(both, "action_time_mlp_in")), "action_time_mlp_out")
        block = {"pi0": [0, *[1] * len(x)], "pi05": [0] * len(x), "smolvla": range(len(x))}[case.family]
        if case.family == "pi0":
            actions = np.concatenate([self.linear(state, "state_proj")[None], actions])
        own = np.array(block)[None] <= np.array(block)[:, None]
        seen = np.tile(self.pad, (len(actions), 1))
        positions, hidden = self.pad.sum() + np.arange(len(actions)), actions
        for i in range(tower.depth):
            past = self.cache[i * (case.decoder.depth // tower.depth)]
            cross = self.smol and "cross" in case.mode and not (case.every > 0 and i % case.every == 0)

            def attention(y: Array, name: str, past: tuple[Array, Array] = past, cross: bool = cross) -> Array:
                q = self.heads(y, name, "q", tower)
                if cross:
                    k, v = (self.heads(p.reshape(len(p), -1), name, w, tower) for p, w in zip(past, "kv", strict=True))
                    return attend(rope(q, np.arange(len(q))), k, v, seen)
                k, v = rope(self.heads(y, name, "k", tower), positions), self.heads(y, name, "v", tower)
                k, v = np.concatenate([past[0], k]), np.concatenate([past[1], v])
                return attend(rope(q, positions), k, v, np.concatenate([seen, own], 1))

            hidden = self.block(hidden, f"{self.E}.layers.{i}", tower, condition, attention)
        return self.linear(self.rms_norm(hidden, f"{self.E}.norm", condition)[0][-len(x) :], "action_out_proj")

    def act(self, images: list[tuple[Array, bool]], ids: Array, real: Array, state: Array, noise: Array) -> Array:
        self.prefix(images, ids, real, state)
        x = noise
        for i in range(self.case.steps):
            x = x - self.velocity(x, 1 - i / self.case.steps, state) / self.case.steps
        return x[:, : self.case.action]


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def rope(x: Array, positions: Array) -> Array:
    """x (L, heads, D): pairs (i, i + D / 2) turned by position * 10000^(-2i / D)."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] * 10_000.0 ** (-np.arange(half) * 2 / x.shape[-1])
    first, second = x[..., :half], x[..., half:]
    turned = first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)
    return np.concatenate(turned, -1)


def attend(q: Array, k: Array, v: Array, allowed: Array) -> Array:
    """(L, heads, D), (S, kv heads, D), allowed (L, S) -> (L, heads * D)."""
    out = np.empty_like(q)
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // k.shape[1])
        scores = np.where(allowed, q[:, head] @ k[:, shared].T / math.sqrt(q.shape[-1]), -1e30)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, shared]
    return out.reshape(len(q), -1)


PI0 = Case("pi0", Language(24, 3, 4, 1, 8, 40), Language(16, 3, 4, 1, 8, 24))
SMOL = Case("smolvla", Language(24, 4, 3, 1, 8, 40), Language(18, 4, 3, 1, 8, 24), merge=2)
TWO, THREE = ("top", "wrist"), ("left", "top", "wrist")
CASES = {
    "pi0": PI0,
    "pi0-20-steps-chunk-1": replace(PI0, steps=20, horizon=1),
    "pi0-three-cameras-two-kv": replace(
        PI0, cameras=THREE, decoder=Language(20, 2, 6, 2, 6, 16), expert=Language(12, 2, 4, 2, 6, 20), steps=2
    ),
    "pi0-absent-first": replace(PI0, cameras=THREE, absent=("left",)),
    "pi0-one-block": replace(PI0, decoder=Language(24, 1, 4, 4, 8, 40), expert=Language(16, 1, 4, 4, 8, 24)),
    "pi05": replace(PI0, family="pi05"),
    "pi05-two-cameras": replace(PI0, family="pi05", cameras=TWO, heads=3, horizon=8, steps=4),
    "pi05-absent": replace(PI0, family="pi05", cameras=("top", "empty_camera_0"), absent=("empty_camera_0",)),
    "smolvla": SMOL,
    "smolvla-every-third": replace(SMOL, every=3, cameras=TWO, horizon=7),
    "smolvla-all-cross": replace(SMOL, every=0, grid=6, merge=3),
    "smolvla-no-cross": replace(SMOL, mode="self_attn"),
    "smolvla-absent": replace(SMOL, cameras=THREE, absent=("top",)),
    "smolvla-half-the-expert": replace(
        SMOL, decoder=Language(24, 6, 6, 3, 8, 40), expert=Language(18, 3, 6, 3, 8, 24), every=6
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_actions_of_any_geometry(case: Case, tmp_path: Path) -> None:
    """Three rows with prompts of different lengths in one batch: measured at most 4.6e-6."""
    path = case.write(tmp_path / "folder")
    policy, layout = read(open_folder(path), ReadOptions(hints=case.hints()))
    assert len(set(layout.unused)) == len(layout.unused) > 0
    reference, random = Reference(path, case), np.random.default_rng(5)

    rows, lengths = 3, (4, 1, 6)
    there = [camera for camera in policy.spec.cameras if camera.name not in case.absent]
    raw = random.integers(0, 256, (len(there), rows, 30, 40, 3), np.uint8)
    pixels = [to_pixels(picture, camera) for picture, camera in zip(raw, there, strict=True)]
    ids = random.integers(0, case.vocabulary, (rows, PAD))
    mask = np.arange(PAD) < np.array(lengths)[:, None]
    state = np.zeros((rows, case.width), np.float32)
    state[:, : case.state] = random.standard_normal((rows, case.state))
    noise = random.standard_normal((rows, case.horizon, case.width)).astype(np.float32)

    def torch_inputs(rows: slice, length: int, padded: bool) -> Inputs:
        return Inputs(
            [torch.from_numpy(picture[rows]) for picture in pixels],
            torch.from_numpy(ids[rows, :length]),
            None if case.family == "pi05" else torch.from_numpy(state[rows]),
            torch.from_numpy(mask[rows, :length]) if padded else None,
            torch.from_numpy(noise[rows]),
        )

    with torch.no_grad():
        together = policy.act(torch_inputs(slice(None), PAD, padded=True)).actions
    assert together.shape == (rows, case.horizon, case.action)
    for row, length in enumerate(lengths):
        images = [(picture[row].astype(np.float64), True) for picture in pixels]
        images += [(np.full_like(images[0][0], -1), False)] * len(case.absent)
        expected = reference.act(images, ids[row], mask[row], state[row].astype(np.float64), noise[row])
        assert np.abs(together[row].numpy() - expected).max() < 1e-5
        with torch.no_grad():
            alone = policy.act(torch_inputs(slice(row, row + 1), length, padded=False)).actions[0]
        assert (alone - together[row]).abs().max() < 1e-5
