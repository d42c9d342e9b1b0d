"""Structured pruning: what is cut must be what is masked, and what was asked for must be what is reported.

Other families: test_export_families.py. Scores: test_importance.py; shapes: test_allocation.py; blocks: test_depth.py.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from rlrc.artifact import LayerSpec, TowerSpec
from rlrc.compressor.models.nn.decoder import Block
from rlrc.compressor.models.tiny import TinyPolicy
from rlrc.compressor.prune.importance import Scores, score_parts
from rlrc.compressor.prune.prune import PruneConfig, check, format_report, prune, prune_width, warn
from rlrc.errors import UserError


def lively(policy: TinyPolicy) -> TinyPolicy:
    """Weights large enough that every head and channel shows in the logits."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*policy.decoder.parameters(), *policy.vision.parameters()):
            if parameter.ndim == 2:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        policy.head.weight.copy_(torch.randn(policy.head.weight.shape, generator=generator))
    return policy


def inputs(policy: TinyPolicy, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    size = policy.spec.cameras[0].height
    return (
        torch.randn(batch, size, size, 3, generator=generator),
        torch.randint(0, 7, (batch, policy.spec.prompt.max_tokens), generator=generator),
        torch.randn(batch, 7, generator=generator),
    )


@pytest.mark.parametrize("ratio", [0.85, 0.5, 0.3])
def test_pruned_equals_masked(pupil: TinyPolicy, ratio: float) -> None:
    config = PruneConfig(ratio, "random")
    lively(pupil)
    before = copy.deepcopy(pupil.state_dict())
    pruned = cast(TinyPolicy, prune(pupil, config)[0].build())
    found = score_parts(pupil, "decoder", range(1, 3), config)
    masked = copy.deepcopy(pupil)
    for i in (1, 2):
        layer, block = pruned.towers["decoder"].layers[i], masked.decoder.blocks()[i]
        assert layer.heads < 4
        assert layer.mlp < 128
        for head in found[i].heads.argsort()[: 4 - layer.heads]:
            for name in "qkv":
                getattr(block.attention, name).weight.data[32 * head : 32 * head + 32] = 0
            block.attention.o.weight.data[:, 32 * head : 32 * head + 32] = 0
        for channel in found[i].channels.argsort()[: 128 - layer.mlp]:
            block.mlp.gate.weight.data[channel] = block.mlp.up.weight.data[channel] = 0
            block.mlp.down.weight.data[:, channel] = 0
    with torch.no_grad():
        expected = masked(*inputs(pupil))
        torch.testing.assert_close(pruned(*inputs(pupil)), expected, atol=1e-5, rtol=1e-5)
        assert (pupil(*inputs(pupil)) - expected).abs().mean() > 0.1  # what went did matter
    for name, tensor in pupil.state_dict().items():
        assert torch.equal(tensor, before[name]), f"prune changed {name} of the policy it was given"


def test_of_a_vision_tower_the_three_thirds_of_qkv_are_cut_alike(pupil: TinyPolicy) -> None:
    """Two heads of 16: head 1 stays, rows 16 to 32 of q, of k (from 32 on) and of v (from 64 on). 32 channels: half."""
    lively(pupil)
    block = pupil.vision.layers[0]
    block.attention.qkv.bias.data = torch.arange(96.0)
    block.attention.out.weight.data[:, :16] *= 1e-3  # head 0
    block.mlp.down.weight.data[:, :16] *= 1e-3
    weights, report = prune(pupil, PruneConfig(0.5, "magnitude", tower="vision", keep=0))
    pruned = cast(TinyPolicy, weights.build())
    assert pruned.towers["vision"].layers == (LayerSpec(1, 1, 16, 16),)
    assert pruned.vision.layers[0].attention.qkv.bias.tolist() == [*range(16, 32), *range(48, 64), *range(80, 96)]
    assert report["layers"] == [{"heads": 0.5, "mlp": 0.5, "parameters": report["intermediate"]}]
    block.attention.out.weight.data[:, :16] = block.mlp.down.weight.data[:, :16] = 0
    with torch.no_grad():
        torch.testing.assert_close(pruned(*inputs(pupil)), pupil(*inputs(pupil)), atol=1e-5, rtol=1e-5)


def with_layers(policy: TinyPolicy, *layers: LayerSpec) -> TinyPolicy:
    decoder = replace(policy.towers["decoder"], layers=layers)
    return lively(TinyPolicy(policy.spec, policy.towers | {"decoder": decoder}))


def test_heads_that_share_keys_go_evenly_and_the_keys_stay(pupil: TinyPolicy) -> None:
    """Six query heads, three to each key/value head: a third of them is one of each, the best of each."""
    shared = LayerSpec(6, 2, 32, 64)
    policy = with_layers(pupil, shared, shared, shared)
    found = [Scores(torch.tensor([1.0, 3, 2, 30, 10, 20]), torch.arange(64).float())] * 3
    cut = LayerSpec(2, 2, 32, 32)
    towers = policy.towers | {"decoder": replace(policy.towers["decoder"], layers=(shared, cut, shared))}
    pruned = cast(TinyPolicy, prune_width(policy, "decoder", towers, found).build())
    before, after = (cast(Block, p.decoder.layers[1]).attention for p in (policy, pruned))
    rows = torch.cat([torch.arange(32, 64), torch.arange(96, 128)])  # heads 1 and 3
    assert torch.equal(after.q.weight, before.q.weight[rows])
    assert torch.equal(after.o.weight, before.o.weight[:, rows])
    assert torch.equal(after.k.weight, before.k.weight)
    masked = copy.deepcopy(policy)
    others = torch.tensor([i for i in range(192) if i not in rows])
    masked.decoder.layers[1].attention.o.weight.data[:, others] = 0
    masked.decoder.layers[1].mlp.down.weight.data[:, :32] = 0
    with torch.no_grad():
        expected = masked(*inputs(policy))
        torch.testing.assert_close(pruned(*inputs(policy)), expected, atol=1e-5, rtol=1e-5)
        assert (policy(*inputs(policy)) - expected).abs().mean() > 0.1
    assert prune(policy, PruneConfig(0.7, "random"))[0].towers["decoder"].layers == (shared, cut, shared)


def test_first_and_last_blocks_are_kept(pupil: TinyPolicy) -> None:
    pruned = cast(TinyPolicy, prune(pupil, PruneConfig(0.75, "random"))[0].build())
    for i in (0, 3):
        assert pruned.towers["decoder"].layers[i] == pupil.towers["decoder"].layers[i]
        for name, tensor in pupil.decoder.blocks()[i].state_dict().items():
            assert torch.equal(pruned.decoder.blocks()[i].state_dict()[name], tensor)


def test_report_by_hand(pupil: TinyPolicy) -> None:
    """A block of 4 heads of 32 and 128 channels on 64 has 4 * 64 * 128 + 3 * 64 * 128 + 2 * 64 = 57472 parameters.

    With one head and 32 channels it has 4 * 64 * 32 + 3 * 64 * 32 + 2 * 64 = 14464.
    """
    pruned, report = prune(pupil, PruneConfig(0.75, "random"))
    kept, cut = {"heads": 0, "mlp": 0, "parameters": 0}, {"heads": 0.75, "mlp": 0.75, "parameters": 0.7483}
    assert report["layers"] == [kept, cut, cut, kept]
    assert report["shapes"] == {"decoder": [[4, 4, 128], [1, 1, 32], [1, 1, 32], [4, 4, 128]]}
    assert report["intermediate"] == round(1 - 14464 / 57472, 4) == 0.7483
    assert report["decoder"] == round(1 - (2 * 57472 + 2 * 14464 + 64) / (4 * 57472 + 64), 4) == 0.3741
    whole = sum(parameter.numel() for parameter in pupil.parameters())
    assert report["parameters"] == whole - 2 * (57472 - 14464)
    assert report["parameters"] == pruned.count()
    assert report["whole"] == round(2 * (57472 - 14464) / whole, 4)
    assert report["bytes"]["bf16"] == 2 * report["parameters"]
    assert report["dropped"] == {}
    assert 0.5 < report["time"] < 1
    told = format_report(report)
    assert told[0].startswith("removed 74.8% of the decoder's intermediate blocks, 37.4% of the decoder, ")
    assert told[1] == "left: 4 blocks; heads 4, 1, 1, 4; channels 128, 32, 32, 128"


def test_blocks_and_then_widths(pupil: TinyPolicy) -> None:
    lively(pupil)
    weights, report = prune(pupil, PruneConfig(0.5, "magnitude", kind="both", blocks=(2,)))
    pruned = weights.build()
    whole = LayerSpec(4, 4, 32, 128)
    assert pruned.towers["decoder"].layers == (whole, LayerSpec(2, 2, 32, 64), whole)
    parts = [layer["parameters"] for layer in report["layers"]]
    assert parts == [0, round(1 - (2 * 14336 + 128) / 57472, 4), 1, 0]
    assert report["intermediate"] == round(1 - (2 * 14336 + 128) / (2 * 57472), 4)
    assert report["dropped"] == {"decoder": [2]}
    dropped = prune(pupil, PruneConfig(kind="depth", blocks=(2,)))[0].build()
    alone = prune(dropped, PruneConfig(0.5, "magnitude"))[0].build()
    with torch.no_grad():
        assert torch.equal(pruned(*inputs(pupil)), alone(*inputs(pupil)))


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.5, -0.1, math.nan])
def test_impossible_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(UserError, match=r"prune.ratio between 0 and 1 .*found"):
        PruneConfig(ratio)


