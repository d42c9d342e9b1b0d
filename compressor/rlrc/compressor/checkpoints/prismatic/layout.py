"""The common parts of OpenVLA and OpenVLA-OFT folders: vision transformers, a projector, a Llama, and pictures.

Shapes and config.json determine the geometry except the vision transformers' heads, which come from a table of the
usual backbones or from the hints. The features of a vision transformer are those before its last block (Prismatic VLMs,
arXiv 2402.07865), so that block, the final norm and the pooling head are unused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Literal

from rlrc.artifact import CameraSpec, LayerSpec, PromptSpec, TokenSpec, TowerSpec
from rlrc.compressor.checkpoints import settings
from rlrc.compressor.checkpoints.layout import TensorOrigin
from rlrc.compressor.checkpoints.prismatic import pictures
from rlrc.compressor.checkpoints.tensors import BUFFERS
from rlrc.compressor.models.nn.prismatic import TRANSFORMERS
from rlrc.compressor.models.storage.tensors import Tensors, wrong_shape_error
from rlrc.errors import UserError

if TYPE_CHECKING:
    from rlrc.compressor.checkpoints.folder import Folder, ReadOptions

FEATURIZERS = ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer.")  # of TRANSFORMERS
LLAMA = "language_model.model."
EMBEDDING = f"{LLAMA}embed_tokens.weight"
LM_HEAD = "language_model.lm_head.weight"
GENERATION = "generation_config.json"

# The usual vision transformers, of WIDTHS channels, have HEADS heads.
HEADS, WIDTHS = 16, {"dinov2": 1024, "siglip": 1152}

# text_config holds only the differences from LlamaConfig's defaults (transformers 4.40.1).
DEFAULTS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}
ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu-tanh", "relu"]] = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu-tanh",
    "relu": "relu",
}
PROMPT = "In: What action should the robot take to {instruction}?\nOut:"
PROMPT_V01 = (  # Vicuna's
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: What action should the robot take to {instruction}? ASSISTANT:"
)
PROMPTS = {"pure": PROMPT, "vicuna": PROMPT_V01}  # by a word of llm_backbone_id
BLANK = 29871  # Llama's single blank, which the original code appends to every prompt


@dataclass
class Prismatic:
    """The common part of both families' layouts."""

    camera: CameraSpec
    tokens: int  # of one picture
    towers: dict[str, TowerSpec]
    origins: dict[str, TensorOrigin]
    unused: list[str]
    geometry: dict[str, Any]
    head: str  # the tensor of the language model's head


