"""Names and shapes of the tensors in official checkpoints, from a few numbers for each family.

As saved by openvla/openvla with timm 0.9.10, moojink/openvla-oft, lerobot 0.6.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Vision:
    """A vision transformer of ``tokens`` patches of ``patch`` x ``patch`` pixels."""

    width: int
    depth: int
    mlp: int
    patch: int
    tokens: int


@dataclass(frozen=True)
class Language:
    """A decoder with grouped-query attention."""

    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int


def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def affine(name: str, width: int) -> Shapes:
    """LayerNorm or BatchNorm: weight and bias."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def timm(prefix: str, vision: Vision, registers: int = 0, scaled: bool = False, pooled: bool = False) -> Shapes:
    """timm's names. DINOv2: registers, LayerScale and a class token; SigLIP: a pooling head."""
    width, mlp = vision.width, vision.mlp
    shapes: Shapes = {f"{prefix}pos_embed": (1, vision.tokens, width)}
    if registers:
        shapes |= {f"{prefix}cls_token": (1, 1, width), f"{prefix}reg_token": (1, registers, width)}
    shapes |= {f"{prefix}patch_embed.proj.weight": (width, 3, vision.patch, vision.patch)}
    shapes |= {f"{prefix}patch_embed.proj.bias": (width,)} | affine(f"{prefix}norm", width)
    for i in range(vision.depth):
        block = f"{prefix}blocks.{i}."
        shapes |= affine(f"{block}norm1", width) | affine(f"{block}norm2", width)
        shapes |= linear(f"{block}attn.qkv", width, 3 * width) | linear(f"{block}attn.proj", width, width)
        shapes |= linear(f"{block}mlp.fc1", width, mlp) | linear(f"{block}mlp.fc2", mlp, width)
        if scaled:
            shapes |= {f"{block}ls{n}.scale_factor": (width,) for n in (1, 2)}
    if pooled:
        pool = f"{prefix}attn_pool."
        shapes |= {f"{pool}latent": (1, 1, width)} | affine(f"{pool}norm", width)
        shapes |= linear(f"{pool}q", width, width) | linear(f"{pool}kv", width, 2 * width)
        shapes |= linear(f"{pool}proj", width, width)
        shapes |= linear(f"{pool}mlp.fc1", width, mlp) | linear(f"{pool}mlp.fc2", mlp, width)
    return shapes


def siglip(prefix: str, vision: Vision, pooled: bool = False) -> Shapes:
    """transformers' names. ``pooled``: with the pooling head."""
    width = vision.width
    shapes: Shapes = {f"{prefix}embeddings.patch_embedding.weight": (width, 3, vision.patch, vision.patch)}
    shapes |= {f"{prefix}embeddings.patch_embedding.bias": (width,)}
    shapes |= {f"{prefix}embeddings.position_embedding.weight": (vision.tokens, width)}
    for i in range(vision.depth):
        block = f"{prefix}encoder.layers.{i}."
        shapes |= affine(f"{block}layer_norm1", width) | affine(f"{block}layer_norm2", width)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{block}self_attn.{name}", width, width)
        shapes |= linear(f"{block}mlp.fc1", width, vision.mlp) | linear(f"{block}mlp.fc2", vision.mlp, width)
    if pooled:
        head = f"{prefix}head."
        shapes |= {f"{head}probe": (1, 1, width)} | affine(f"{head}layernorm", width)
        shapes |= attention(f"{head}attention.", width)
        shapes |= linear(f"{head}mlp.fc1", width, vision.mlp) | linear(f"{head}mlp.fc2", vision.mlp, width)
    return shapes | affine(f"{prefix}post_layernorm", width)


