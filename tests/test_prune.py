"""Structured pruning: what is cut must be what is masked, and what is cut first must matter least.

Other families: test_export_families.py.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlrc.artifact import LayerSpec, TowerSpec
from rlrc.compressor import reference
from rlrc.compressor.backbones.tiny import TinyPolicy
from rlrc.compressor.data import SampleBatches, Samples
from rlrc.compressor.losses import SMOOTHING, smoothed_cross_entropy
from rlrc.compressor.prune import (
    Group,
    PruneConfig,
    Scores,
    groups,
    kept,
    magnitude_scores,
    prune,
    pruned_towers,
    random_scores,
    taylor_scores,
)
from rlrc.errors import UserError


def lively(policy: TinyPolicy) -> TinyPolicy:
    """Weights large enough that every head and channel shows in the logits."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.decoder.parameters():
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


@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.3])
def test_pruned_equals_masked(pupil: TinyPolicy, ratio: float) -> None:
    lively(pupil)
    before = copy.deepcopy(pupil.state_dict())
    scores = random_scores(pupil, PruneConfig(ratio))
    pruned, _ = prune(pupil, scores, PruneConfig(ratio))
    masked = copy.deepcopy(pupil)
    for i in (1, 2):
        layer, block = pruned.towers["decoder"].layers[i], masked.decoder.blocks()[i]
        assert layer.heads < 4
        assert layer.mlp < 128
        for head in scores[i].heads.argsort()[: 4 - layer.heads]:
            for name in "qkv":
                getattr(block.attention, name).weight.data[32 * head : 32 * head + 32] = 0
            block.attention.o.weight.data[:, 32 * head : 32 * head + 32] = 0
        for channel in scores[i].channels.argsort()[: 128 - layer.mlp]:
            block.mlp.gate.weight.data[channel] = block.mlp.up.weight.data[channel] = 0
            block.mlp.down.weight.data[:, channel] = 0
    with torch.no_grad():
        expected = masked(*inputs(pupil))
        torch.testing.assert_close(pruned(*inputs(pupil)), expected, atol=1e-5, rtol=1e-5)
        assert (pupil(*inputs(pupil)) - expected).abs().mean() > 0.1  # what went did matter
    for name, tensor in pupil.state_dict().items():
        assert torch.equal(tensor, before[name]), f"prune changed {name} of the policy it was given"


def with_layers(policy: TinyPolicy, *layers: LayerSpec) -> TinyPolicy:
    decoder = replace(policy.towers["decoder"], layers=layers)
    return lively(TinyPolicy(policy.spec, policy.towers | {"decoder": decoder}))


def test_heads_that_share_keys_go_evenly_and_the_keys_stay(pupil: TinyPolicy) -> None:
    """Six query heads, three to each key/value head: a third of them is one of each, the best of each."""
    shared = LayerSpec(6, 2, 32, 64)
    policy, config = with_layers(pupil, shared, shared, shared), PruneConfig(0.7)
    scores = [Scores(torch.tensor([1.0, 3, 2, 30, 10, 20]), torch.arange(64).float())] * 3
    pruned, _ = prune(policy, scores, config)
    assert pruned.towers["decoder"].layers == (shared, LayerSpec(2, 2, 32, 32), shared)
    before, after = (p.decoder.layers[1].attention for p in (policy, pruned))
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


def test_keys_that_another_tower_reads_stay() -> None:
    """A flow policy's prefix and expert stand side by side in attention; only a cross block's keys are its own."""
    own = LayerSpec(4, 4, 8, 64)
    assert kept(own, 0.5, own=True) == LayerSpec(2, 2, 8, 32)
    assert kept(own, 0.5, own=False) == LayerSpec(4, 4, 8, 32)  # a query head for each of the keys' remains
    assert kept(replace(own, heads=8), 0.5, own=False) == LayerSpec(4, 4, 8, 32)
    half = replace(own, kind="half")
    assert kept(half, 0.5) == half
    tower = TowerSpec(16, (own, replace(own, kind="cross"), own))
    towers = {"decoder": tower, "expert": tower}
    pruned = pruned_towers(towers, PruneConfig(0.5, tower="expert", keep=0))
    assert [(layer.heads, layer.kv_heads) for layer in pruned["expert"].layers] == [(4, 4), (2, 2), (4, 4)]
    assert pruned["decoder"] == tower


def test_first_and_last_blocks_are_kept(pupil: TinyPolicy) -> None:
    pruned, _ = prune(pupil, random_scores(pupil, PruneConfig()), PruneConfig(0.9))
    for i in (0, 3):
        assert pruned.towers["decoder"].layers[i] == pupil.towers["decoder"].layers[i]
        for name, tensor in pupil.decoder.blocks()[i].state_dict().items():
            assert torch.equal(pruned.decoder.blocks()[i].state_dict()[name], tensor)


