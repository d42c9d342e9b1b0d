"""What a decision computes and moves: tiny geometries by hand, the official ones against torch's own count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlrc import artifact as artifacts
from rlrc.artifact import LayerSpec, Manifest, TowerSpec, geometries
from rlrc.compressor.checkpoints import reader
from rlrc.errors import UserError
from rlrc.jetson.model import operations
from rlrc.jetson.model.work import DecisionWork, Load, work


def work_of(name: str, **load: Any) -> DecisionWork:
    known = geometries.geometry(name)
    return work(known.policy, known.towers, Load(**load))


def test_a_linear_layer_by_hand() -> None:
    op = operations.linear(rows=3, inputs=4, outputs=5)
    assert (op.flops, op.weights, op.activations, op.kernels) == (120, 20, 27, 1)  # 3*4*5 multiply-adds; 3*(4+5)
    assert op.side == pytest.approx(60 ** (1 / 3))


def test_attention_by_hand() -> None:
    """Two queries over three keys, four heads of 8 that share two key/value heads."""
    op = operations.attention(LayerSpec(4, 2, 8, 0), rows=2, keys=3)
    assert op.flops == 2 * (2 * 3 * 8 * 4) * 2  # scores and mixture: 2 * rows * keys * head_dim * heads each
    assert op.activations == 2 * (2 * 4 * 8) + 2 * (3 * 2 * 8)  # queries in, mixture out; keys and values in
    assert op.weights == 0


def test_a_decoder_block_by_hand() -> None:
    """Width 8, two heads of 4 on one key/value head, MLP 16; five rows, of which one goes on."""
    tower, layer = TowerSpec(8, ()), LayerSpec(2, 1, 4, 16)
    ops = list(operations.decoder_block(tower, layer, rows=5, keys=5, keep=5))
    norms, qkv, o, mlp = 2 * 8, 8 * (8 + 4 + 4), 8 * 8, 3 * 8 * 16
    assert sum(op.weights for op in ops) == norms + qkv + o + mlp
    products = [op for op in ops if op.side]
    assert sum(op.flops for op in products) == 2 * 5 * (qkv + o + mlp) + 4 * (5 * 8) * 5
    last = [op for op in operations.decoder_block(tower, layer, rows=5, keys=5, keep=1) if op.side]
    # Keys and values of all rows; queries, attention and what follows of one.
    assert sum(op.flops for op in last) == 2 * (5 * 64 + 64 + o + mlp) + 4 * 8 * 5
    assert sum(op.weights for op in last) == qkv + o + mlp


def test_half_and_cross_blocks_by_hand() -> None:
    tower = TowerSpec(8, ())
    half = list(operations.decoder_block(tower, LayerSpec(2, 1, 4, 16, "half"), 5, 5, 5))
    assert sum(op.weights for op in half) == 8 + 8 * 8  # the norm, keys and values
    cross = list(operations.decoder_block(tower, LayerSpec(2, 1, 4, 0, "cross"), 3, 7, 3, source=6))
    assert sum(op.weights for op in cross) == 8 + 8 * 8 + 2 * 6 * 4 + 8 * 8  # norm, q, k and v of the prefix, o
    assert sum(op.flops for op in cross if op.side) == 2 * (3 * 64 + 2 * 7 * 24 + 3 * 64) + 4 * (3 * 8) * 7


def test_blocks_cut_to_nothing_cost_nothing() -> None:
    tower = TowerSpec(8, ())
    ops = list(operations.decoder_block(tower, LayerSpec(0, 0, 4, 0), 5, 5, 5))
    assert not any(op.side for op in ops)
    assert list(operations.vision_block(tower, LayerSpec(0, 0, 4, 0), 5, 1)) == []


def test_a_resnet_halves_its_pictures() -> None:
    geometry = geometries.geometry("act").policy.geometry
    ops, size = operations.resnet(geometry, 480, 640)
    assert size == (15, 20)
    # torchvision's count for ResNet-18 at 224 pixels is 1.81e9 multiply-adds, its classifier's 0.5e6 among them.
    ops, size = operations.resnet(geometry, 224, 224)
    assert size == (7, 7)
    assert sum(op.flops for op in ops if op.side) / 2 == pytest.approx(1.814e9, rel=0.01)


@pytest.mark.parametrize("name", geometries.load_geometries())
def test_stored_numbers_are_the_policys_parameters(name: str) -> None:
    """Biases and single vectors are left out: less than half a hundredth."""
    parameters = sum(geometries.geometry(name).modules.values())
    assert sum(part.stored for part in work_of(name).parts) == pytest.approx(parameters, rel=5e-3)


SLOW = ("openvla-7b", "pi0")  # the others have the same forms of blocks


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in geometries.load_geometries()]
)
def test_multiply_adds_are_those_that_torch_counts(name: str) -> None:
    """Products, attention and convolutions on the meta device."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from rlrc.compressor.checkpoints import geometry
    from rlrc.compressor.prune import cost

    folder, options = geometry.folder(name)
    layout = reader.layout(folder, options)
    policy = reader.build(layout).eval()
    load = Load(prompt_tokens=cost.PROMPT) if layout.spec.prompt else Load()  # the cost model's has no state in it
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cost.decision_cost(policy)
    counted = counter.get_total_flops()
    parts = work(layout.spec, layout.towers, load).parts
    products = {part.name: part.times * sum(op.flops for op in part.ops if op.side) for part in parts}
    # cost.decision_cost runs a decode or flow step once and multiplies; so the counter sees it once.
    once = {part.name: products[part.name] / part.times for part in parts}
    assert sum(once.values()) == pytest.approx(counted, rel=0.03)


