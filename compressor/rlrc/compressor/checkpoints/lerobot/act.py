"""LeRobot's folders of ACT: geometry, cameras, state, and the origin of the tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from rlrc.artifact import LayerSpec, NormStats, PolicySpec, StateSpec, TowerSpec
from rlrc.compressor.checkpoints import settings
from rlrc.compressor.checkpoints.folder import Folder, ReadOptions
from rlrc.compressor.checkpoints.layout import Layout, TensorOrigin
from rlrc.compressor.checkpoints.lerobot import processors as lerobot
from rlrc.compressor.checkpoints.lerobot.buffers import BUFFER
from rlrc.compressor.checkpoints.lerobot.features import PolicyFeature, number
from rlrc.compressor.checkpoints.tensors import BUFFERS
from rlrc.compressor.models.act import FAMILY, ACTGeometry
from rlrc.errors import UserError

# The blocks of the four stages, and whether they are bottlenecks.
RESNETS = {
    "resnet18": ([2, 2, 2, 2], False),
    "resnet34": ([3, 4, 6, 3], False),
    "resnet50": ([3, 4, 6, 3], True),
    "resnet101": ([3, 4, 23, 3], True),
    "resnet152": ([3, 8, 36, 3], True),
}


# The VAE's encoder, and the projection of the latent, which is zero at inference.
UNUSED = re.compile(r"model\.vae_encoder.*|model\.encoder_latent_input_proj\.weight")


def recognise(folder: Folder) -> bool:
    return folder.config.get("type") == FAMILY


def layout(folder: Folder, options: ReadOptions) -> Layout:
    """The layout, from config.json and, for the ResNet's channels, from the weights.

    Raises UserError for settings that are missing, contradict the weights, or are not supported.
    """
    settings.check_lerobot(folder, options)
    config, processors = folder.config, lerobot.read(folder, False, options)
    width, heads, mlp = (number(config, name) for name in ("dim_model", "n_heads", "dim_feedforward"))
    if width % 4 or width % heads:
        raise UserError(
            f"expected a dim_model that 4 and n_heads divide in config.json, found {width} and {heads}; correct it"
        )
    activation = config.get("feedforward_activation", "relu")
    if activation not in ("relu", "gelu"):
        raise UserError(
            f"expected relu or gelu as feedforward_activation in config.json, found {activation!r}; rlrc has no other"
        )
    cameras = tuple(processors.camera(feature) for feature in processors.inputs("VISUAL"))
    if not cameras:
        raise UserError(f"expected a camera in input_features of {folder.path}, found none; rlrc needs one")
    features = _state_features(processors)
    state, own, environment = _state(processors, features)
    geometry = ACTGeometry(**_resnet(folder), pre_norm=bool(config.get("pre_norm")), state=own, environment=environment)
    attention_only, full = LayerSpec(heads, heads, width // heads, 0), LayerSpec(heads, heads, width // heads, mlp)
    encoder = (full,) * number(config, "n_encoder_layers", 4)
    decoder = (attention_only, replace(full, kind="cross")) * number(config, "n_decoder_layers", 1)
    return Layout(
        PolicySpec(FAMILY, "parallel", cameras, state, None, processors.action(), asdict(geometry)),
        {
            "encoder": TowerSpec(width, encoder, activation=activation),
            "decoder": TowerSpec(width, decoder, activation=activation),
        },
        dict(_parts(geometry, len(encoder), len(decoder))),
        tuple(
            name
            for name in folder.tensors
            if UNUSED.fullmatch(name) or BUFFER.fullmatch(name) or name.endswith(BUFFERS)
        ),
        normalisation=processors.normalisation([*processors.inputs("VISUAL"), *features]),
    )


def _state_features(processors: lerobot.Processors) -> list[PolicyFeature]:
    """The features of the robot's state and of the environment's state, if present."""
    own = [feature for feature in processors.inputs("STATE") if feature.name == "observation.state"]
    return own + processors.inputs("ENV")[:1]


def _state(processors: lerobot.Processors, features: list[PolicyFeature]) -> tuple[StateSpec | None, int, int]:
    """Both states as one vector, and the size of each."""
    own, other = ([processors.state(one) for one in features if one.kind == kind] for kind in ("STATE", "ENV"))
    sizes = [sum(len(spec.names) for spec in specs) for specs in (own, other)]
    if not any(sizes):
        return None, 0, 0
    names = [f"joint_{i}" for i in range(sizes[0])] + [f"environment_{i}" for i in range(sizes[1])]
    center, scale = (tuple(x for spec in own + other for x in getattr(spec.norm, part)) for part in ("center", "scale"))
    return StateSpec(tuple(names), ("1",) * len(names), NormStats(center, scale)), sizes[0], sizes[1]


def _resnet(folder: Folder) -> dict[str, Any]:
    """The arguments of ``ResNet``. Raises UserError if config.json and the weights differ."""
    config, tensors = folder.config, folder.tensors
    name, dilated = str(config.get("vision_backbone")), bool(config.get("replace_final_stride_with_dilation"))
    if name not in RESNETS:
        raise UserError(
            f"expected one of {', '.join(RESNETS)} as vision_backbone in config.json, found {name!r}; rlrc has no other"
        )
    layers = [f"model.backbone.layer{stage}" for stage in range(1, 5)]
    blocks, bottleneck = [tensors.depth(f"{layer}.") for layer in layers], f"{layers[0]}.0.conv3.weight" in tensors
    if (blocks, bottleneck) != RESNETS[name]:
        raise UserError(
            f"expected the weights of a {name} in {folder.path}, found {blocks} blocks of {2 + bottleneck} "
            "convolutions; is its config.json of these weights?"
        )
    if dilated and not bottleneck:
        raise UserError(
            "expected replace_final_stride_with_dilation with bottleneck blocks only, found it with a "
            f"{name} in config.json; correct it"
        )
    stem, widths, outputs = (
        [tensors.shape(f"{convolution}.weight")[0] for convolution in convolutions]
        for convolutions in (
            ["model.backbone.conv1"],
            [f"{layer}.0.conv1" for layer in layers],
            [f"{layer}.0.conv{2 + bottleneck}" for layer in layers],
        )
    )
    return {
        "stem": stem[0],
        "blocks": blocks,
        "widths": widths,
        "outputs": outputs,
        "bottleneck": bottleneck,
        "dilated": dilated,
    }


def _parts(geometry: ACTGeometry, encoder: int, decoder: int) -> Iterator[tuple[str, TensorOrigin]]:
    """Every tensor of the policy with its origin."""
    yield from _trunk(geometry)
    yield "projector.weight", TensorOrigin(("model.encoder_img_feat_input_proj.weight",), "patches")
    yield "projector.bias", TensorOrigin(("model.encoder_img_feat_input_proj.bias",))
    yield "latent", TensorOrigin(("model.encoder_latent_input_proj.bias",))
    yield "position", TensorOrigin(("model.encoder_1d_feature_pos_embed.weight",))
    yield "query", TensorOrigin(("model.decoder_pos_embed.weight",))
    renamed = {"head": "action_head", "decoder.norm": "decoder.norm"}
    if geometry.state:
        renamed["state"] = "encoder_robot_state_input_proj"
    if geometry.environment:
        renamed["environment"] = "encoder_env_state_input_proj"
    if geometry.pre_norm:
        renamed["encoder.norm"] = "encoder.norm"
    for i in range(encoder):
        own = f"encoder.layers.{i}"
        yield from _attention(f"{own}.attention", f"{own}.self_attn")
        renamed |= {f"{own}.norm1": f"{own}.norm1", f"{own}.norm2": f"{own}.norm2"}
        renamed |= {f"{own}.mlp.up": f"{own}.linear1", f"{own}.mlp.down": f"{own}.linear2"}
    for i in range(0, decoder, 2):
        first, second, theirs = f"decoder.layers.{i}", f"decoder.layers.{i + 1}", f"decoder.layers.{i // 2}"
        yield from _attention(f"{first}.attention", f"{theirs}.self_attn")
        yield from _attention(f"{second}.attention", f"{theirs}.multihead_attn")
        renamed |= {f"{first}.norm1": f"{theirs}.norm1"}
        renamed |= {f"{second}.norm1": f"{theirs}.norm2", f"{second}.norm2": f"{theirs}.norm3"}
        renamed |= {f"{second}.mlp.up": f"{theirs}.linear1", f"{second}.mlp.down": f"{theirs}.linear2"}
    for own, theirs in renamed.items():
        for leaf in ("weight", "bias"):
            yield f"{own}.{leaf}", TensorOrigin((f"model.{theirs}.{leaf}",))


def _attention(own: str, theirs: str) -> Iterator[tuple[str, TensorOrigin]]:
    for leaf in ("weight", "bias"):
        for name, third in (("q", "query"), ("k", "key"), ("v", "value")):
            yield f"{own}.{name}.{leaf}", TensorOrigin((f"model.{theirs}.in_proj_{leaf}",), third)
        yield f"{own}.o.{leaf}", TensorOrigin((f"model.{theirs}.out_proj.{leaf}",))


def _trunk(geometry: ACTGeometry) -> Iterator[tuple[str, TensorOrigin]]:
    pairs = {"stem": ("conv1", "bn1")}
    channels = geometry.stem
    for stage, (count, outputs) in enumerate(zip(geometry.blocks, geometry.outputs, strict=True)):
        for i in range(count):
            own, theirs = f"stages.{stage}.{i}", f"layer{stage + 1}.{i}"
            for conv in range(2 + geometry.bottleneck):
                pairs[f"{own}.convs.{conv}"] = (f"{theirs}.conv{conv + 1}", f"{theirs}.bn{conv + 1}")
            if i == 0 and (stage or channels != outputs):
                pairs[f"{own}.skip"] = (f"{theirs}.downsample.0", f"{theirs}.downsample.1")
        channels = outputs
    leaves = {"weight": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}
    for own, (convolution, norm) in pairs.items():
        yield f"vision.{own}.conv.weight", TensorOrigin((f"model.backbone.{convolution}.weight",))
        for leaf, theirs in leaves.items():
            yield f"vision.{own}.norm.{leaf}", TensorOrigin((f"model.backbone.{norm}.{theirs}",))
