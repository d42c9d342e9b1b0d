"""From ratios and targets to shapes: widths, what stays, rankings by hand, and targets that are met and no more."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlrc.artifact import LayerSpec, PolicySpec, TowerSpec
from rlrc.compressor.models.coupling import Group, find_groups
from rlrc.compressor.models.meta import build_on_meta
from rlrc.compressor.models.weights import count_parameters
from rlrc.compressor.prune import cost
from rlrc.compressor.prune.allocation import (
    PruneScope,
    allocate_by_score,
    allocate_by_sensitivity,
    allocate_uniformly,
    read_sensitivity,
)
from rlrc.compressor.prune.importance import Scores, score_parts
from rlrc.compressor.prune.prune import PruneConfig, check, prune
from rlrc.compressor.prune.sensitivity_report import SensitivityReport, SensitivityRow
from rlrc.compressor.prune.targets import build_target, choose_shape
from rlrc.compressor.stages import reference
from rlrc.errors import UserError
from rlrc.strict import encode

SPEC = reference.policy_spec()
VISION = TowerSpec(32, (LayerSpec(2, 2, 16, 32),))


def decoder(*layers: LayerSpec, **settings: Any) -> list[LayerSpec]:
    """What is left of them."""
    towers = {"vision": VISION, "decoder": TowerSpec(256, layers)}
    policy, config = build_on_meta(SPEC, towers), PruneConfig(score="random", **settings)
    return list(choose_shape(policy, "decoder", None, build_target(policy, config), config)["decoder"].layers)


@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.37, 0.5, 0.77, 0.9, 0.94])
def test_widths_stay_whole_groups_of_32(ratio: float) -> None:
    layers = decoder(*reference.towers()["decoder"].layers, ratio=ratio)
    assert {(layer.mlp % 32, layer.heads == layer.kv_heads, layer.head_dim) for layer in layers} == {(0, True, 32)}
    assert layers[1].mlp >= 32
    assert layers[1].heads >= 1
    assert abs(layers[1].mlp - 640 * (1 - ratio)) <= 32
    assert abs(layers[1].heads - 10 * (1 - ratio)) <= 1


def test_reference_policy_at_the_operating_point() -> None:
    layers = decoder(*reference.towers()["decoder"].layers)
    assert layers[0] == layers[-1] == LayerSpec(10, 10, 32, 640)
    assert set(layers[1:-1]) == {LayerSpec(1, 1, 32, 64)}


def test_a_block_narrower_than_a_group_keeps_its_width() -> None:
    narrow = LayerSpec(2, 2, 8, 56)
    assert decoder(narrow, keep=0, ratio=0.01) == [narrow]  # not 64
    assert decoder(narrow, keep=0, ratio=0.7) == [LayerSpec(1, 1, 8, 32)]
    assert decoder(replace(narrow, mlp=24), keep=0, ratio=0.5)[0].mlp == 12  # no whole group is lost by this


def test_heads_whose_columns_would_leave_the_grid_go_in_lots() -> None:
    """SigLIP's 16 heads of 72: of 4, 8 or 12 heads the columns of the next layer are whole groups of 32."""
    siglip = LayerSpec(16, 16, 72, 4304)
    for ratio, heads in ((0.1, 16), (0.2, 12), (0.5, 8), (0.9, 4)):
        assert decoder(siglip, keep=0, ratio=ratio)[0].heads == heads
    k_quants = decoder(LayerSpec(8, 8, 64, 1024), keep=0, ratio=0.4, align=256)
    assert k_quants == [LayerSpec(4, 4, 64, 512)]  # 4 * 64 = 256