@pytest.mark.parametrize(
    "wrong",
    [
        {"score": "gradient"},
        {"batches": 0},
        {"demonstrations": 0},
        {"keep": -1},
        {"tower": "head"},
        {"to_bytes": "2 pounds"},
        {"to_bytes": "0GB"},
        {"to_latency": "1.5x"},
        {"to_latency": "0.0x"},
        {"align": 0},
        {"sensitivity": "a.json"},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_other_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"prune.{next(iter(wrong))}"):
        PruneConfig(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"to_latency": "0.4x", "scope": "whole"},
        {"to_bytes": "1GB", "scope": "whole"},
        {"drop": 2},
        {"kind": "both"},
        {"kind": "depth", "drop": 2, "blocks": (1,)},
        {"kind": "depth", "drop": 2, "to_bytes": "1GB"},
        {"allocation": "sensitivity"},
        {"allocation": "global", "kind": "depth"},
        {"allocation": "sensitivity", "sensitivity": "a.json", "kind": "both", "drop": 1},
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"expected prune\."):
        PruneConfig(**wrong)


def test_decoder_without_intermediate_blocks_is_refused(pupil: TinyPolicy) -> None:
    tower = pupil.towers["decoder"]
    short = TinyPolicy(pupil.spec, pupil.towers | {"decoder": TowerSpec(tower.width, tower.layers[:2])})
    for kind in ("width", "depth"):
        with pytest.raises(UserError, match=r"3 or more in all.* found 2"):
            check(short.spec, short.towers, PruneConfig(0.5, "random", kind=kind))