def decoder(
    prefix: str, language: Language, adaptive: bool = False, cross: Sequence[int] = (), source: int = 0
) -> Shapes:
    """Blocks and final norm of a Llama or Gemma. ``adaptive``: norms with a condition of the same width.

    The keys and values of the blocks in ``cross`` are projections of ``source`` channels.
    """
    width, heads = language.width, language.heads * language.head_dim

    def norm(name: str) -> Shapes:
        return linear(f"{name}.dense", width, 3 * width) if adaptive else {f"{name}.weight": (width,)}

    shapes = norm(f"{prefix}norm")
    for i in range(language.depth):
        block, inputs = f"{prefix}layers.{i}.", source if i in cross else width
        shapes |= norm(f"{block}input_layernorm") | norm(f"{block}post_attention_layernorm")
        shapes |= linear(f"{block}self_attn.q_proj", width, heads, bias=False)
        for name in ("k_proj", "v_proj"):
            shapes |= linear(f"{block}self_attn.{name}", inputs, language.kv_heads * language.head_dim, bias=False)
        shapes |= linear(f"{block}self_attn.o_proj", heads, width, bias=False)
        for name in ("gate_proj", "up_proj"):
            shapes |= linear(f"{block}mlp.{name}", width, language.mlp, bias=False)
        shapes |= linear(f"{block}mlp.down_proj", language.mlp, width, bias=False)
    return shapes


def openvla(dinov2: Vision, siglip: Vision, language: Language, vocabulary: int) -> Shapes:
    """OpenVLA and OpenVLA-OFT with fused vision backbones and four registers."""
    features, width = dinov2.width + siglip.width, language.width
    return (
        timm("vision_backbone.featurizer.", dinov2, registers=4, scaled=True)
        | timm("vision_backbone.fused_featurizer.", siglip, pooled=True)
        | linear("projector.fc1", features, 4 * features)
        | linear("projector.fc2", 4 * features, width)
        | linear("projector.fc3", width, width)
        | {"language_model.model.embed_tokens.weight": (vocabulary, width)}
        | decoder("language_model.model.", language)
        | linear("language_model.lm_head", width, vocabulary, bias=False)
    )


def oft_head(hidden: int, dim: int) -> Shapes:
    """action_head--STEP_checkpoint.pt of the L1 head."""
    shapes = affine("model.layer_norm1", dim * hidden) | linear("model.fc1", dim * hidden, hidden)
    for i in (0, 1):
        block = f"model.mlp_resnet_blocks.{i}.ffn."
        shapes |= affine(f"{block}0", hidden) | linear(f"{block}1", hidden, hidden)
    return shapes | affine("model.layer_norm2", hidden) | linear("model.fc2", hidden, dim)


def oft_proprioception(hidden: int, state: int) -> Shapes:
    """proprio_projector--STEP_checkpoint.pt."""
    return linear("fc1", state, hidden) | linear("fc2", hidden, hidden)


def pi0(
    vision: Vision,
    language: Language,
    expert: Language,
    vocabulary: int,
    state: int,
    action: int,
    adaptive: bool,
    pooled: bool = False,
) -> Shapes:
    """pi0, or pi0.5 (``adaptive``), with the language model's embedding and head both stored, as lerobot 0.6 does.

    PaliGemma's vision tower has no pooling head (vision_use_head is false by default); tiny ones may be ``pooled``.
    """
    both = "model.paligemma_with_expert."
    gemma, width = f"{both}paligemma.model.", expert.width
    shapes = siglip(f"{gemma}vision_tower.vision_model.", vision, pooled)
    shapes |= linear(f"{gemma}multi_modal_projector.linear", vision.width, language.width)
    shapes |= {f"{gemma}language_model.embed_tokens.weight": (vocabulary, language.width)}
    shapes |= decoder(f"{gemma}language_model.", language)
    shapes |= linear(f"{both}paligemma.lm_head", language.width, vocabulary, bias=False)
    shapes |= decoder(f"{both}gemma_expert.model.", expert, adaptive)
    shapes |= linear(f"{both}gemma_expert.lm_head", width, vocabulary, bias=False)
    shapes |= linear("model.action_in_proj", action, width) | linear("model.action_out_proj", width, action)
    if adaptive:
        return shapes | linear("model.time_mlp_in", width, width) | linear("model.time_mlp_out", width, width)
    shapes |= linear("model.state_proj", state, width) | linear("model.action_time_mlp_in", 2 * width, width)
    return shapes | linear("model.action_time_mlp_out", width, width)