def test_scores_by_hand() -> None:
    """Two heads of two dimensions and two channels on a residual stream of one: sums over their rows and columns."""
    importance = {
        "b.attention.q": [[1], [2], [3], [4]],  # head 0: 1 + 2, head 1: 3 + 4
        "b.attention.k": [[1], [0], [0], [1]],  # 1, 1
        "b.attention.v": [[0], [0], [2], [2]],  # 0, 4
        "b.attention.o": [[2, 2, 0, 6]],  # 4, 6
        "b.mlp.gate": [[1], [2]],  # channel 0: 1, channel 1: 2
        "b.mlp.up": [[0], [3]],  # 0, 3
        "b.mlp.down": [[2, 0]],  # 2, 0
    }
    values = {f"{name}.weight": torch.tensor(value).float() for name, value in importance.items()}
    heads, channels = groups("b", LayerSpec(2, 2, 2, 2), True, values)
    assert heads.sums(values).tolist() == [8, 18]
    assert channels.sums(values).tolist() == [3, 5]
    shared, _ = groups("b", LayerSpec(2, 1, 2, 2), True, values)  # one key head of both: not theirs
    assert shared.sums({**values, "b.attention.k.weight": torch.tensor(0)}).tolist() == [7, 13]
    del values["b.mlp.gate.weight"]
    _, plain = groups("b", LayerSpec(2, 2, 2, 2), True, values)
    assert plain.sums(values).tolist() == [2, 3]


def test_magnitude_is_the_sum_of_absolute_weights(pupil: TinyPolicy) -> None:
    scores = magnitude_scores(pupil, PruneConfig(score="magnitude"))
    mlp = pupil.decoder.blocks()[2].mlp
    expected = mlp.gate.weight.abs().sum(1) + mlp.up.weight.abs().sum(1) + mlp.down.weight.abs().sum(0)
    torch.testing.assert_close(scores[2].channels, expected.detach())
    assert scores[2].heads.shape == (4,)


def samples(policy: TinyPolicy, number: int) -> Samples:
    random, action = np.random.default_rng(0), policy.spec.action
    size = policy.spec.cameras[0].height
    return Samples(
        random.integers(0, 256, (number, size, size, 3), np.uint8),
        random.normal(size=(number, 7)).astype(np.float32),
        random.integers(0, 13, number),
        random.uniform(-1, 1, (number, action.horizon, action.dim)).astype(np.float32),
    )


def test_taylor_scores_are_those_of_the_mean_gradient_over_the_batches(pupil: TinyPolicy) -> None:
    ids = np.random.default_rng(0).integers(0, 7, (13, 6))
    config, made = PruneConfig(batches=3), samples(pupil, 40)
    scores = taylor_scores(pupil, SampleBatches(made, pupil.spec, ids, 5), config)
    assert all(parameter.grad is None for parameter in pupil.parameters())

    batches, loss = SampleBatches(made, pupil.spec, ids, 5), torch.zeros(())
    for _ in range(3):
        batch = batches.draw(64)
        logits = pupil(batch.inputs.pixels[0], batch.inputs.ids, batch.inputs.state)
        loss = loss + smoothed_cross_entropy(logits, batch.actions, SMOOTHING).mean() / 3
    block = pupil.decoder.blocks()[1]
    down, o = block.mlp.down.weight, block.attention.o.weight
    gate, up, q, k, v = (
        m.weight for m in (block.mlp.gate, block.mlp.up, *(getattr(block.attention, n) for n in "qkv"))
    )
    gradients = torch.autograd.grad(loss, [gate, up, q, k, v, down, o])
    rows = [(w * g).abs().sum(1) for w, g in zip([gate, up, q, k, v], gradients[:5], strict=True)]
    channels = rows[0] + rows[1] + (down * gradients[5]).abs().sum(0)
    heads = (rows[2] + rows[3] + rows[4] + (o * gradients[6]).abs().sum(0)).reshape(4, 32).sum(1)
    torch.testing.assert_close(scores[1].channels, channels, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(scores[1].heads, heads, rtol=1e-3, atol=1e-9)
    assert scores[1].channels.std() > 0


def test_a_silent_head_and_a_silent_channel_go_first(pupil: TinyPolicy) -> None:
    """What the loss does not depend on has no gradient, so its score is zero."""
    lively(pupil)
    block = pupil.decoder.blocks()[1]
    block.attention.o.weight.data[:, 64:96] = 0  # head 2
    block.attention.v.weight.data[64:96] = 0
    block.mlp.down.weight.data[:, 17] = 0
    block.mlp.up.weight.data[17] = 0
    ids = np.zeros((13, 6), np.int64)
    scores = taylor_scores(pupil, SampleBatches(samples(pupil, 8), pupil.spec, ids, 0), PruneConfig(batches=1))
    assert scores[1].heads.argmin() == 2
    assert scores[1].heads[2] == 0
    assert scores[1].channels.argmin() == 17
    assert scores[1].channels[17] == 0


def test_kept_groups_stay_in_their_order() -> None:
    scores = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.95, 0.2])
    assert Group((), (), 6).best(scores, 3).tolist() == [1, 3, 4]
    assert Group((), (), 6, bundles=3).best(scores, 3).tolist() == [1, 3, 4]  # one of each pair
    assert Group((), (), 6, bundles=2).best(scores, 4).tolist() == [1, 2, 3, 4]  # two of three