def test_keys_that_another_tower_reads_stay() -> None:
    """A flow policy's prefix and expert stand side by side in attention; only a cross block's keys are its own."""
    own = LayerSpec(4, 4, 8, 64)
    tower = TowerSpec(16, (own, replace(own, kind="cross"), replace(own, heads=8), replace(own, kind="half")))
    towers = {"decoder": tower, "expert": tower, "vision": TowerSpec(16, (own,))}

    def left(name: str, block: int, ratio: float) -> list[int]:
        return [group.count_left(ratio) for group in find_groups(towers, name, block, ())]

    assert left("expert", 0, 0.5) == [4, 32]  # a query head for each of the keys' remains
    assert left("expert", 1, 0.5) == [2, 32]
    assert left("expert", 2, 0.5) == [4, 32]
    assert left("expert", 3, 0.5) == [0, 0]
    assert left("decoder", 1, 0.5) == [4, 32]  # the expert reads these
    assert left("vision", 0, 0.5) == [2, 32]


def test_rest_of_a_tower_is_kept() -> None:
    tower = TowerSpec(16, (LayerSpec(2, 2, 8, 64),) * 3, 1e-6, "gelu-tanh", 500.0, norm_offset=1.0)
    policy, config = build_on_meta(SPEC, {"vision": VISION, "decoder": tower}), PruneConfig(0.5)
    after = choose_shape(policy, "decoder", None, None, config)
    assert after["decoder"] == replace(tower, layers=after["decoder"].layers)
    assert after["decoder"].layers[1] == LayerSpec(1, 1, 8, 32)
    assert after["vision"] == VISION


def test_how_many_blocks_stay_whole() -> None:
    towers = reference.towers()
    whole = towers["decoder"].layers
    for keep in (0, 1, 3):
        layers = decoder(*whole, keep=keep)
        assert [layer == whole[0] for layer in layers] == [i < keep or i >= 12 - keep for i in range(12)]
    with pytest.raises(UserError, match=r"13 or more in all.* found 12 blocks; .*--keep"):
        decoder(*whole, keep=6)


def place(*layers: LayerSpec, align: int = 32) -> PruneScope:
    towers = {"vision": VISION, "decoder": TowerSpec(64, layers)}
    return PruneScope(build_on_meta(SPEC, towers), "decoder", range(len(layers)), align)


def test_ranking_by_hand() -> None:
    """Width 64. A head has 4 * 64 * 32 = 8192 weights, 32 channels 3 * 64 * 32 = 6144. The first of each two may go.

    Per 1000 weights the first block's are .244 (head) and .488 (channels); the second's .391 and 1.302, but its mean is
    four times as large (80 and 20 in all), so they count half: .195 and .651.
    """
    channels = torch.cat([torch.full((32,), 9 / 32), torch.full((32,), 3 / 32)])
    others = torch.cat([torch.full((32,), 8 / 32), torch.full((32,), 32 / 32)])
    found = [Scores(torch.tensor([6.0, 2.0]), channels), Scores(torch.tensor([36.8, 3.2]), others)]
    whole = LayerSpec(2, 2, 32, 64)
    shape = allocate_by_score(place(whole, whole), found)
    removable = 2 * (8192 + 6144)
    order = [(1, LayerSpec(1, 1, 32, 64)), (0, LayerSpec(1, 1, 32, 64)), (0, LayerSpec(1, 1, 32, 32))]
    gone, expected = 0, [whole, whole]
    for (block, after), size in zip(order, (8192, 8192, 6144), strict=True):
        gone, expected[block] = gone + size, after
        assert list(shape(gone / removable)["decoder"].layers) == expected
    assert shape(1.0)["decoder"].layers == (LayerSpec(1, 1, 32, 32),) * 2
    assert shape(0.0)["decoder"].layers == (whole, whole)