def smolvla(
    vision: Vision,
    merge: int,
    language: Language,
    expert: Language,
    every: int,
    vocabulary: int,
    state: int,
    action: int,
) -> Shapes:
    """``merge`` x ``merge`` patches become one token; every ``every``-th block of the expert attends to itself."""
    both = "model.vlm_with_expert."
    vlm, width = f"{both}vlm.model.", expert.width
    cross = [i for i in range(expert.depth) if i % every] if every > 0 else range(expert.depth)
    shapes = siglip(f"{vlm}vision_model.", vision)
    shapes |= linear(f"{vlm}connector.modality_projection.proj", vision.width * merge**2, language.width, bias=False)
    shapes |= {f"{vlm}text_model.embed_tokens.weight": (vocabulary, language.width)}
    shapes |= decoder(f"{vlm}text_model.", language)
    shapes |= linear(f"{both}vlm.lm_head", language.width, vocabulary, bias=False)
    shapes |= decoder(f"{both}lm_expert.", expert, cross=cross, source=language.kv_heads * language.head_dim)
    shapes |= linear("model.state_proj", state, language.width)
    shapes |= linear("model.action_in_proj", action, width) | linear("model.action_out_proj", width, action)
    shapes |= linear("model.action_time_mlp_in", 2 * width, width)
    return shapes | linear("model.action_time_mlp_out", width, width)


def act(
    base: int, width: int, mlp: int, depths: tuple[int, int, int], latent: int, chunk: int, state: int, action: int
) -> Shapes:
    """With a ResNet-18 whose first layer has ``base`` channels; ``depths`` of encoder, decoder and VAE encoder."""
    shapes = resnet18("model.backbone.", base)
    encoder, decoder_depth, vae = depths
    for prefix, depth in (("model.encoder.", encoder), ("model.decoder.", decoder_depth), ("model.vae_encoder.", vae)):
        for i in range(depth):
            block = f"{prefix}layers.{i}."
            shapes |= attention(f"{block}self_attn.", width) | affine(f"{block}norm1", width)
            shapes |= affine(f"{block}norm2", width)
            shapes |= linear(f"{block}linear1", width, mlp) | linear(f"{block}linear2", mlp, width)
            if prefix == "model.decoder.":
                shapes |= attention(f"{block}multihead_attn.", width) | affine(f"{block}norm3", width)
    shapes |= affine("model.decoder.norm", width)
    shapes |= {"model.decoder_pos_embed.weight": (chunk, width), "model.vae_encoder_cls_embed.weight": (1, width)}
    shapes |= {
        "model.encoder_1d_feature_pos_embed.weight": (2, width),
        "model.vae_encoder_pos_enc": (1, chunk + 2, width),
    }
    shapes |= {"model.encoder_img_feat_input_proj.weight": (width, 8 * base, 1, 1)}
    shapes |= {"model.encoder_img_feat_input_proj.bias": (width,)}
    for name, inputs in (("latent", latent), ("robot_state", state)):
        shapes |= linear(f"model.encoder_{name}_input_proj", inputs, width)
    for name, inputs in (("action", action), ("robot_state", state)):
        shapes |= linear(f"model.vae_encoder_{name}_input_proj", inputs, width)
    shapes |= linear("model.vae_encoder_latent_output_proj", width, 2 * latent)
    return shapes | linear("model.action_head", width, action)


def attention(prefix: str, width: int) -> Shapes:
    """torch.nn.MultiheadAttention."""
    shapes: Shapes = {f"{prefix}in_proj_weight": (3 * width, width), f"{prefix}in_proj_bias": (3 * width,)}
    return shapes | linear(f"{prefix}out_proj", width, width)


def resnet18(prefix: str, base: int) -> Shapes:
    """torchvision's, with frozen batch norms and without the classifier."""

    def conv_and_norm(convolution: str, norm: str, inputs: int, outputs: int, size: int) -> Shapes:
        shapes: Shapes = {f"{convolution}.weight": (outputs, inputs, size, size)} | affine(norm, outputs)
        return shapes | {f"{norm}.{name}": (outputs,) for name in ("running_mean", "running_var")}

    shapes = conv_and_norm(f"{prefix}conv1", f"{prefix}bn1", 3, base, 7)
    inputs = base
    for layer, outputs in enumerate((base, 2 * base, 4 * base, 8 * base), 1):
        for i in (0, 1):
            block = f"{prefix}layer{layer}.{i}."
            shapes |= conv_and_norm(f"{block}conv1", f"{block}bn1", inputs, outputs, 3)
            shapes |= conv_and_norm(f"{block}conv2", f"{block}bn2", outputs, outputs, 3)
            if inputs != outputs:
                shapes |= conv_and_norm(f"{block}downsample.0", f"{block}downsample.1", inputs, outputs, 1)
            inputs = outputs
    return shapes