def test_a_tower_that_is_not_there_is_refused(pupil: TinyPolicy) -> None:
    with pytest.raises(UserError, match=r"prune\.tower decoder, vision \(the towers of this policy\), found expert"):
        check(pupil.spec, pupil.towers, PruneConfig(tower="expert"))


def test_a_ratio_that_leaves_no_head_or_no_channel_is_refused(pupil: TinyPolicy) -> None:
    check(pupil.spec, pupil.towers, PruneConfig(0.875))  # half a head of four is one
    with pytest.raises(UserError, match=r"up to 0\.875, which leaves a head of decoder\.layers\.1's 4, found 0\.88"):
        check(pupil.spec, pupil.towers, PruneConfig(0.88))
    channels = with_layers(pupil, *(LayerSpec(100, 100, 32, 4),) * 3)
    with pytest.raises(UserError, match=r"up to 0\.875, which leaves a channel of decoder\.layers\.1's 4"):
        check(channels.spec, channels.towers, PruneConfig(0.9))


def test_who_prunes_vision_is_warned(pupil: TinyPolicy, capsys: pytest.CaptureFixture[str]) -> None:
    warn(pupil.towers, PruneConfig())
    assert capsys.readouterr().err == ""
    warn(pupil.towers, PruneConfig(tower="vision"))
    error = capsys.readouterr().err
    assert error.startswith("warning: the vision ")
    assert error.count("\n") == 1
