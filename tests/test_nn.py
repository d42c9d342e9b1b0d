"""The native modules against transformers' Llama, torch's own encoder layer, convolutions, and formulas written out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rlrc.artifact import LayerSpec, Manifest, TowerSpec
from rlrc.compressor.models.nn.decoder import Attention, Decoder, causal_mask, rotary_tables, rotate
from rlrc.compressor.models.nn.vit import PatchStem, merge_patches
from rlrc.compressor.models.nn.vit import VisionBlock as VisionBlock
from rlrc.compressor.models.tiny import TinyPolicy
from rlrc.errors import UserError


def randomise(module: nn.Module, seed: int = 0) -> None:
    """All parameters random, norms and biases too, so that none is left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))


def llama(width: int, layer: LayerSpec, layers: int) -> Any:
    from transformers import LlamaConfig, LlamaModel

    config = cast(Any, LlamaConfig)(
        vocab_size=2,
        hidden_size=width,
        intermediate_size=layer.mlp,
        num_hidden_layers=layers,
        num_attention_heads=layer.heads,
        num_key_value_heads=layer.kv_heads,
        head_dim=layer.head_dim,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    return LlamaModel(config).eval()


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_decoder_is_transformers_llama(kv_heads: int) -> None:
    layer = LayerSpec(heads=4, kv_heads=kv_heads, head_dim=12, mlp=56)  # 4 * 12 is not the width
    decoder, reference = Decoder(TowerSpec(32, (layer, layer))), llama(32, layer, 2)
    randomise(decoder)
    names = {
        "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm",
        **{f"attention.{name}": f"self_attn.{name}_proj" for name in "qkvo"},
        **{f"mlp.{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    }
    state = {"norm.weight": decoder.norm.weight, "embed_tokens.weight": torch.zeros(2, 32)}
    for i, block in enumerate(decoder.blocks()):
        for ours, theirs in names.items():
            state[f"layers.{i}.{theirs}.weight"] = block.state_dict()[f"{ours}.weight"]
    reference.load_state_dict(state)
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        expected = reference(inputs_embeds=x, use_cache=False).last_hidden_state  # causal, as Llama always is
        torch.testing.assert_close(decoder(x, causal_mask(9))[0], expected, atol=1e-5, rtol=1e-5)
        assert (decoder(x)[0] - expected).abs().max() > 0.01  # without a mask it sees both ways


def test_causal_mask_hides_the_future_and_no_mask_hides_nothing() -> None:
    decoder = Decoder(TowerSpec(16, (LayerSpec(2, 2, 8, 32),) * 2))
    randomise(decoder)
    x = torch.randn(1, 6, 16)
    changed = x.clone()
    changed[:, 4] += 1
    with torch.no_grad():
        masked = decoder(changed, causal_mask(6))[0] - decoder(x, causal_mask(6))[0]
        free = decoder(changed)[0] - decoder(x)[0]
    assert masked[:, :4].abs().max() == 0
    assert masked[:, 4:].abs().amax((0, 2)).min() > 1e-4
    assert free.abs().amax((0, 2)).min() > 1e-4


def test_rotary_is_a_complex_rotation() -> None:
    """Pair (i, i + d/2) of position t turns by t * theta^(-2i/d)."""
    length, head_dim, theta = 7, 8, 500.0
    x = torch.randn(2, 3, length, head_dim, dtype=torch.float64)
    cos, sin = rotary_tables(length, head_dim, theta)
    turned = rotate(x, cos.double(), sin.double())
    for t in range(length):
        for i in range(head_dim // 2):
            angle = torch.tensor(t * theta ** (-2 * i / head_dim), dtype=torch.float64)
            before = torch.complex(x[..., t, i], x[..., t, i + 4])
            after = before * torch.polar(torch.ones((), dtype=torch.float64), angle)
            torch.testing.assert_close(turned[..., t, i], after.real, atol=1e-5, rtol=0)
            torch.testing.assert_close(turned[..., t, i + 4], after.imag, atol=1e-5, rtol=0)


def test_grouped_query_attention_by_loops() -> None:
    """Query head h attends to key/value head h // (heads / kv_heads)."""
    layer = LayerSpec(heads=6, kv_heads=2, head_dim=4, mlp=1)
    attention = Attention(10, layer, 10)
    x, (cos, sin) = torch.randn(1, 5, 10), rotary_tables(5, 4)
    q, k, v = (linear(x)[0] for linear in (attention.q, attention.k, attention.v))
    heads = []
    for h in range(6):
        shared = slice(4 * (h // 3), 4 * (h // 3) + 4)
        query, key = rotate(q[:, 4 * h : 4 * h + 4], cos, sin), rotate(k[:, shared], cos, sin)
        rows = []
        for t in range(5):
            weight = torch.stack([(query[t] @ key[s] / 2).exp() for s in range(5)])
            rows.append(sum(weight[s] * v[s, shared] for s in range(5)) / weight.sum())
        heads.append(torch.stack(rows))
    expected = torch.cat(heads, 1) @ attention.o.weight.T
    source = attention.keys_values(x, cos, sin, None)
    torch.testing.assert_close(attention(x, cos, sin, None, source)[0], expected, atol=1e-5, rtol=1e-5)


def test_decoder_refuses_blocks_of_different_head_size() -> None:
    with pytest.raises(ValueError, match=r"one head size .* found \[8, 16\]"):
        Decoder(TowerSpec(16, (LayerSpec(2, 2, 8, 32), LayerSpec(1, 1, 16, 32))))


def test_merge_patches_by_hand() -> None:
    """Rows of a patch, then its columns, then channels; channel 1 is channel 0 plus 100."""
    x = torch.arange(24).view(1, 4, 6, 1)
    merged = merge_patches(torch.cat([x, x + 100], -1), 2)
    assert merged.shape == (1, 2, 3, 8)
    assert merged[0, 0, 0].tolist() == [0, 100, 1, 101, 6, 106, 7, 107]
    assert merged[0, 0, 2].tolist() == [4, 104, 5, 105, 10, 110, 11, 111]
    assert merged[0, 1, 1].tolist() == [14, 114, 15, 115, 20, 120, 21, 121]


def test_stem_is_a_stack_of_strided_convolutions() -> None:
    stem = PatchStem((4, 2), (5, 7))
    pixels = torch.randn(2, 16, 8, 3)
    x = pixels.permute(0, 3, 1, 2)
    for i, (factor, step) in enumerate(zip(stem.factors, stem.steps, strict=True)):
        assert isinstance(step, nn.Linear)
        kernel = step.weight.view(len(step.weight), factor, factor, -1).permute(0, 3, 1, 2)
        x = F.conv2d(F.gelu(x) if i else x, kernel, step.bias, stride=factor)
    torch.testing.assert_close(stem(pixels), x.permute(0, 2, 3, 1), atol=1e-5, rtol=1e-5)


def test_vision_block_is_torchs_encoder_layer() -> None:
    block = VisionBlock(TowerSpec(24, ()), LayerSpec(heads=3, kv_heads=3, head_dim=8, mlp=40))
    randomise(block)
    reference = nn.TransformerEncoderLayer(24, 3, 40, 0.0, F.gelu, batch_first=True, norm_first=True)
    reference.load_state_dict(
        {
            "self_attn.in_proj_weight": block.attention.qkv.weight,
            "self_attn.in_proj_bias": block.attention.qkv.bias,
            "self_attn.out_proj.weight": block.attention.out.weight,
            "self_attn.out_proj.bias": block.attention.out.bias,
            "linear1.weight": block.mlp.up.weight,
            "linear1.bias": block.mlp.up.bias,
            "linear2.weight": block.mlp.down.weight,
            "linear2.bias": block.mlp.down.bias,
            **{f"{name}.{part}": getattr(block, name).state_dict()[part] for name in ("norm1", "norm2")
               for part in ("weight", "bias")},
        }
    )  # fmt: skip
    x = torch.randn(2, 6, 24)
    torch.testing.assert_close(block(x), reference(x), atol=1e-5, rtol=1e-5)


def test_policy_reads_everything_and_gives_a_chunk_of_logits(tiny_manifest: Manifest) -> None:
    torch.manual_seed(0)
    policy, action = TinyPolicy(tiny_manifest.policy, tiny_manifest.towers).eval(), tiny_manifest.policy.action
    pixels, ids, state = torch.randn(2, 32, 32, 3), torch.randint(0, 7, (2, 5)), torch.randn(2, 3)
    with torch.no_grad():
        logits = policy(pixels, ids, state)
        assert logits.shape == (2, action.horizon, action.dim, action.bins)
        assert policy.encode_image(pixels).shape == (2, policy.image_tokens, 64)
        for other in (
            policy(pixels + 0.1, ids, state),
            policy(pixels, (ids + 1) % 7, state),
            policy(pixels, ids, state + 0.1),
        ):
            assert ((other - logits).abs() > 1e-6).float().mean() > 0.9
        # A row of the batch knows nothing of the others.
        torch.testing.assert_close(policy(pixels[1:], ids[1:], state[1:]), logits[1:], atol=1e-5, rtol=1e-5)


def test_chunk_is_decoded_at_the_queries(tiny_manifest: Manifest) -> None:
    """Without its blocks the decoder is its final norm, and what is left at the chunk's places are the queries."""
    policy = TinyPolicy(tiny_manifest.policy, tiny_manifest.towers)
    with torch.no_grad():
        for block in policy.decoder.blocks():
            block.attention.o.weight.zero_()
            block.mlp.down.weight.zero_()
        hidden = policy.hidden(torch.randn(2, 4, 64), torch.randint(0, 7, (2, 5)), torch.randn(2, 3))
        expected = policy.query / (policy.query.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(hidden, expected.expand(2, -1, -1), atol=1e-5, rtol=1e-5)


def test_policy_refuses_a_geometry_that_is_not_its_own(tiny_manifest: Manifest) -> None:
    spec = replace(tiny_manifest.policy, geometry=tiny_manifest.policy.geometry | {"registers": 4})
    with pytest.raises(UserError, match="registers"):
        TinyPolicy(spec, tiny_manifest.towers)
