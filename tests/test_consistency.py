"""Descriptions that contradict themselves: every rule that the types of a manifest cannot state, broken once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlrc.artifact import FlowSpec, LayerSpec, Manifest, PolicySpec, PromptSpec, TokenSpec, TowerSpec
from rlrc.artifact.consistency import check_consistent
from rlrc.strict import StrictError


@pytest.fixture
def parallel(tiny_manifest: Manifest) -> Manifest:
    """One camera, three state dimensions, chunks of 3 steps of 4 dimensions in 32 bins."""
    return tiny_manifest


@pytest.fixture
def autoregressive(parallel: Manifest) -> Manifest:
    """The 32 bins are tokens 131 down to 100, of a vocabulary from 90 to 139."""
    action = replace(parallel.policy.action, tokens=TokenSpec(50, 90, 131))
    return changed(parallel, decode="autoregressive", action=action)


@pytest.fixture
def flow(parallel: Manifest) -> Manifest:
    action = replace(parallel.policy.action, bins=0)
    return changed(parallel, decode="flow", action=action, flow=FlowSpec(10, 8))


def changed(manifest: Manifest, **changes: Any) -> Manifest:
    return replace(manifest, policy=replace(manifest.policy, **changes))


def check(manifest: Manifest, **changes: Any) -> None:
    check_consistent(changed(manifest, **changes))


def refused(message: str, manifest: Manifest, **changes: Any) -> None:
    with pytest.raises(StrictError, match=message) as caught:
        check(manifest, **changes)
    assert "\n" not in str(caught.value)


def test_what_fits(parallel: Manifest, autoregressive: Manifest, flow: Manifest) -> None:
    for manifest in (parallel, autoregressive, flow):
        check_consistent(manifest)


def camera(policy: PolicySpec, **changes: Any) -> tuple[Any, ...]:
    return (replace(policy.cameras[0], **changes),)


def test_cameras(parallel: Manifest) -> None:
    policy = parallel.policy
    check(parallel, cameras=camera(policy, mean=(0.5,) * 6, std=(0.5,) * 6))
    three = "three numbers for every encoder at mean and std of camera corner4, found"
    refused(rf"{three} \(6, 3\)", parallel, cameras=camera(policy, mean=(0.5,) * 6))
    refused(rf"{three} \(4, 4\)", parallel, cameras=camera(policy, mean=(0.5,) * 4, std=(0.5,) * 4))
    refused(rf"{three} \(0, 0\)", parallel, cameras=camera(policy, mean=(), std=()))
    refused("positive height, width and finite std", parallel, cameras=camera(policy, std=(0.5, 0.0, 0.5)))
    refused(r"at least one camera, .* found \[\]", parallel, cameras=())
    refused(r"each name once, .* found \['corner4', 'corner4'\]", parallel, cameras=policy.cameras * 2)


def test_state(parallel: Manifest) -> None:
    state = parallel.policy.state
    assert state is not None
    check(parallel, state=replace(state, width=3))
    check(parallel, state=replace(state, width=32))
    refused("null or at least 3 at policy.state.width, found 2", parallel, state=replace(state, width=2))


def test_prompt(parallel: Manifest) -> None:
    prompt = PromptSpec("{instruction} {state}", 5, None, suffix=(1, 2), state_bins=256)
    check(parallel, prompt=prompt)
    check(parallel, prompt=None)
    refused("more than 2 at policy.prompt.max_tokens, found 2", parallel, prompt=replace(prompt, max_tokens=2))
    exactly = "state_bins exactly where the template has {state}, found"
    refused(f"{exactly} 0", parallel, prompt=replace(prompt, state_bins=0))
    refused(f"{exactly} 256", parallel, prompt=replace(prompt, template="{instruction}"))
    refused("a policy.state for the prompt's {state}, found None", parallel, prompt=prompt, state=None)
    check(parallel, prompt=replace(prompt, state_width=3))
    width = "with {state}, at policy.prompt.state_width, found"
    refused(f"0 or at least 3, {width} 2", parallel, prompt=replace(prompt, state_width=2))
    silent = replace(prompt, template="{instruction}", state_bins=0)
    refused(f"0 or at least 1, {width} 5", parallel, prompt=replace(silent, state_width=5))


def test_tokens(parallel: Manifest, autoregressive: Manifest) -> None:
    action = autoregressive.policy.action
    check(parallel, action=action)  # OpenVLA-OFT's discrete form
    refused("policy.action.tokens where decode is autoregressive", autoregressive, action=replace(action, tokens=None))
    refused("policy.action.bins where there are tokens, found 0", parallel, action=replace(action, bins=0))
    # 32 bins from token 131 down to 100: all of them must be rows of the logits.
    for tokens in (TokenSpec(32, 100, 131), TokenSpec(132, 0, 131)):
        check(autoregressive, action=replace(action, tokens=tokens))
    for tokens in (TokenSpec(31, 100, 131), TokenSpec(50, 101, 131), TokenSpec(200, -1, 131)):
        refused("32 bins among the rows", autoregressive, action=replace(action, tokens=tokens))


def test_flow(parallel: Manifest, flow: Manifest) -> None:
    refused("policy.flow where decode is flow, found flow", flow, flow=None)
    refused("policy.flow where decode is flow, found parallel", parallel, flow=FlowSpec(10, 8))
    check(flow, flow=FlowSpec(1, 4))
    refused("a step and 4 or more of width", flow, flow=FlowSpec(10, 3))
    refused("a step and 4 or more of width", flow, flow=FlowSpec(0, 8))
    refused("bins 0 where decode is flow, found 32", flow, action=parallel.policy.action)


BLOCK = LayerSpec(2, 1, 16, 64)
HALF = LayerSpec(0, 1, 16, 0, "half")


def with_tower(manifest: Manifest, tower: TowerSpec, name: str = "decoder") -> Manifest:
    return replace(manifest, towers={name: tower})


def test_towers(parallel: Manifest, flow: Manifest, autoregressive: Manifest) -> None:
    tower = TowerSpec(64, (BLOCK, BLOCK))
    check(with_tower(flow, replace(tower, layers=(BLOCK, HALF))))
    refused(
        "a half block only at the end of towers.decoder, found one at 0",
        with_tower(flow, replace(tower, layers=(HALF, BLOCK))),
    )
    for norm in ("adaptive", "steps"):
        check(with_tower(flow, replace(tower, norm=norm)))
        refused(
            f"norm rms without a flow at towers.decoder, found {norm}", with_tower(parallel, replace(tower, norm=norm))
        )
        refused("norm_offset with norm rms only", with_tower(flow, replace(tower, norm=norm, norm_offset=1.0)))
    check(with_tower(flow, replace(tower, norm_offset=1.0)))
    for change in ({"eps": 0.0}, {"width": 0}, {"theta": 0.0}):
        refused("positive width, eps and theta at towers.decoder", with_tower(parallel, replace(tower, **change)))
    check(with_tower(parallel, tower, "vision"))
    for manifest in (flow, autoregressive):
        refused(r"a tower decoder, .* found \['vision'\]", with_tower(manifest, tower, "vision"))
