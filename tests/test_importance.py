"""What heads, channels and blocks are worth: scores by hand, by autograd, and in little memory."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlrc.artifact import LayerSpec, TowerSpec
from rlrc.compressor.models.coupling import Group, find_groups
from rlrc.compressor.models.tiny import TinyPolicy
from rlrc.compressor.prune import importance
from rlrc.compressor.prune.importance import Scores, score_parts
from rlrc.compressor.prune.prune import PruneConfig
from rlrc.compressor.rl.demonstrations import SampleBatches, Samples
from rlrc.compressor.training.losses import SMOOTHING, smoothed_cross_entropy

INNER = range(1, 3)


def samples(policy: TinyPolicy, number: int) -> Samples:
    random, action = np.random.default_rng(0), policy.spec.action
    size = policy.spec.cameras[0].height
    return Samples(
        random.integers(0, 256, (number, size, size, 3), np.uint8),
        random.normal(size=(number, 7)).astype(np.float32),
        random.integers(0, 13, number),
        random.uniform(-1, 1, (number, action.horizon, action.dim)).astype(np.float32),
    )


def batches(policy: TinyPolicy, number: int = 40) -> SampleBatches:
    """The same ones at every call."""
    ids = np.random.default_rng(0).integers(0, 7, (13, 6))
    return SampleBatches(samples(policy, number), policy.spec, ids, 5)


def summed(group: Group, importance: dict[str, Any]) -> list[float]:
    return sum(group.sum_parts(layer, torch.tensor(importance[layer]).float()) for layer in group.layers).tolist()


def test_sums_by_hand() -> None:
    """Two heads of two dimensions and two channels on a residual stream of one: sums over their rows and columns."""
    importance = {
        "b.layers.0.attention.q": [[1], [2], [3], [4]],  # head 0: 1 + 2, head 1: 3 + 4
        "b.layers.0.attention.k": [[1], [0], [0], [1]],  # 1, 1
        "b.layers.0.attention.v": [[0], [0], [2], [2]],  # 0, 4
        "b.layers.0.attention.o": [[2, 2, 0, 6]],  # 4, 6
        "b.layers.0.mlp.gate": [[1], [2]],  # channel 0: 1, channel 1: 2
        "b.layers.0.mlp.up": [[0], [3]],  # 0, 3
        "b.layers.0.mlp.down": [[2, 0]],  # 2, 0
    }
    names = {f"{name}.weight" for name in importance}
    heads, channels = find_groups({"b": TowerSpec(1, (LayerSpec(2, 2, 2, 2),))}, "b", 0, names)
    assert summed(heads, importance) == [8, 18]
    assert summed(channels, importance) == [3, 5]
    shared, _ = find_groups(
        {"b": TowerSpec(1, (LayerSpec(2, 1, 2, 2),))}, "b", 0, names
    )  # one key head of both: not theirs
    assert summed(shared, importance) == [7, 13]
    _, plain = find_groups(
        {"b": TowerSpec(1, (LayerSpec(2, 2, 2, 2),))}, "b", 0, names - {"b.layers.0.mlp.gate.weight"}
    )
    assert summed(plain, importance) == [2, 3]


def test_sums_of_a_fused_layer_by_hand() -> None:
    """q, k and v of two heads of two dimensions in one layer: rows 0, 1 of each third are head 0."""
    vision = {"vision": TowerSpec(1, (LayerSpec(2, 2, 2, 1),))}
    heads, _ = find_groups(vision, "vision", 0, {"vision.layers.0.attention.qkv.weight"})
    fused = {heads.rows[0]: [[1], [2], [10], [20], [3], [4], [30], [40], [5], [6], [50], [60]]}
    assert summed(heads, fused | {heads.columns[0]: [[100, 100, 0, 0]]}) == [221, 210]
    assert heads.indices(torch.tensor([1]), fused=3).tolist() == [2, 3, 6, 7, 10, 11]
    assert heads.indices(torch.tensor([1])).tolist() == [2, 3]


def test_magnitude_is_the_sum_of_absolute_weights(pupil: TinyPolicy) -> None:
    found = score_parts(pupil, "decoder", INNER, PruneConfig(score="magnitude"))
    mlp = pupil.decoder.blocks()[2].mlp
    expected = mlp.gate.weight.abs().sum(1) + mlp.up.weight.abs().sum(1) + mlp.down.weight.abs().sum(0)
    torch.testing.assert_close(found[2].channels, expected.detach())
    assert found[2].heads.shape == (4,)
    assert not found[0].heads.any()  # it stays whole: nobody asks


def test_taylor_is_the_mean_over_batches_of_weight_times_gradient(pupil: TinyPolicy) -> None:
    found = score_parts(pupil, "decoder", INNER, PruneConfig(batches=3), batches(pupil))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in pupil.parameters())

    same, heads, channels = batches(pupil), torch.zeros(4), torch.zeros(128)
    block = pupil.decoder.blocks()[1]
    down, o = block.mlp.down.weight, block.attention.o.weight
    gate, up, q, k, v = (
        m.weight for m in (block.mlp.gate, block.mlp.up, *(getattr(block.attention, n) for n in "qkv"))
    )
    for _ in range(3):
        batch = same.draw(64)
        logits = pupil(batch.inputs.pixels[0], batch.inputs.ids, batch.inputs.state)
        loss = smoothed_cross_entropy(logits, batch.actions, SMOOTHING).mean()
        gradients = torch.autograd.grad(loss, [gate, up, q, k, v, down, o])
        rows = [(w * g).abs().sum(1) for w, g in zip([gate, up, q, k, v], gradients[:5], strict=True)]
        channels += (rows[0] + rows[1] + (down * gradients[5]).abs().sum(0)).detach() / 3
        by_row = rows[2] + rows[3] + rows[4] + (o * gradients[6]).abs().sum(0)
        heads += by_row.detach().reshape(4, 32).sum(1) / 3
    torch.testing.assert_close(found[1].channels, channels, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(found[1].heads, heads, rtol=1e-3, atol=1e-9)
    assert found[1].channels.std() > 0


def test_gradients_are_not_kept(pupil: TinyPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, sums = list[int](), Group.sum_parts

    def counted(group: Group, layer: str, importance: Tensor) -> Tensor:
        alive.append(sum(parameter.grad is not None for parameter in pupil.parameters()))
        return sums(group, layer, importance)

    monkeypatch.setattr(Group, "sum_parts", counted)
    score_parts(pupil, "decoder", INNER, PruneConfig(batches=2), batches(pupil))
    assert alive == [0] * 2 * 2 * 7  # batches, blocks, layers


def test_a_silent_head_and_a_silent_channel_go_first(pupil: TinyPolicy) -> None:
    """What the loss does not depend on has no gradient, so its score is zero."""
    block = pupil.decoder.blocks()[1]
    block.attention.o.weight.data[:, 64:96] = 0  # head 2
    block.attention.v.weight.data[64:96] = 0
    block.mlp.down.weight.data[:, 17] = 0
    block.mlp.up.weight.data[17] = 0
    found = score_parts(pupil, "decoder", INNER, PruneConfig(batches=1), batches(pupil))
    assert found[1].heads.argmin() == 2
    assert found[1].heads[2] == 0
    assert found[1].channels.argmin() == 17
    assert found[1].channels[17] == 0


def test_wanda_is_the_weight_times_the_norm_of_its_input(pupil: TinyPolicy) -> None:
    found = score_parts(pupil, "decoder", INNER, PruneConfig(score="wanda", batches=2), batches(pupil))
    block, seen = pupil.decoder.blocks()[2], {name: list[Tensor]() for name in ("gate", "down")}
    hooks = [
        getattr(block.mlp, name).register_forward_hook(lambda m, x, y, name=name: seen[name].append(x[0].flatten(0, 1)))
        for name in seen
    ]
    same = batches(pupil)
    with torch.no_grad():
        for _ in range(2):
            batch = same.draw(64)
            pupil(batch.inputs.pixels[0], batch.inputs.ids, batch.inputs.state)
    for hook in hooks:
        hook.remove()
    read, made = (torch.cat(seen[name]).norm(dim=0) for name in ("gate", "down"))
    gate, up, down = (getattr(block.mlp, name).weight.detach().abs() for name in ("gate", "up", "down"))
    expected = (gate * read).sum(1) + (up * read).sum(1) + (down * made).sum(0)
    torch.testing.assert_close(found[2].channels, expected, rtol=1e-4, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in pupil.modules())


def test_kept_parts_stay_in_their_order() -> None:
    values = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.95, 0.2])
    assert Group((), (), 6).select_best(values, 3).tolist() == [1, 3, 4]
    assert Group((), (), 6, kv_groups=3).select_best(values, 3).tolist() == [1, 3, 4]  # one of each pair
    assert Group((), (), 6, kv_groups=2).select_best(values, 4).tolist() == [1, 2, 3, 4]  # two of three


@pytest.mark.parametrize("score", ["taylor", "wanda"])
def test_noise_is_drawn_from_the_seed(pupil: TinyPolicy, monkeypatch: pytest.MonkeyPatch, score: Any) -> None:
    drawn = list[float]()
    monkeypatch.setattr(importance, "draw_noise", lambda _, batch: (drawn.append(float(torch.rand(()))), batch)[1])
    for seed in (0, 0, 1):
        config = PruneConfig(score=score, batches=2, batch=4, seed=seed)
        score_parts(pupil, "decoder", INNER, config, batches(pupil))
    assert drawn[:2] == drawn[2:4]
    assert len(set(drawn)) == 4


def test_random_control_is_reproducible_by_seed(pupil: TinyPolicy) -> None:
    def flat(found: list[Scores]) -> Tensor:
        return torch.cat([torch.cat(score.each()) for score in found])

    before = torch.get_rng_state()
    first, again, other = (
        flat(score_parts(pupil, "decoder", INNER, PruneConfig(score="random", seed=seed))) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)  # and draws nothing from anybody else's stream


SCORE = """
import resource, torch
from rlrc.artifact import LayerSpec, TowerSpec
from rlrc.compressor.stages import reference
from rlrc.compressor.models.tiny import TinyPolicy
from rlrc.compressor.training.batches import Batch
from rlrc.compressor.prune.importance import score_parts
from rlrc.compressor.models.policy import Inputs
from rlrc.compressor.prune.prune import PruneConfig

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