def test_report_by_hand(pupil: TinyPolicy) -> None:
    """A block of 4 heads of 32 and 128 channels on 64 has 4 * 64 * 128 + 3 * 64 * 128 + 2 * 64 = 57472 parameters.

    With one head and 32 channels it has 4 * 64 * 32 + 3 * 64 * 32 + 2 * 64 = 14464.
    """
    pruned, report = prune(pupil, random_scores(pupil, PruneConfig()), PruneConfig(0.9))
    kept, cut = {"heads": 0, "mlp": 0, "parameters": 0}, {"heads": 0.75, "mlp": 0.75, "parameters": 0.7483}
    assert report["layers"] == [kept, cut, cut, kept]
    assert report["decoder"] == round(1 - (2 * 57472 + 2 * 14464 + 64) / (4 * 57472 + 64), 4) == 0.3741
    whole = sum(parameter.numel() for parameter in pupil.parameters())
    assert report["parameters"] == whole - 2 * (57472 - 14464)
    assert report["parameters"] == sum(parameter.numel() for parameter in pruned.parameters())
    assert report["whole"] == round(2 * (57472 - 14464) / whole, 4)


@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.37, 0.5, 0.77, 0.9, 0.99])
def test_widths_stay_whole_groups_of_32(ratio: float) -> None:
    layers = pruned_towers(reference.towers(), PruneConfig(ratio))["decoder"].layers
    assert {(layer.mlp % 32, layer.heads == layer.kv_heads, layer.head_dim) for layer in layers} == {(0, True, 32)}
    assert layers[1].mlp >= 32
    assert layers[1].heads >= 1
    assert abs(layers[1].mlp - 640 * (1 - ratio)) <= 32
    assert abs(layers[1].heads - 10 * (1 - ratio)) <= 1


def test_reference_policy_at_the_operating_point() -> None:
    layers = pruned_towers(reference.towers(), PruneConfig(0.9))["decoder"].layers
    assert layers[0] == layers[-1] == LayerSpec(10, 10, 32, 640)
    assert set(layers[1:-1]) == {LayerSpec(1, 1, 32, 64)}


def test_a_block_narrower_than_a_group_keeps_its_width() -> None:
    narrow = LayerSpec(2, 2, 8, 56)
    assert kept(narrow, 0.01).mlp == 56  # not 64
    assert kept(narrow, 0.9) == LayerSpec(1, 1, 8, 32)
    assert kept(replace(narrow, mlp=24), 0.5).mlp == 12  # no whole group is lost by this
    assert kept(replace(narrow, mlp=24), 0.99).mlp == 1


def test_rest_of_a_tower_is_kept() -> None:
    tower = TowerSpec(16, (LayerSpec(2, 2, 8, 64),) * 3, 1e-6, "gelu-tanh", 500.0, norm_offset=1.0)
    pruned = pruned_towers({"decoder": tower}, PruneConfig(0.5))["decoder"]
    assert pruned == replace(tower, layers=pruned.layers)
    assert pruned.layers[1] == LayerSpec(1, 1, 8, 32)


def test_how_many_blocks_stay_whole() -> None:
    towers = reference.towers()
    whole = towers["decoder"].layers[0]
    for keep in (0, 1, 3):
        layers = pruned_towers(towers, PruneConfig(keep=keep))["decoder"].layers
        assert [layer == whole for layer in layers] == [i < keep or i >= 12 - keep for i in range(12)]
    with pytest.raises(UserError, match=r"13 or more in all.* found 12 blocks; .*--keep"):
        pruned_towers(towers, PruneConfig(keep=6))


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.5, -0.1, math.nan])
def test_impossible_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(UserError, match=r"prune.ratio between 0 and 1 .*found"):
        PruneConfig(ratio)


@pytest.mark.parametrize(
    "wrong",
    [{"score": "gradient"}, {"batches": 0}, {"demonstrations": 0}, {"keep": -1}, {"tower": "vision"}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_other_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"prune.{next(iter(wrong))}"):
        PruneConfig(**wrong)


def test_decoder_without_intermediate_blocks_is_refused(pupil: TinyPolicy) -> None:
    tower = pupil.towers["decoder"]
    short = TinyPolicy(pupil.spec, pupil.towers | {"decoder": TowerSpec(tower.width, tower.layers[:2])})
    with pytest.raises(UserError, match=r"3 or more in all.* found 2"):
        prune(short, random_scores(short, PruneConfig()), PruneConfig())


def test_a_tower_that_is_not_there_is_refused(pupil: TinyPolicy) -> None:
    with pytest.raises(UserError, match=r"prune\.tower decoder, .*found expert"):
        prune(pupil, [], PruneConfig(tower="expert"))


def test_random_control_is_reproducible_by_seed(pupil: TinyPolicy) -> None:
    def flat(scores: list[Scores]) -> Tensor:
        return torch.cat([torch.cat([score.heads, score.channels]) for score in scores])

    before = torch.get_rng_state()
    first, again, other = (flat(random_scores(pupil, PruneConfig(seed=seed))) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)  # and draws nothing from anybody else's stream
