"""The family "act" against lerobot's own numbers, and on other geometries against torch's own transformer layers."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlrc import artifact as artifacts
from rlrc.artifact import Manifest
from rlrc.compressor.checkpoints import shapes
from rlrc.compressor.checkpoints.folder import open_folder
from rlrc.compressor.checkpoints.layout import Layout
from rlrc.compressor.checkpoints.reader import read
from rlrc.compressor.checkpoints.write_back import write_checkpoint
from rlrc.compressor.models.families import build
from rlrc.compressor.models.policy import Inputs, PolicyModule
from rlrc.compressor.prune.importance import score_parts as scores_of
from rlrc.compressor.prune.lossless import cut_lossless
from rlrc.compressor.prune.prune import PruneConfig, prune
from rlrc.errors import UserError
from rlrc.runtime.inference.pictures import to_pixels
from rlrc.runtime.inference.preprocess import normalise, unnormalise

GOLDEN = Path(__file__).parent / "data" / "act"
CHECKPOINT = GOLDEN / "checkpoint"


@pytest.fixture(scope="module")
def opened() -> tuple[PolicyModule, Layout]:
    return read(open_folder(CHECKPOINT))


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "golden.npz") as arrays:
        return dict(arrays)


def inputs(policy: PolicyModule, golden: dict[str, np.ndarray]) -> Inputs:
    spec = policy.spec
    assert spec.state is not None
    shots = np.stack([golden[f"obs{i}.image.top"] for i in range(2)])
    state = normalise(np.stack([golden[f"obs{i}.state"] for i in range(2)]), spec.state.norm)
    return Inputs([torch.from_numpy(to_pixels(shots, spec.cameras[0]))], state=torch.from_numpy(state))


def test_golden_every_array(opened: tuple[PolicyModule, Layout], golden: dict[str, np.ndarray]) -> None:
    """Against lerobot 0.6.1, which computed in float32 from the same weights.

    Measured: feature maps equal, encoder 9.5e-7, actions 7.2e-7. Feature maps reach 13, where lerobot's own are 9.1e-6
    from float64: another CPU's convolutions may round as differently, so 2e-5 for them.
    """
    policy, _ = opened
    observed = inputs(policy, golden)
    with torch.no_grad():
        found = {
            "state_normalized": observed.state,
            "feature_map.top": policy.vision(observed.pixels[0]).permute(0, 3, 1, 2),
            "encoder_out": policy.encode(policy.encode_image(observed.pixels[0]), observed.state),
            "actions_normalized": policy.act(observed).actions,
        }
    found["actions"] = torch.from_numpy(unnormalise(found["actions_normalized"].numpy(), policy.spec.action.norm))
    for name, tensor in found.items():
        assert tensor.shape == golden[name].shape
        error = np.abs(tensor.numpy() - golden[name]).max()
        assert error < (2e-5 if name == "feature_map.top" else 1e-5), name


def test_what_the_folder_says(opened: tuple[PolicyModule, Layout]) -> None:
    policy, layout = opened
    spec = policy.spec
    assert (spec.family, spec.decode, spec.prompt) == ("act", "parallel", None)
    (camera,) = spec.cameras
    assert (camera.name, camera.height, camera.width, camera.resize) == ("top", 96, 128, "none")
    assert (spec.action.horizon, spec.action.dim, spec.action.bins) == (8, 6, 0)
    # Of 174 tensors, the VAE's encoder (12 of its block and 8 around it) and the latent's projection.
    unused = set(layout.unused)
    assert len(unused) == 21
    assert "model.encoder_latent_input_proj.weight" in unused
    assert all("vae" in name for name in unused - {"model.encoder_latent_input_proj.weight"})
    used = {name for origin in layout.origins.values() for name in origin.names}
    assert used | unused == set(load_file(CHECKPOINT / "model.safetensors"))


def test_a_manifest_alone_rebuilds_the_policy(
    opened: tuple[PolicyModule, Layout], golden: dict[str, np.ndarray]
) -> None:
    policy, _ = opened
    manifest = artifacts.from_json(
        json.loads(json.dumps(artifacts.to_json(Manifest(policy.spec, policy.towers, 1, "float32"))))
    )
    again = build(manifest.policy, manifest.towers).eval()
    again.load_state_dict(policy.state_dict())
    with torch.no_grad():
        assert torch.equal(again.act(inputs(policy, golden)).actions, policy.act(inputs(policy, golden)).actions)


@pytest.mark.parametrize(("tower", "keep"), [("encoder", 0), ("decoder", 0)])
def test_pruned_equals_masked(
    opened: tuple[PolicyModule, Layout], golden: dict[str, np.ndarray], tower: str, keep: int
) -> None:
    policy, _ = opened
    config = PruneConfig(0.5, "magnitude", tower, keep)  # type: ignore[arg-type]
    scores = scores_of(policy, tower, range(len(policy.towers[tower].layers)), config)
    pruned = prune(policy, config)[0].build()
    assert {layer.heads for layer in pruned.towers[tower].layers} == {2}

    masked = build(policy.spec, policy.towers).eval()
    masked.load_state_dict(policy.state_dict())
    for i, (score, layer) in enumerate(zip(scores, pruned.towers[tower].layers, strict=True)):
        block = masked.get_submodule(f"{tower}.layers.{i}")
        for head in score.heads.argsort()[: 4 - layer.heads].tolist():  # 4 heads of 8 numbers
            block.attention.o.weight.data[:, 8 * head : 8 * head + 8] = 0
        if layer.mlp:
            assert layer.mlp == 32
            cut = score.channels.argsort()[:32]
            block.mlp.down.weight.data[:, cut] = 0
    with torch.no_grad():
        observed = inputs(policy, golden)
        found, expected = pruned.act(observed).actions, masked.act(observed).actions
        assert (expected - policy.act(observed).actions).abs().max() > 1e-2
    assert (found - expected).abs().max() < 1e-5


def test_written_back_as_it_was(opened: tuple[PolicyModule, Layout], tmp_path: Path) -> None:
    policy, _ = opened
    write_checkpoint(policy, open_folder(CHECKPOINT), tmp_path / "same")
    for file in CHECKPOINT.iterdir():
        assert (tmp_path / "same" / file.name).read_bytes() == file.read_bytes()

    other = build(policy.spec, policy.towers).eval()
    other.load_state_dict({name: tensor * 2 for name, tensor in policy.state_dict().items()})
    write_checkpoint(other, open_folder(CHECKPOINT), tmp_path / "other")
    before, after = (load_file(folder / "model.safetensors") for folder in (CHECKPOINT, tmp_path / "other"))
    for name, tensor in before.items():
        unused = "vae" in name or name == "model.encoder_latent_input_proj.weight"
        assert torch.equal(after[name], tensor if unused else tensor * 2), name


def test_shapes_are_the_official_ones() -> None:
    found = shapes.act(base=8, width=32, mlp=64, depths=(2, 1, 1), latent=8, chunk=8, state=6, action=6)
    assert found == {name: tuple(tensor.shape) for name, tensor in load_file(CHECKPOINT / "model.safetensors").items()}


REFUSED = {
    "glu": ({"feedforward_activation": "glu"}, "expected relu or gelu"),
    "heads": ({"n_heads": 5}, "dim_model that 4 and n_heads divide"),
    "too many blocks": ({"n_encoder_layers": 3}, r"model\.encoder\.layers\.2"),
    "too few blocks": ({"n_encoder_layers": 1}, r"12 tensors more .*model\.encoder\.layers\.1"),
    "decoder blocks": ({"n_decoder_layers": 2}, r"model\.decoder\.layers\.1"),
    "width": ({"dim_model": 16}, r"expected \(16,\) .*, found \(32,\)"),
    "mlp": ({"dim_feedforward": 65}, r"expected \(65, 32\) .*model\.encoder\.layers\.0\.linear1\.weight"),
    "chunk": ({"chunk_size": 9}, r"model\.decoder_pos_embed\.weight"),
    "trunk": ({"vision_backbone": "resnet34"}, "expected the weights of a resnet34"),
    "unknown trunk": ({"vision_backbone": "vgg16"}, "expected one of resnet18"),
    "dilated basic blocks": ({"replace_final_stride_with_dilation": True}, "bottleneck blocks only"),
    "no pre_norm in the weights": ({"pre_norm": True}, r"model\.encoder\.norm\.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_a_config_that_contradicts_the_weights(name: str, tmp_path: Path) -> None:
    changes, message = REFUSED[name]
    folder = shutil.copytree(CHECKPOINT, tmp_path / "act")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=message) as caught:
        read(open_folder(folder))
    assert "\n" not in str(caught.value)


def test_a_folder_of_lerobot_before_processors(
    opened: tuple[PolicyModule, Layout], golden: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Statistics as buffers among the weights, under the names that lerobot 0.3 gave them."""
    folder = shutil.copytree(CHECKPOINT, tmp_path / "act", ignore=shutil.ignore_patterns("policy_*"))
    tensors = load_file(folder / "model.safetensors")
    stats = load_file(CHECKPOINT / "policy_preprocessor_step_3_normalizer_processor.safetensors")
    for name, tensor in stats.items():
        feature, _, statistic = name.rpartition(".")
        owners = ("normalize_targets", "unnormalize_outputs") if feature == "action" else ("normalize_inputs",)
        if statistic in ("mean", "std"):
            for owner in owners:
                tensors[f"{owner}.buffer_{feature.replace('.', '_')}.{statistic}"] = tensor.clone()
    save_file(tensors, folder / "model.safetensors")
    policy, _ = read(open_folder(folder))
    with torch.no_grad():
        actions = policy.act(inputs(policy, golden)).actions.numpy()
    assert np.abs(unnormalise(actions, policy.spec.action.norm) - golden["actions"]).max() < 1e-5