def test_ranking_takes_a_head_from_every_bundle_and_first_fills_up_to_whole_runs() -> None:
    shared = LayerSpec(6, 2, 32, 80)
    found = [Scores(torch.tensor([5.0, 1, 3, 1, 9, 9]), torch.full((80,), 100.0))]
    shape = allocate_by_score(place(shared), found)
    counts = [(shape(x / 100)["decoder"].layers[0].heads, shape(x / 100)["decoder"].layers[0].mlp) for x in range(101)]
    assert sorted(set(counts), reverse=True) == [(6, 80), (4, 80), (2, 80), (2, 64), (2, 32)]


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.8])
def test_global_has_as_many_parameters_as_uniform(pupil: Any, ratio: float) -> None:
    sizes = {}
    for allocation in ("uniform", "global"):
        config = PruneConfig(ratio, "random", allocation=allocation)
        found = score_parts(pupil, "decoder", range(1, 3), config)
        towers = choose_shape(pupil, "decoder", found, None, config)
        sizes[allocation] = count_parameters(build_on_meta(pupil.spec, towers))
        assert towers["decoder"].layers[0] == pupil.towers["decoder"].layers[0]
    whole = count_parameters(pupil)
    assert sizes["global"] <= sizes["uniform"] < whole
    assert sizes["uniform"] - sizes["global"] < 4 * 64 * 32  # less than a head


def test_errors_by_hand() -> None:
    """Ratios are inversely proportional to errors: 1 to 2 to 4, the last one at most 1."""
    layer = LayerSpec(10, 10, 32, 640)
    shape = allocate_by_sensitivity(place(layer, layer, layer), {0: 0.4, 1: 0.2, 2: 0.1})
    assert [layer.heads for layer in shape(0.2)["decoder"].layers] == [8, 6, 2]
    assert [layer.mlp for layer in shape(0.2)["decoder"].layers] == [512, 384, 128]
    assert [layer.heads for layer in shape(0.4)["decoder"].layers] == [6, 2, 1]
    equal = allocate_by_sensitivity(place(layer, layer), {0: 0.3, 1: 0.3})
    assert equal(0.37) == allocate_uniformly(place(layer, layer))(0.37)


def test_an_error_of_zero_does_not_take_all(tmp_path: Path) -> None:
    layer = LayerSpec(10, 10, 32, 640)
    shape = allocate_by_sensitivity(place(layer, layer), {0: 0.0, 1: 0.2})
    assert shape(0.0)["decoder"].layers == (layer, layer)


def test_a_report_of_errors_steers(pupil: Any, tmp_path: Path) -> None:
    file = tmp_path / "errors.json"
    errors = enumerate((9.0, 0.15, 0.3, 9.0))
    rows = tuple(SensitivityRow(f"decoder.layers.{i}", "prune", error, 10) for i, error in errors)
    rows += (SensitivityRow("decoder.layers.1.mlp", "quantize", 7.0, 10),)
    report = SensitivityReport("sensitivity", "somewhere", None, 0.5, 4, 8, rows)
    file.write_text(json.dumps(encode(report)))
    assert read_sensitivity(file, "decoder", (1, 2)) == {1: 0.15, 2: 0.3}
    with pytest.raises(UserError, match=r"expected decoder\.layers\.4 in .*errors\.json, found none"):
        read_sensitivity(file, "decoder", (1, 4))
    config = PruneConfig(0.5, "magnitude", allocation="sensitivity", sensitivity=str(file))
    first, second = prune(pupil, config)[0].towers["decoder"].layers[1:3]
    assert first.mlp < second.mlp < 128
    for content in ("nothing", '{"module": 1}', '[{"module": "decoder.layers.1", "error": 1}]'):
        file.write_text(content)
        with pytest.raises(UserError, match=r"found.* in .*errors\.json"):
            prune(pupil, config)


# Targets


def policy() -> tuple[PolicySpec, dict[str, TowerSpec]]:
    return SPEC, dict(reference.towers())


