"""lerobot's folders of pi0, pi0.5 and SmolVLA: the policy's geometry, its cameras, state, prompt and actions.

Shapes and config.json determine the geometry except the number of heads, which comes from tables of the usual vision
encoders and language models, or from the hints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import TYPE_CHECKING, Any, Literal

from rlrc.artifact import CameraSpec, FlowSpec, LayerSpec, PolicySpec, StateSpec, TowerSpec
from rlrc.compressor.checkpoints import settings
from rlrc.compressor.checkpoints.layout import Layout
from rlrc.compressor.checkpoints.lerobot import processors as lerobot
from rlrc.compressor.checkpoints.lerobot.features import PolicyFeature, number, real
from rlrc.compressor.checkpoints.lerobot.flow_tensors import NAMES, CanonicalTensors, find_unused, map_tensors
from rlrc.compressor.checkpoints.lerobot.normaliser import IDENTITY
from rlrc.compressor.checkpoints.lerobot.processors import Processors
from rlrc.compressor.checkpoints.lerobot.prompt_state import set_prompt_state
from rlrc.compressor.checkpoints.lerobot.steps import BEFORE
from rlrc.errors import UserError

if TYPE_CHECKING:
    from rlrc.compressor.checkpoints.folder import Folder, ReadOptions

Kind = Literal["self", "cross", "half"]

# Heads, key/value heads and numbers of a head: openpi's Gemmas and SmolVLM's SmolLM2s.
HEADS = {
    "gemma_2b": (8, 1, 256),
    "gemma_300m": (8, 1, 256),
    "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": (9, 3, 64),
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": (15, 5, 64),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": (32, 32, 64),
    "HuggingFaceTB/SmolVLM-256M-Instruct": (9, 3, 64),
    "HuggingFaceTB/SmolVLM-500M-Instruct": (15, 5, 64),
}
SIGLIP = {768: 12, 1152: 16}  # heads of the vision encoders by width

# Of the prefix's and the expert's heads: the setting that names the model, its default, the section of the hints.
GEMMAS = (("paligemma_variant", "gemma_2b", "vlm"), ("action_expert_variant", "gemma_300m", "expert"))
SMOLLMS = (("vlm_model_name", "HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "text"),) * 2
GEMMA_KEYS = ("num_heads", "num_kv_heads", "head_dim")
SMOLLM_KEYS = ("num_attention_heads", "num_key_value_heads", "head_dim")

KNOWN = {"pi0": {"<bos>": 2}, "pi05": {"<bos>": 2}, "smolvla": {"<|im_start|>": 1}}  # ids that identify the vocabulary
STATE = {"pi0": "suffix", "pi05": "prompt", "smolvla": "prefix"}  # see FlowGeometry


@dataclass(frozen=True)
class Reader:
    """The inputs of the functions that ``layout`` calls."""

    family: str
    folder: Folder
    hints: Mapping[str, Any]
    processors: Processors
    tensors: CanonicalTensors

    @property
    def config(self) -> dict[str, Any]:
        return self.folder.config

    @property
    def smol(self) -> bool:
        return self.family == "smolvla"

    def hint(self, section: str, key: str) -> int | None:
        """A number from the hints."""
        values = self.hints.get(section)
        value = values.get(key) if isinstance(values, Mapping) else None
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"expected a positive whole number as {section}.{key}, found {value!r}; correct the hints")
        return value


def recognise(folder: Folder) -> bool:
    return str(folder.config.get("type")) in NAMES


def layout(folder: Folder, options: ReadOptions) -> Layout:
    """The layout. Reads no weights, only statistics.

    Raises UserError for unsupported settings, for a config.json that contradicts the weights, and for heads that are in
    neither the tables nor the hints.
    """
    family = str(folder.config["type"])
    if "proj_width" in folder.config:
        raise UserError(
            "expected pi0 as lerobot 0.4 and later save it, found proj_width in config.json, which is older; "
            "convert the folder with lerobot's own scripts"
        )
    settings.check_lerobot(folder, options)
    processors = lerobot.read(folder, True, options)
    reader = Reader(family, folder, options.hints, processors, CanonicalTensors(folder.tensors, family))
    vision, grid = _vision(reader)
    decoder, expert = _decoders(reader)
    towers = {"vision": vision, "decoder": decoder, "expert": expert}
    spec = _spec(reader, _cameras(reader, grid), _merge(reader, vision, grid))
    spec, assumed = set_prompt_state(folder, processors, spec, options.prompt_state)
    taken = map_tensors(reader.tensors, towers, spec.geometry["bias"], spec.geometry["state"] != "prompt")
    shown = processors.normalisation([*processors.inputs("VISUAL"), _state_feature(reader)])
    return Layout(spec, towers, taken, find_unused(reader.tensors, towers, taken), assumed, shown)


def _vision(reader: Reader) -> tuple[TowerSpec, int]:
    """SigLIP, and the number of patches on a side."""
    tensors, prefix = reader.tensors, reader.tensors.where.vision
    width = tensors.shape(f"{prefix}.embeddings.patch_embedding.weight", 4)[0]
    heads = reader.hint("vision", "num_attention_heads") or SIGLIP.get(width)
    if heads is None or width % heads:
        raise UserError(
            f"expected a known number of attention heads that divides the {width} channels of the vision encoder in "
            f"{reader.folder.path}, found {heads or 'none'}; give vision.num_attention_heads with --hints"
        )
    layers = f"{prefix}.encoder.layers"
    depth = tensors.depth(layers, "mlp.fc1.weight")
    mlps = [tensors.shape(f"{layers}.{i}.mlp.fc1.weight", 2)[0] for i in range(depth)]
    blocks = tuple(LayerSpec(heads, heads, width // heads, mlp) for mlp in mlps)
    positions = tensors.shape(f"{prefix}.embeddings.position_embedding.weight", 2)[0]
    return TowerSpec(width, blocks, eps=1e-6, activation="gelu-tanh"), isqrt(positions)


def _decoders(reader: Reader) -> tuple[TowerSpec, TowerSpec]:
    """The used blocks of the prefix, and the expert."""
    tensors, smol = reader.tensors, reader.smol
    prefixes = (tensors.where.decoder, tensors.where.expert)
    depth, blocks = (tensors.depth(f"{prefix}.layers", "self_attn.q_proj.weight") for prefix in prefixes)
    kinds = _kinds(reader, depth, blocks)
    # The expert uses only keys and values of the last prefix block it needs, and nothing of later blocks.
    prefix_kinds: list[Kind] = ["self"] * ((blocks - 1) * (depth // blocks))

    def tower(prefix: str, model: tuple[str, str, str], kinds: list[Kind], adaptive: bool) -> TowerSpec:
        heads = _heads(reader, prefix, *model)
        gates = [tensors.shape(f"{prefix}.layers.{i}.mlp.gate_proj.weight", 2) for i in range(len(kinds))]
        eps = real(reader.hints, "rms_eps", 1e-5) if smol else real(reader.hints, "vlm_rms_eps", 1e-6)
        # SmolVLA's base is 10,000; the configuration of its language model does not apply.
        theta = real(reader.hints, "rope_theta_used" if smol else "rope_theta", 10_000.0)
        if min(eps, theta) <= 0:
            raise UserError(
                f"expected positive numbers as eps and rope_theta of {prefix}, found {eps:g} and {theta:g}; correct "
                "the hints"
            )
        return TowerSpec(
            width=gates[0][1],
            layers=tuple(LayerSpec(*heads, mlp, kind) for (mlp, _), kind in zip(gates, kinds, strict=True)),
            eps=eps,
            activation="silu" if smol else "gelu-tanh",
            theta=theta,
            norm="adaptive" if adaptive else "rms",
            norm_offset=0.0 if smol or adaptive else 1.0,
        )

    models = SMOLLMS if smol else GEMMAS
    decoder = tower(prefixes[0], models[0], [*prefix_kinds, "half"], adaptive=False)
    expert = tower(prefixes[1], models[1], kinds, adaptive=reader.family == "pi05")
    first, own = decoder.layers[0], expert.layers[0]
    if (first.kv_heads, first.head_dim) != (own.kv_heads, own.head_dim):
        raise UserError(
            f"expected the same key/value heads in the prefix and the expert, found {first.kv_heads} of "
            f"{first.head_dim} and {own.kv_heads} of {own.head_dim} numbers; correct the hints"
        )
    return decoder, expert


def _heads(reader: Reader, prefix: str, setting: str, default: str, section: str) -> tuple[int, int, int]:
    """Heads, key/value heads and numbers of a head of a language model, checked against its first block."""
    keys = SMOLLM_KEYS if reader.smol else GEMMA_KEYS
    model = str(reader.config.get(setting, default))
    given = [reader.hint(section, key) for key in keys]
    wanted = ", ".join(f"{section}.{key}" for key in keys)
    if model not in HEADS and None in given:
        raise UserError(
            f"expected {setting} to be one of {', '.join(HEADS)}, found {model!r}, whose heads rlrc does not know; "
            f"give {wanted} with --hints"
        )
    heads, kv_heads, head_dim = (own or known for own, known in zip(given, HEADS.get(model, (0,) * 3), strict=True))
    rows = [reader.tensors.shape(f"{prefix}.layers.0.self_attn.{name}_proj.weight", 2)[0] for name in "qk"]
    if rows != [heads * head_dim, kv_heads * head_dim] or heads % kv_heads:
        raise UserError(
            f"expected {heads} query and {kv_heads} key/value heads of {head_dim} numbers in {prefix} of "
            f"{reader.folder.path}, found {rows[0]} and {rows[1]} rows of q_proj and k_proj; give {wanted} with --hints"
        )
    return heads, kv_heads, head_dim


def _kinds(reader: Reader, depth: int, blocks: int) -> list[Kind]:
    """The kinds of the expert's ``blocks`` blocks, for a prefix of ``depth`` blocks.

    SmolVLA's expert may have a block for every second, third, ... of the prefix only. lerobot then decides
    by the prefix's index whether a block attends to itself, but creates its weights by the expert's index. If the two
    disagree, lerobot fails and this raises UserError.
    """
    config, every = reader.config, 1
    kept = kept_expert = depth
    if reader.smol:
        kept, kept_expert = (_layers(config, name, depth) for name in ("num_vlm_layers", "num_expert_layers"))
        cross = "cross" in str(config.get("attention_mode", "cross_attn"))
        every = int(real(config, "self_attn_every_n_layers", 2)) if cross else 1
    if (depth, blocks) != (kept, kept_expert) or depth % blocks:
        raise UserError(
            f"expected {kept} blocks in the prefix and {kept_expert} in the expert, as config.json says, found {depth} "
            f"and {blocks} in the weights of {reader.folder.path}; copy both from one checkpoint"
        )
    itself, stride = [every > 0 and i % every == 0 for i in range(depth)], depth // blocks
    if itself[::stride] != itself[:blocks] or any(itself[i] for i in range(depth) if i % stride):
        raise UserError(
            f"expected num_expert_layers that lerobot can run with self_attn_every_n_layers {every}, found {blocks} "
            f"for {depth} blocks of the prefix; rlrc does not support it"
        )
    return ["self" if own else "cross" for own in itself[:blocks]]


def _layers(config: Mapping[str, Any], name: str, every: int) -> int:
    """A number of layers; all of them if the setting is not positive."""
    value = int(real(config, name, -1))
    return value if value > 0 else every


def _merge(reader: Reader, vision: TowerSpec, grid: int) -> int:
    """SmolVLM's connector joins merge x merge patches to one token."""
    columns = reader.tensors.shape(f"{reader.tensors.where.projector}.weight", 2)[1]
    merge = isqrt(columns // vision.width)
    if not merge or columns != merge**2 * vision.width or grid % merge:
        raise UserError(
            f"expected a projector of whole squares of the {grid} x {grid} patches of {vision.width} channels, found "
            f"{columns} columns in {reader.tensors.where.projector} of {reader.folder.path}; is its config.json of "
            "these weights?"
        )
    return merge


def _cameras(reader: Reader, grid: int) -> tuple[CameraSpec, ...]:
    """The cameras in the config's order. All but one may be missing: lerobot masks the tokens of absent ones."""
    config, smol = reader.config, reader.smol
    size = config.get("resize_imgs_with_padding", [512, 512]) if smol else config.get("image_resolution", [224, 224])
    resize: Literal["none", "pad", "pad-left-top"] = "pad-left-top" if smol else "pad"
    if size is None:
        resize = "none"
    elif not isinstance(size, list) or len(size) != 2 or not all(type(x) is int and x > 0 for x in size):
        raise UserError(f"expected two numbers of pixels to resize to in config.json, found {size!r}; correct it")
    elif smol:
        size = size[::-1]  # its order is width, height
    cameras = []
    for feature in reader.processors.inputs("VISUAL"):
        for how, _ in reader.processors.normalising_steps(feature):
            if how.mode != IDENTITY:
                raise UserError(
                    f"expected pictures normalised by IDENTITY, found {how.mode} for {feature.name} in the processors "
                    f"of {reader.folder.path}; rlrc does not support it with padding"
                )
        cameras.append(reader.processors.camera(feature, resize, size and tuple(size), 0.5, 0.5, optional=True))
    if not cameras:
        raise UserError("expected a VISUAL in input_features of config.json, found none; list its cameras there")
    patch = _patch(reader)
    for camera in cameras:
        if (camera.height // patch, camera.width // patch) != (grid, grid):
            raise UserError(
                f"expected pictures of {grid * patch} x {grid * patch} pixels, as the positions of the vision encoder "
                f"in {reader.folder.path} are, found {camera.height} x {camera.width} in config.json; rlrc does not "
                "interpolate positions"
            )
    return tuple(cameras)


def _patch(reader: Reader) -> int:
    return reader.tensors.shape(f"{reader.tensors.where.vision}.embeddings.patch_embedding.weight", 4)[-1]


def _spec(reader: Reader, cameras: tuple[CameraSpec, ...], merge: int) -> PolicySpec:
    config, family, tensors = reader.config, reader.family, reader.tensors
    width = number(config, "max_action_dim", 32)
    action = reader.processors.action(None if reader.smol else width, padded=width)
    if action.dim > width:
        raise UserError(
            f"expected at most max_action_dim = {width} numbers of an action in config.json, found {action.dim}; "
            "correct it"
        )
    prompt = reader.processors.prompt
    assert prompt is not None
    if (prompt.state_bins > 0) != (family == "pi05"):
        raise UserError(
            f"expected {BEFORE} to make a prompt for {family} in {reader.folder.path}, found another family's; "
            "is that file of this policy?"
        )
    geometry: dict[str, Any] = {
        "vocabulary": tensors.shape(tensors.embedding, 2)[0],
        "patch": _patch(reader),
        "merge": merge,
        "bias": f"{tensors.where.projector}.bias" in tensors,
        "scaled": reader.smol,
        "state": STATE[family],
        "causal": reader.smol,
        "periods": _periods(config),
    }
    steps = number(config, "num_steps" if reader.smol else "num_inference_steps", 10)
    return PolicySpec(
        family,
        "flow",
        cameras,
        _state(reader),
        replace(prompt, known=KNOWN[family]),
        action,
        geometry,
        FlowSpec(steps, width),
    )


def _periods(config: Mapping[str, Any]) -> list[float]:
    """The shortest and the longest period of the time embedding."""
    found = [real(config, "min_period", 4e-3), real(config, "max_period", 4.0)]
    if not 0 < found[0] <= found[1]:
        raise UserError(
            f"expected 0 < min_period <= max_period in config.json, found {found[0]:g} and {found[1]:g}; correct it"
        )
    return found


def _state_feature(reader: Reader) -> PolicyFeature:
    width = number(reader.config, "max_state_dim", 32)
    found = reader.processors.inputs("STATE")
    if not found and not reader.smol:
        found = [PolicyFeature("observation.state", "STATE", (width,))]  # as lerobot does
    if len(found) != 1 or found[0].dim > width:
        listed = ", ".join(f"{feature.name} {list(feature.shape)}" for feature in found) or "none"
        raise UserError(
            f"expected one STATE of at most max_state_dim = {width} numbers in config.json, found {listed}; correct it"
        )
    return found[0]


def _state(reader: Reader) -> StateSpec:
    width = number(reader.config, "max_state_dim", 32)
    return reader.processors.state(_state_feature(reader), None if reader.family == "pi05" else width, padded=width)