@dataclass(frozen=True)
class Geometry:
    """An ACT configuration to try, in lerobot's words."""

    cameras: dict[str, tuple[int, int]] = field(default_factory=lambda: {"top": (64, 96), "wrist": (64, 96)})
    state: int = 5
    environment: int = 0
    action: int = 4
    chunk_size: int = 7
    dim_model: int = 16
    n_heads: int = 2
    dim_feedforward: int = 24
    n_encoder_layers: int = 3
    n_decoder_layers: int = 2
    pre_norm: bool = False
    feedforward_activation: str = "relu"
    use_vae: bool = False
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False
    replace_final_stride_with_dilation: bool = False
    width: int = 4

    def config(self) -> dict[str, Any]:
        names = ("chunk_size", "dim_model", "n_heads", "dim_feedforward", "n_encoder_layers", "n_decoder_layers")
        more = ("pre_norm", "feedforward_activation", "use_vae", "replace_final_stride_with_dilation")
        features: dict[str, Any] = {
            f"observation.images.{name}": {"type": "VISUAL", "shape": [3, *size]} for name, size in self.cameras.items()
        }
        if self.state:
            features["observation.state"] = {"type": "STATE", "shape": [self.state]}
        if self.environment:
            features["observation.environment_state"] = {"type": "ENV", "shape": [self.environment]}
        return {
            "type": "act",
            "input_features": features,
            "output_features": {"action": {"type": "ACTION", "shape": [self.action]}},
            "normalization_mapping": dict.fromkeys(("VISUAL", "STATE", "ENV", "ACTION"), "MEAN_STD"),
            "vision_backbone": {(False, 2): "resnet18", (False, 3): "resnet34", (True, 3): "resnet50"}[
                self.bottleneck, self.blocks[0]
            ],
            "latent_dim": 6,
            "n_vae_encoder_layers": 1,
            **{name: getattr(self, name) for name in names + more},
        }