COSTS: dict[str, Callable[[dict[str, TowerSpec]], float]] = {
    "to_bytes": lambda towers: cost.weight_bytes(build_on_meta(SPEC, towers)),
    "to_latency": lambda towers: (
        cost.decision_cost(build_on_meta(SPEC, towers)) / cost.decision_cost(build_on_meta(SPEC, reference.towers()))
    ),
    "tower": lambda towers: (
        count_parameters(build_on_meta(SPEC, towers), "decoder.")
        / count_parameters(build_on_meta(SPEC, reference.towers()), "decoder.")
    ),
    "whole": lambda towers: (
        count_parameters(build_on_meta(SPEC, towers)) / count_parameters(build_on_meta(SPEC, reference.towers()))
    ),
}


@pytest.mark.parametrize(
    ("of", "settings", "limit"),
    [
        ("to_bytes", {"to_bytes": "3MB"}, 3e6),
        ("to_bytes", {"to_bytes": "2.5MiB"}, 2.5 * 2**20),
        ("to_latency", {"to_latency": "0.5x"}, 0.5),
        ("to_bytes", {"to_bytes": "2.5MB", "to_latency": "0.6x"}, 2.5e6),  # the other limit is looser
        ("to_latency", {"to_bytes": "5MB", "to_latency": "0.4x"}, 0.4),
        ("tower", {"scope": "tower", "ratio": 0.6}, 0.4),
        ("whole", {"scope": "whole", "ratio": 0.7}, 0.3),
    ],
)
def test_a_target_is_met_and_no_more(of: str, settings: dict[str, Any], limit: float) -> None:
    spec, towers = policy()
    dense, config = build_on_meta(spec, towers), PruneConfig(**settings)
    after = choose_shape(dense, "decoder", None, build_target(dense, config), config)
    assert COSTS[of](after) <= limit
    inner = after["decoder"].layers[1]
    assert set(after["decoder"].layers[1:-1]) == {inner}
    more = replace(after["decoder"], layers=tuple(_wider(layer) for layer in after["decoder"].layers))
    assert COSTS[of](after | {"decoder": more}) > limit


def _wider(layer: LayerSpec) -> LayerSpec:
    """One head more, and 64 channels: the ratio's two roundings may fall together."""
    heads = min(layer.heads + 1, 10)
    return replace(layer, heads=heads, kv_heads=heads, mlp=min(layer.mlp + 64, 640))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to_bytes": "10kB"}, r"prune\.to_bytes of 1,\d\d\d,\d\d\d bytes in int4 or more.*found 10,000 bytes in int4"),
        (
            {"to_bytes": "2GB"},
            r"prune\.to_bytes below 6,\d\d\d,\d\d\d bytes in int4, which the unpruned policy has.*2,000,000,000 bytes",
        ),
        ({"to_latency": "0.1x"}, r"prune\.to_latency of 0\.\d\d\dx or more.*found 0\.100x"),
        (
            {"scope": "whole", "ratio": 0.95},
            r"rest \(1 - prune\.ratio\) of the whole's .* of 0\.\d+ or more.*0\.050",
        ),
        (
            {"kind": "depth", "to_bytes": "10kB"},
            r"prune\.to_bytes of 1,\d\d\d,\d\d\d bytes in int4 or more.*no intermediate",
        ),
        ({"kind": "depth", "drop": 11}, r"1 to 10 of the decoder's blocks, found 11"),
        ({"kind": "depth", "ratio": 0.01}, r"1 to 10 of the decoder's blocks, found 0"),
        ({"kind": "both", "blocks": (12,)}, r"prune\.blocks from 0 to 11 of the decoder, found 12"),
    ],
)
def test_impossible_targets_are_refused_before_any_weights_are_read(settings: dict[str, Any], message: str) -> None:
    spec, towers = policy()
    with pytest.raises(UserError, match=message) as error:
        check(spec, towers, PruneConfig(**settings))
    assert "\n" not in str(error.value)


def test_group_has_lots_only_where_it_has_several() -> None:
    assert Group((), (), 64, multiple=32).count_left(0.9) == 32
    assert Group((), (), 12, size=16, kv_groups=3, multiple=2).count_left(0.4) == 6
    assert Group((), (), 0).count_left(0.5) == 0