def prismatic(folder: Folder, options: ReadOptions) -> Prismatic:
    """The common part. Raises UserError for unsupported folders, and for a config.json that contradicts the weights."""
    check_settings(folder, options)
    tensors, text = folder.tensors, text_config(folder)
    fused = any(name.startswith(FEATURIZERS[1]) for name in tensors)
    if folder.config.get("use_fused_vision_backbone") not in (None, fused):
        raise UserError(
            f"expected use_fused_vision_backbone {str(fused).lower()} in config.json, as in the weights of "
            f"{folder.path}, found the opposite; copy both from one checkpoint"
        )
    prefixes = FEATURIZERS[: 1 + fused]
    kinds = [_kind(folder, prefix) for prefix in prefixes]
    camera = pictures.camera(folder, options, kinds)
    patch = dimensions(tensors, f"{prefixes[0]}patch_embed.proj.weight", 4)[-1]
    tokens = (camera.height // patch) ** 2

    towers = {"decoder": _llama(folder, text)}
    parts, unused, extra = _llama_parts(len(towers["decoder"].layers)), list[str](), list[int]()
    head = EMBEDDING if text.get("tie_word_embeddings") else LM_HEAD
    unused += [LM_HEAD] if head == EMBEDDING and LM_HEAD in tensors else []
    unused += [name for name in tensors if name.endswith(BUFFERS)]
    for tower, prefix, kind in zip(TRANSFORMERS, prefixes, kinds, strict=False):
        towers[tower] = _transformer(folder, options, prefix, kind)
        depth, width = len(towers[tower].layers), towers[tower].width
        tensors.expect(f"{prefix}pos_embed", (1, tokens, width))
        parts |= _transformer_parts(tower, prefix, depth, kind)
        unread = (f"{prefix}blocks.{depth}.", f"{prefix}norm.", f"{prefix}attn_pool.")
        unused += [name for name in tensors if name.startswith(unread)]
        extra.append(1 + dimensions(tensors, f"{prefix}reg_token", 3)[1] if kind == "dinov2" else 0)
    pictures.check_sizes(folder, camera)
    linears = [f"projector.fc{i}" for i in range(1, 3 + fused)]
    for i, linear in enumerate(linears):
        parts |= affine(f"projector.{2 * i}", linear)
    geometry = {
        "vocabulary": read_count(text, "vocab_size"),
        "patch": patch,
        "extra": extra,
        "scaled": [kind == "dinov2" for kind in kinds],
        "projector": [dimensions(tensors, f"{linear}.weight", 2)[0] for linear in linears],
    }
    return Prismatic(camera, tokens, towers, parts, unused, geometry, head)


def check_settings(folder: Folder, options: ReadOptions) -> None:
    """Raises UserError for keys of the folder's configuration files that rlrc does not support."""
    settings.check_no_prompt_state(folder, options)
    settings.check(folder.config, settings.PRISMATIC, "config.json", options)
    text = folder.config.get("text_config")
    settings.check(text if isinstance(text, dict) else {}, settings.LLAMA, "text_config of config.json", options)
    if GENERATION in folder and isinstance(values := folder.json(GENERATION), dict):
        settings.check(values, settings.GENERATION, GENERATION, options)


def text_config(folder: Folder) -> dict[str, Any]:
    """The language model's configuration with its defaults."""
    text = folder.config.get("text_config", {})
    if not isinstance(text, dict):
        raise UserError(f"expected an object as text_config of {folder.path}/config.json, found {text!r}; correct it")
    return {**DEFAULTS, **text}


def _kind(folder: Folder, prefix: str) -> str:
    """The kind of a vision transformer by its tensors, because vision_backbone_id may be a custom one."""
    if f"{prefix}reg_token" in folder.tensors:
        return "dinov2"
    if f"{prefix}cls_token" not in folder.tensors:
        return "siglip"
    raise UserError(
        "expected SigLIP or DINOv2 with registers as vision backbones, found one with a class token and no registers "
        f"(vision_backbone_id {_backbone(folder)!r}) in {folder.path}; rlrc does not support it"
    )


def _backbone(folder: Folder) -> str:
    return str(folder.config.get("vision_backbone_id"))


def _transformer(folder: Folder, options: ReadOptions, prefix: str, kind: str) -> TowerSpec:
    """The vision transformer without its last block."""
    tensors = folder.tensors
    width, depth = dimensions(tensors, f"{prefix}patch_embed.proj.weight", 4)[0], tensors.depth(f"{prefix}blocks.")
    if depth < 2:
        raise UserError(f"expected two or more {prefix}blocks in {folder.path}, found {depth}; is it a whole policy?")
    hint, backbone = options.hints.get(kind), _backbone(folder)
    known = backbone in pictures.PIXELS and width == WIDTHS[kind]
    heads = hint.get("heads") if isinstance(hint, Mapping) else HEADS if known else None
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise UserError(
            f"expected a number of attention heads that divides the {width} channels of {kind} in {folder.path}, found "
            f'{heads or "none"} for vision_backbone_id {backbone!r}; give {{"{kind}": {{"heads": ...}}}} with --hints'
        )
    widths = [dimensions(tensors, f"{prefix}blocks.{i}.mlp.fc1.weight", 2)[0] for i in range(depth - 1)]
    layers = tuple(LayerSpec(heads, heads, width // heads, mlp) for mlp in widths)
    return TowerSpec(width, layers, eps=1e-6, activation="gelu")


def _transformer_parts(tower: str, prefix: str, depth: int, kind: str) -> dict[str, TensorOrigin]:
    parts = {
        f"{tower}.stem.steps.0.weight": TensorOrigin((f"{prefix}patch_embed.proj.weight",), "patches"),
        f"{tower}.stem.steps.0.bias": TensorOrigin((f"{prefix}patch_embed.proj.bias",)),
        f"{tower}.position": TensorOrigin((f"{prefix}pos_embed",), "flat"),
    }
    if kind == "dinov2":
        parts[f"{tower}.extra"] = TensorOrigin((f"{prefix}cls_token", f"{prefix}reg_token"), "flat")
    names = {"attention.qkv": "attn.qkv", "attention.out": "attn.proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"}
    names |= {"norm1": "norm1", "norm2": "norm2"}
    for i in range(depth):
        for ours, theirs in names.items():
            parts |= affine(f"{tower}.layers.{i}.{ours}", f"{prefix}blocks.{i}.{theirs}")
        if kind == "dinov2":
            for n in (1, 2):
                parts[f"{tower}.layers.{i}.scale{n}"] = TensorOrigin((f"{prefix}blocks.{i}.ls{n}.scale_factor",))
    return parts


def _llama(folder: Folder, text: dict[str, Any]) -> TowerSpec:
    activation = ACTIVATIONS.get(str(text["hidden_act"]))
    theta = settings.rope_theta(text, f"text_config in {folder.path}/config.json")
    if text["model_type"] != "llama" or text.get("attention_bias") or activation is None:
        raise UserError(
            f"expected a Llama without attention_bias as text_config of {folder.path}, found "
            f"{text['model_type']!r} with hidden_act {text['hidden_act']!r} and attention_bias "
            f"{text.get('attention_bias')!r}; rlrc does not support that language model"
        )
    width, heads, depth = (read_count(text, key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    kv_heads = heads if text.get("num_key_value_heads") is None else read_count(text, "num_key_value_heads")
    head_dim = width // heads if text.get("head_dim") is None else read_count(text, "head_dim")
    if (text.get("head_dim") is None and width % heads) or heads % kv_heads:
        raise UserError(
            f"expected heads that divide the hidden_size and kv heads that divide the heads in text_config of "
            f"{folder.path}, found {width}, {heads} and {kv_heads}; correct config.json"
        )
    if (found := folder.tensors.depth(f"{LLAMA}layers.")) != depth:
        raise UserError(
            f"expected {depth} layers in the weights of {folder.path}, as num_hidden_layers of its config.json says, "
            f"found {found}; copy both from one checkpoint"
        )
    layer = LayerSpec(heads, kv_heads, head_dim, read_count(text, "intermediate_size"))
    eps = text["rms_norm_eps"]
    if not all(type(value) in (int, float) and 0 < value < inf for value in (eps, theta)):
        raise UserError(
            f"expected positive numbers as rms_norm_eps and rope_theta of {folder.path}/config.json, found {eps!r} and "
            f"{theta!r}; correct them"
        )
    return TowerSpec(width, (layer,) * depth, eps=float(eps), activation=activation, theta=float(theta))


def _llama_parts(depth: int) -> dict[str, TensorOrigin]:
    names = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    names |= {f"attention.{name}": f"self_attn.{name}_proj" for name in "qkvo"}
    names |= {f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    parts = {
        "embedding.weight": TensorOrigin((EMBEDDING,)),
        "decoder.norm.weight": TensorOrigin((f"{LLAMA}norm.weight",)),
    }
    for i in range(depth):
        for ours, theirs in names.items():
            parts[f"decoder.layers.{i}.{ours}.weight"] = TensorOrigin((f"{LLAMA}layers.{i}.{theirs}.weight",))
    return parts


def prompt_spec(folder: Folder, options: ReadOptions, others: int) -> tuple[PromptSpec, tuple[str, ...]]:
    """The prompt and the assumptions. ``others``: the number of tokens outside the prompt."""
    kind, assumed = _prompt_kind(folder, options)
    room = (longest := read_count({"llm_max_length": 2048, **folder.config}, "llm_max_length")) - others
    if room < 1:
        raise UserError(
            f"expected an llm_max_length of more than the {others} tokens outside the prompt in config.json of "
            f"{folder.path}, found {longest}; correct it, or --images"
        )
    return PromptSpec(PROMPTS[kind], room, None, ("lower",), suffix=(BLANK,), known={"\u2581": BLANK}), assumed


def _prompt_kind(folder: Folder, options: ReadOptions) -> tuple[str, tuple[str, ...]]:
    """A key of PROMPTS, and the assumptions. The prompt belongs to the language model: OpenVLA v0.1 was trained from
    Vicuna, later versions from the base Llama 2 ("pure")."""
    hinted, backbone = options.hints.get("prompt"), folder.config.get("llm_backbone_id")
    kind = hinted or next((kind for kind in PROMPTS if kind in str(backbone).split("-")), None)
    if str(kind) in PROMPTS:
        return str(kind), ()
    if hinted is None and backbone is None:
        return "pure", ('the prompt "In: ... Out:", because config.json has no llm_backbone_id (--hints prompt)',)
    raise UserError(
        f"expected a language model with a prompt of {' or '.join(PROMPTS)} as llm_backbone_id of "
        f"{folder.path / 'config.json'}, found {hinted or backbone!r}; give the prompt that it was trained with as "
        f'{{"prompt": "{next(iter(PROMPTS))}"}} with --hints'
    )


def action_tokens(folder: Folder) -> tuple[int, TokenSpec]:
    """The number of bins, one less than their edges, and their tokens at the end of the vocabulary."""
    config = {"n_action_bins": 256, "pad_to_multiple_of": 64, **folder.config}
    rows = read_count(text_config(folder), "vocab_size")
    return read_count(config, "n_action_bins") - 1, TokenSpec(
        rows, 0, rows - read_count(config, "pad_to_multiple_of") - 1
    )


def affine(ours: str, theirs: str, file: str = "") -> dict[str, TensorOrigin]:
    """The origins of a layer's weight and bias."""
    return {f"{ours}.{name}": TensorOrigin((f"{theirs}.{name}",), file=file) for name in ("weight", "bias")}


def dimensions(tensors: Tensors, name: str, count: int) -> tuple[int, ...]:
    """A tensor's shape. Raises UserError if it is missing or has another number of dimensions."""
    shape = tensors.shape(name)
    if len(shape) != count:
        raise wrong_shape_error(f"tensor {name}", f"{count} dimensions", shape, tensors.origin)
    return shape


def read_count(values: Mapping[str, Any], key: str) -> int:
    """A positive integer of config.json. Raises UserError for anything else."""
    value = values.get(key)
    if type(value) is not int or value < 1:
        raise UserError(f"expected a positive whole number as {key} of config.json, found {value!r}; correct it")
    return value