def test_the_file_of_geometries_is_what_the_readers_find() -> None:
    pytest.importorskip("torch")
    from rlrc.compressor.checkpoints import geometry
    from rlrc.strict import encode

    for name in geometry.GEOMETRIES:
        known = geometries.geometry(name)
        assert encode(known) == geometry.describe_geometry(name), "run python -m rlrc.compressor.checkpoints.geometry"
    assert set(geometries.load_geometries()) == set(geometry.GEOMETRIES)


def test_what_a_decision_is_given_changes_its_work() -> None:
    whole, two = work_of("pi0"), work_of("pi0", cameras=2)
    assert two.parts[0].flops == pytest.approx(whole.parts[0].flops * 2 / 3)
    assert two.cached < whole.cached
    assert work_of("pi0", steps=5).parts[2].flops == whole.parts[2].flops / 2
    assert work_of("openvla-7b", prompt_tokens=64).parts[1].flops > work_of("openvla-7b").parts[1].flops
    assert "160 prompt tokens, 128 of them for the state" in work_of("pi05").assumptions[1]


@pytest.mark.parametrize(
    ("name", "load", "message"),
    [
        ("openvla-7b", {"cameras": 2}, "expected one camera for family openvla, found 2"),
        ("openvla-7b", {"steps": 3}, "expected no steps for autoregressive decoding, found 3"),
        ("pi0", {"cameras": 0}, "expected one or more cameras, found 0"),
        ("pi0", {"prompt_tokens": -1}, "expected one or more prompt tokens, found -1"),
    ],
)
def test_impossible_decisions_are_refused(name: str, load: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        work_of(name, **load)


def test_the_reference_family_and_unknown_ones(tiny_manifest: Manifest, tiny_artifact: Path) -> None:
    parts = work(tiny_manifest.policy, tiny_manifest.towers).parts
    assert [part.name for part in parts] == ["vision", "prefill", "head"]
    # Of these small layers biases, positions and queries are a few hundredths.
    parameters = artifacts.load(tiny_artifact).manifest.parameters
    assert sum(part.stored for part in parts) == pytest.approx(parameters, rel=0.03)
    with pytest.raises(UserError, match=r"expected one of the families tiny, .*, found 'other'"):
        work(replace(tiny_manifest.policy, family="other"), tiny_manifest.towers)


def test_earlier_names_of_geometries_are_accepted() -> None:
    assert geometries.geometry("smolvla") is geometries.geometry("smolvla-450m")


def test_unknown_geometries_are_refused() -> None:
    with pytest.raises(UserError, match="found 'pi5'; the nearest is pi"):
        geometries.geometry("pi5")