GEOMETRIES = {
    "two cameras": Geometry(),
    "one camera, pre_norm, gelu": Geometry(
        cameras={"front": (96, 64)}, pre_norm=True, feedforward_activation="gelu", n_decoder_layers=1
    ),
    "other widths and heads": Geometry(
        dim_model=24, n_heads=6, dim_feedforward=40, n_encoder_layers=1, chunk_size=3, action=7, width=3
    ),
    "odd pixels, environment state": Geometry(cameras={"a": (70, 101)}, environment=3, n_decoder_layers=3),
    "environment state alone, pre_norm": Geometry(state=0, environment=4, pre_norm=True),
    "no state": Geometry(state=0, n_encoder_layers=2),
    "three cameras of two shapes": Geometry(cameras={"a": (64, 128), "b": (128, 64), "c": (64, 128)}),
    "resnet50": Geometry(blocks=(3, 4, 6, 3), bottleneck=True, width=2),
    "resnet50 dilated": Geometry(
        blocks=(3, 4, 6, 3), bottleneck=True, replace_final_stride_with_dilation=True, width=2
    ),
    "resnet34": Geometry(blocks=(3, 4, 6, 3), width=2),
    "VAE": Geometry(use_vae=True, n_heads=1),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_other_geometries_against_torch_layers(name: str, tmp_path: Path) -> None:
    geometry = GEOMETRIES[name]
    stats = write_folder(tmp_path / "act", geometry, seed=len(name))
    policy, _ = read(open_folder(tmp_path / "act"))
    spec, batch = policy.spec, 3
    rng = np.random.default_rng(1)
    shots = {n: rng.integers(0, 256, (batch, *size, 3), np.uint8) for n, size in geometry.cameras.items()}
    felt = rng.normal(1.0, 2.0, (batch, geometry.state + geometry.environment)).astype(np.float32)

    expected = reference(load_file(tmp_path / "act" / "model.safetensors"), geometry, stats, shots, felt)

    assert [camera.name for camera in spec.cameras] == list(geometry.cameras)
    pixels = [torch.from_numpy(to_pixels(shots[camera.name], camera)) for camera in spec.cameras]
    state = None if spec.state is None else torch.from_numpy(normalise(felt, spec.state.norm))
    with torch.no_grad():
        actions = policy.act(Inputs(pixels, state=state)).actions
        lean = cut_lossless(policy)[0].act(Inputs(pixels, state=state)).actions
        single = policy.act(Inputs([p[1:2] for p in pixels], state=None if state is None else state[1:2])).actions
    raw = unnormalise(actions.numpy(), spec.action.norm)
    assert raw.shape == (batch, geometry.chunk_size, geometry.action)
    assert np.ptp(expected, axis=0).max() > 0.01  # the inputs matter
    assert np.abs(raw - expected).max() < 1e-5
    assert (actions[1:2] - single).abs().max() < 1e-5
    assert (actions - lean).abs().max() < 1e-5


class Reference(nn.Module):
    """lerobot's ACT written once more, out of torch's layers, under lerobot's names."""

    def __init__(self, g: Geometry) -> None:
        super().__init__()
        self.g = g
        width, latent = g.dim_model, 6

        def blocks(kind: Any, count: int) -> nn.Module:
            stack = nn.Module()
            stack.layers = nn.ModuleList(kind(width, g.n_heads, g.dim_feedforward) for _ in range(count))
            if kind is nn.TransformerDecoderLayer or g.pre_norm:
                stack.norm = nn.LayerNorm(width)
            return stack

        self.backbone = backbone(g)
        self.encoder = blocks(nn.TransformerEncoderLayer, g.n_encoder_layers)
        self.decoder = blocks(nn.TransformerDecoderLayer, g.n_decoder_layers)
        self.encoder_latent_input_proj = nn.Linear(latent, width)
        if g.state:
            self.encoder_robot_state_input_proj = nn.Linear(g.state, width)
        if g.environment:
            self.encoder_env_state_input_proj = nn.Linear(g.environment, width)
        self.encoder_img_feat_input_proj = nn.Conv2d(g.width * 8 * (4 if g.bottleneck else 1), width, 1)
        self.encoder_1d_feature_pos_embed = nn.Embedding(1 + bool(g.state) + bool(g.environment), width)
        self.decoder_pos_embed = nn.Embedding(g.chunk_size, width)
        self.action_head = nn.Linear(width, g.action)
        if g.use_vae:
            self.vae_encoder = blocks(nn.TransformerEncoderLayer, 1)
            self.vae_encoder_cls_embed = nn.Embedding(1, width)
            self.vae_encoder_latent_output_proj = nn.Linear(width, 2 * latent)

    def attend(self, layer: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return layer(*(x.transpose(0, 1) for x in (q, k, v)))[0].transpose(0, 1)

    def feed(self, layer: Any, x: Tensor) -> Tensor:
        return layer.linear2(getattr(F, self.g.feedforward_activation)(layer.linear1(x)))

    def forward(self, images: list[Tensor], state: Tensor) -> Tensor:
        """Normalised (B, 3, H, W) of every camera, normalised (B, S) -> normalised actions."""
        g, batch = self.g, len(state)
        tokens = [self.encoder_latent_input_proj(torch.zeros(batch, 6))]
        if g.state:
            tokens.append(self.encoder_robot_state_input_proj(state[:, : g.state]))
        if g.environment:
            tokens.append(self.encoder_env_state_input_proj(state[:, g.state :]))
        x, pos = torch.stack(tokens, 1), [self.encoder_1d_feature_pos_embed.weight]
        for image in images:
            features = self.encoder_img_feat_input_proj(self.backbone(image))
            pos.append(sines(features.shape[2], features.shape[3], g.dim_model))
            x = torch.cat([x, features.flatten(2).transpose(1, 2)], 1)
        p = torch.cat(pos)
        for layer in self.encoder.layers:
            if g.pre_norm:
                y = layer.norm1(x)
                x = x + self.attend(layer.self_attn, y + p, y + p, y)
                x = x + self.feed(layer, layer.norm2(x))
            else:
                x = layer.norm1(x + self.attend(layer.self_attn, x + p, x + p, x))
                x = layer.norm2(x + self.feed(layer, x))
        memory = self.encoder.norm(x) if g.pre_norm else x
        y = torch.zeros(batch, g.chunk_size, g.dim_model)
        q = self.decoder_pos_embed.weight
        for layer in self.decoder.layers:
            if g.pre_norm:
                z = layer.norm1(y)
                y = y + self.attend(layer.self_attn, z + q, z + q, z)
                y = y + self.attend(layer.multihead_attn, layer.norm2(y) + q, memory + p, memory)
                y = y + self.feed(layer, layer.norm3(y))
            else:
                y = layer.norm1(y + self.attend(layer.self_attn, y + q, y + q, y))
                y = layer.norm2(y + self.attend(layer.multihead_attn, y + q, memory + p, memory))
                y = layer.norm3(y + self.feed(layer, y))
        return self.action_head(self.decoder.norm(y))


class Bottleneck(nn.Module):
    """torchvision's block under its names; a basic one has no third convolution."""

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = width * (4 if bottleneck else 1)
        shapes = [(inputs, width, 1), (width, width, 3), (width, outputs, 1)]
        for i, (a, b, kernel) in enumerate(shapes if bottleneck else [(inputs, width, 3), (width, outputs, 3)], 1):
            strided = i == (2 if bottleneck else 1)
            spread = dilation if kernel == 3 else 1
            conv = nn.Conv2d(a, b, kernel, stride if strided else 1, spread * (kernel // 2), spread, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", nn.BatchNorm2d(b))
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "conv3"):
            y = self.bn3(self.conv3(F.relu(y)))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


def backbone(g: Geometry) -> nn.Sequential:
    parts: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(3, g.width, 7, 2, 3, bias=False)),
        ("bn1", nn.BatchNorm2d(g.width)),
        ("relu", nn.ReLU()),
        ("maxpool", nn.MaxPool2d(3, 2, 1)),
    ]
    channels = g.width
    for stage, count in enumerate(g.blocks):
        width, members = g.width * 2**stage, nn.Sequential()
        spread = g.replace_final_stride_with_dilation and stage == 3
        for i in range(count):
            stride = 2 if stage and not i and not spread else 1
            members.append(Bottleneck(channels, width, stride, 2 if spread and i else 1, g.bottleneck))
            channels = width * (4 if g.bottleneck else 1)
        parts.append((f"layer{stage + 1}", members))
    result = nn.Sequential()
    for name, module in parts:
        result.add_module(name, module)
    return result


def sines(rows: int, columns: int, width: int) -> Tensor:
    """DETR's positions, one number at a time."""
    half = width // 2
    out = np.empty((rows, columns, width))
    for r in range(rows):
        for c in range(columns):
            for place, of, start in ((r + 1, rows, 0), (c + 1, columns, half)):
                for i in range(half):
                    angle = place / (of + 1e-6) * 2 * np.pi / 10_000 ** (2 * (i // 2) / half)
                    out[r, c, start + i] = np.cos(angle) if i % 2 else np.sin(angle)
    return torch.tensor(out, dtype=torch.float32).flatten(0, 1)


Stats = dict[str, Tensor]


def write_folder(path: Path, geometry: Geometry, seed: int) -> Stats:
    """A random official folder. Returns its statistics."""
    generator = torch.Generator().manual_seed(seed)
    path.mkdir()
    model = Reference(geometry)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif tensor.is_floating_point():
            scale = 1.0 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
            near = 1.0 if "norm" in name or ".bn" in name or "downsample.1" in name else 0.0
            tensor.normal_(near if name.endswith("weight") and tensor.ndim == 1 else 0.0, 1, generator=generator)
            tensor.mul_(scale if tensor.ndim > 1 else 0.3).add_(near * 0.7 if name.endswith("weight") else 0.0)
    tensors = {f"model.{k}": v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(tensors, path / "model.safetensors")
    config = geometry.config()
    (path / "config.json").write_text(json.dumps(config))
    stats: Stats = {}
    for name, feature in {**config["input_features"], **config["output_features"]}.items():
        shape = (3, 1, 1) if feature["type"] == "VISUAL" else tuple(feature["shape"])
        stats[f"{name}.mean"] = torch.rand(shape, generator=generator)
        stats[f"{name}.std"] = torch.rand(shape, generator=generator) + 0.2
    features = {**config["input_features"], **config["output_features"]}
    common = {"eps": 1e-8, "norm_map": config["normalization_mapping"]}
    write_processor(path, "preprocessor", "normalizer_processor", common | {"features": features}, stats)
    write_processor(path, "postprocessor", "unnormalizer_processor", common | {"features": features}, stats)
    return stats


def write_processor(path: Path, name: str, kind: str, config: dict[str, Any], stats: Stats) -> None:
    state = f"policy_{name}_step_0_{kind}.safetensors"
    step = {"registry_name": kind, "config": config, "state_file": state}
    (path / f"policy_{name}.json").write_text(json.dumps({"name": f"policy_{name}", "steps": [step]}))
    save_file(stats, path / state)


def reference(
    tensors: dict[str, Tensor], geometry: Geometry, stats: Stats, shots: dict[str, np.ndarray], felt: np.ndarray
) -> np.ndarray:
    """Raw observations -> raw actions."""
    model = Reference(geometry).eval()
    missing = model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items()}, strict=False)
    assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys)
    assert not missing.unexpected_keys

    def normalised(x: Tensor, name: str) -> Tensor:
        return (x - stats[f"{name}.mean"]) / (stats[f"{name}.std"] + 1e-8)

    images = []
    for name, shot in shots.items():
        image = torch.from_numpy(shot).permute(0, 3, 1, 2).float() / 255
        images.append(normalised(image, f"observation.images.{name}"))
    state = torch.from_numpy(felt)
    parts = []
    if geometry.state:
        parts.append(normalised(state[:, : geometry.state], "observation.state"))
    if geometry.environment:
        parts.append(normalised(state[:, geometry.state :], "observation.environment_state"))
    with torch.no_grad():
        actions = model(images, torch.cat(parts, 1) if parts else torch.zeros(len(felt), 0))
    raw: np.ndarray = (actions * stats["action.std"] + stats["action.mean"]).numpy()
    return raw
