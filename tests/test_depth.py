"""Whole blocks: the policy without them is the dense one whose blocks let the stream pass; and which go together."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import nn

from rlrc.artifact import LayerSpec, TowerSpec
from rlrc.compressor.models.policy import PolicyModule
from rlrc.compressor.models.tiny import TinyPolicy
from rlrc.compressor.prune.depth import (
    drop_blocks,
    drop_from_towers,
    droppable_units,
    find_unit,
    find_units,
    remaining_blocks,
)
from rlrc.compressor.prune.prune import PruneConfig, prune
from rlrc.errors import UserError

BLOCK = LayerSpec(2, 1, 8, 32)


def tower(*layers: LayerSpec) -> TowerSpec:
    return TowerSpec(16, layers)


@contextmanager
def skipping(policy: PolicyModule, gone: list[Any]) -> Iterator[PolicyModule]:
    """The policy while these blocks return what they are given (and the keys and values that nobody will read)."""

    def same(module: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> Any:
        return (inputs[0], outputs[1]) if isinstance(outputs, tuple) else inputs[0]

    names = [f"{tower}.layers.{i}" for unit in gone for tower, blocks in unit.items() for i in blocks]
    hooks = [policy.get_submodule(name).register_forward_hook(same) for name in names]
    try:
        yield policy
    finally:
        for hook in hooks:
            hook.remove()


def test_dropped_equals_silenced(pupil: TinyPolicy) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in pupil.decoder.parameters():
        if parameter.ndim == 2:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    silent = copy.deepcopy(pupil)
    for i in (1, 2):
        silent.decoder.blocks()[i].attention.o.weight.data.zero_()
        silent.decoder.blocks()[i].mlp.down.weight.data.zero_()
    weights, report = prune(pupil, PruneConfig(kind="depth", drop=2, score="random"))
    pruned = cast(Any, weights.build())
    assert len(pruned.towers["decoder"].layers) == len(cast(Any, pruned.decoder.layers)) == 2
    given = (torch.randn(3, 32, 32, 3), torch.randint(0, 7, (3, 6)), torch.randn(3, 7))
    with torch.no_grad():
        torch.testing.assert_close(pruned(*given), silent(*given), atol=1e-5, rtol=1e-5)
        with skipping(pupil, [{"decoder": (1, 2)}]):
            assert torch.equal(pruned(*given), pupil(*given))
        assert (pruned(*given) - pupil(*given)).abs().max() > 1e-3
    assert report["dropped"] == {"decoder": [1, 2]}
    assert [layer["parameters"] for layer in report["layers"]] == [0, 1, 1, 0]
    assert report["intermediate"] == 1
    again = prune(pupil, PruneConfig(0.99, kind="depth", score="random"))[0]  # nearly all of two
    assert again.towers == pruned.towers


def test_the_least_important_block_goes_first(pupil: TinyPolicy) -> None:
    block = pupil.decoder.blocks()[2]
    block.attention.o.weight.data.mul_(1e-3)
    block.mlp.down.weight.data.mul_(1e-3)
    block.mlp.gate.weight.data.mul_(1e-3)
    config = PruneConfig(kind="depth", drop=1, score="magnitude")
    assert prune(pupil, config)[1]["dropped"] == {"decoder": [2]}


def test_as_many_blocks_as_a_target_takes(pupil: TinyPolicy) -> None:
    """Of four equal blocks and a little more, dropping one leaves just above 3/4 of the decoder's parameters."""
    for ratio, left in ((0.2, 3), (0.25, 2), (0.45, 2)):
        config = PruneConfig(ratio, "random", kind="depth", scope="tower")
        pruned, report = prune(pupil, config)
        assert len(pruned.towers["decoder"].layers) == left
        assert report["decoder"] >= ratio
    with pytest.raises(UserError, match=r"parameters of 0\.50\d or more, .*no intermediate block is left.* 0\.400"):
        prune(pupil, PruneConfig(0.6, "random", kind="depth", scope="tower"))


def test_a_pair_of_prefix_and_expert_goes_together() -> None:
    half = replace(BLOCK, kind="half")
    towers = {"decoder": tower(BLOCK, BLOCK, half), "expert": tower(*(BLOCK,) * 3), "vision": tower(BLOCK, BLOCK)}
    assert find_units(towers, "expert") == find_units(towers, "decoder")
    assert find_units(towers, "decoder") == [{"decoder": (i,), "expert": (i,)} for i in range(3)]
    assert droppable_units(towers, "decoder") == find_units(towers, "decoder")[:2]
    assert find_units(towers, "vision") == droppable_units(towers, "vision") == [{"vision": (0,)}, {"vision": (1,)}]
    after = drop_from_towers(towers, [find_unit(towers, "decoder", 1)])
    assert after["decoder"].layers == (BLOCK, half)
    assert len(after["expert"].layers) == 2
    assert after["vision"] == towers["vision"]
    with pytest.raises(UserError, match=r"prune\.blocks from 0 to 1 of the decoder, found 2"):
        find_unit(towers, "decoder", 2)


def test_an_expert_s_block_takes_all_of_its_prefix_along() -> None:
    """Three blocks of the expert attend to the first, third and fifth of the prefix."""
    cross = replace(BLOCK, kind="cross")
    towers = {"decoder": tower(*(BLOCK,) * 5), "expert": tower(cross, BLOCK, cross)}
    assert find_units(towers, "expert") == [
        {"decoder": (0, 1), "expert": (0,)},
        {"decoder": (2, 3), "expert": (1,)},
        {"decoder": (4,), "expert": (2,)},
    ]
    gone = [find_unit(towers, "decoder", 3)]
    after = drop_from_towers(towers, gone)
    assert remaining_blocks(towers, "decoder", gone) == [0, 1, 4]
    assert after["expert"].layers == (cross, cross)
    longer = {"decoder": tower(*(BLOCK,) * 6), "expert": towers["expert"]}  # one more that nobody attends to
    assert find_units(longer, "expert")[-1] == {"decoder": (4, 5), "expert": (2,)}
    with pytest.raises(UserError, match=r"a stride of 2 prefix blocks per expert block, found"):
        drop_from_towers(longer, find_units(longer, "expert")[:1])


def test_an_official_layer_of_act_s_decoder_is_two_blocks() -> None:
    alone, cross = replace(BLOCK, mlp=0), replace(BLOCK, kind="cross")
    towers = {"encoder": tower(BLOCK, BLOCK), "decoder": tower(alone, cross, alone, cross)}
    assert find_units(towers, "decoder") == [{"decoder": (0, 1)}, {"decoder": (2, 3)}]
    assert drop_from_towers(towers, find_units(towers, "decoder")[:1])["decoder"].layers == (alone, cross)
    with pytest.raises(UserError, match=r"at least one block left in the encoder, found none"):
        drop_from_towers(towers, find_units(towers, "encoder"))


def test_without_shares_what_stays(pupil: TinyPolicy) -> None:
    left = drop_blocks(pupil, [{"decoder": (0,)}])
    assert left.state_dict()["decoder.layers.0.mlp.up.weight"].data_ptr() == (
        pupil.decoder.blocks()[1].mlp.up.weight.data_ptr()
    )
