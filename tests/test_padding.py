"""Channels of zeros: the same actions, and rows that the grid takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlrc.compressor.checkpoints.folder import ReadOptions, open_folder, read_hints
from rlrc.compressor.checkpoints.reader import read
from rlrc.compressor.models.policy import Inputs, PolicyModule
from rlrc.compressor.quantize.padding import pad_policy, pad_towers, unpad_policy
from rlrc.compressor.quantize.quantize import QuantizeConfig, choose_bits

DATA = Path(__file__).parent / "data"


def policy_of(name: str) -> PolicyModule:
    return read(open_folder(DATA / name / "checkpoint"), ReadOptions(hints=read_hints(DATA / name / "golden.json")))[0]


def inputs_of(policy: PolicyModule) -> Inputs:
    spec, generator = policy.spec, torch.Generator().manual_seed(0)
    pixels = [torch.randn(1, c.height, c.width, len(c.mean), generator=generator) for c in spec.cameras]
    state = (
        None if spec.state is None else torch.randn(1, spec.state.width or len(spec.state.names), generator=generator)
    )
    noise = None
    if spec.flow is not None:
        noise = torch.randn(1, spec.action.horizon, spec.flow.width, generator=generator)
    return Inputs(pixels, torch.arange(3, 9)[None], state, noise=noise)


def narrow(policy: PolicyModule, channels: int) -> PolicyModule:
    """Every MLP with so many channels: none of them fills its groups."""
    from rlrc.compressor.models.families import build

    towers = {
        name: replace(tower, layers=tuple(replace(layer, mlp=channels) for layer in tower.layers))
        for name, tower in policy.towers.items()
    }
    torch.manual_seed(0)
    other = build(policy.spec, towers).eval()
    with torch.no_grad():
        for tensor in other.parameters():
            tensor.copy_(0.2 * torch.randn_like(tensor))
    return other


@pytest.mark.parametrize("name", ["openvla", "openvla-oft-l1", "pi0", "smolvla"])
def test_same_actions_and_rows_in_4_bits(name: str) -> None:
    policy = narrow(policy_of(name), 60)
    wide, report = pad_policy(policy)
    assert {layer.mlp for tower in wide.towers.values() for layer in tower.layers} == {64}
    depth = {tower: len(spec.layers) for tower, spec in policy.towers.items()}
    assert report == {"channels_of_zeros": {tower: 4 * layers for tower, layers in depth.items()}}
    with torch.no_grad():
        before, after = policy.act(inputs_of(policy)), wide.act(inputs_of(policy))
    assert torch.allclose(before.actions, after.actions, atol=1e-5, rtol=1e-5)
    down = "vision.layers.0.mlp.down.weight"
    assert down not in choose_bits(policy.state_dict(), QuantizeConfig())
    assert choose_bits(wide.state_dict(), QuantizeConfig())[down] == 4


def test_nothing_to_fill_is_the_policy_itself() -> None:
    policy = narrow(policy_of("openvla"), 64)
    assert pad_policy(policy) == (policy, {})
    assert pad_towers(policy.towers) == policy.towers


def test_what_is_far_from_filling_a_group_stays() -> None:
    policy = narrow(policy_of("openvla"), 40)
    assert pad_policy(policy) == (policy, {})


def test_larger_groups_are_filled_where_they_are_near() -> None:
    for channels, expected in ((120, 128), (90, 96), (60, 64), (40, 40)):  # 128 is 1.42 times 90, 96 is 1.07 times
        wide, _ = pad_policy(narrow(policy_of("openvla"), channels), 128)
        assert {layer.mlp for layer in wide.towers["decoder"].layers} == {expected}


@pytest.mark.parametrize(("channels", "group"), [(60, 32), (110, 128)])
def test_only_zeros_are_taken_off_again(channels: int, group: int) -> None:
    policy = narrow(policy_of("openvla"), channels)
    wide, _ = pad_policy(policy, group)
    back = unpad_policy(wide, policy.towers)
    given, found = policy.state_dict(), back.state_dict()
    assert given.keys() == found.keys()
    assert all(torch.equal(given[name], found[name]) for name in given)
    with torch.no_grad():
        wide.get_parameter("decoder.layers.0.mlp.down.weight")[0, -1] = 1.0
    assert unpad_policy(wide, policy.towers) is wide