class Random:
    def draw(self, size):
        inputs = Inputs([torch.randn(size, 64, 64, 3)], torch.ones(size, 6, dtype=torch.long), torch.randn(size, 7))
        return Batch(inputs, torch.rand(size, 5, 4) * 2 - 1)

def policy(layers, width):
    towers = {"vision": TowerSpec(32, (LayerSpec(2, 2, 16, 32),)), "decoder": TowerSpec(width, layers)}
    with torch.device("meta"):
        made = TinyPolicy(reference.policy_spec(size=64), towers)
    made.to_empty(device="cpu")
    for parameter in made.parameters():
        torch.nn.init.uniform_(parameter.data, -0.02, 0.02)
    return made

config = PruneConfig(batches=2, batch=2)
score_parts(policy((LayerSpec(2, 2, 32, 64),) * 3, 64), "decoder", range(1, 2), config, Random())  # torch's own memory
start = peak()
made = policy((LayerSpec(32, 4, 64, 5632),) * 22, 2048)  # TinyLlama's
weights = sum(parameter.nbytes for parameter in made.decoder.parameters())
found = score_parts(made, "decoder", range(1, 21), config, Random())
assert all((score.channels > 0).all() for score in found[1:21])
print(weights, peak() - start)
"""


@pytest.mark.slow
def test_a_decoder_of_a_billion_parameters_is_scored_in_little_more_than_its_weights() -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", SCORE], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    weights, peak = map(int, done.stdout.split())
    assert weights == 4 * 968_976_384
    assert peak < 1.6 * weights, f"{peak / weights:.2f} times its weights"
    print(f"peak {peak / 1e9:.2f} GB, {peak / weights:.3f} times the weights")
