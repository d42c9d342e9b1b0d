"""What people read about a policy: names and blocks told together, and the parameters of every module."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from rlrc import artifact as artifacts
from rlrc.artifact import CameraSpec, FlowSpec, LayerSpec, Manifest, TokenSpec, TowerSpec
from rlrc.artifact import describe as artifact_describe
from rlrc.runtime.cli import describe

DENSE, THIN = LayerSpec(32, 32, 128, 11008), LayerSpec(3, 3, 128, 1088)


def test_equal_blocks_are_one_line() -> None:
    assert artifact_describe.describe_blocks(TowerSpec(4096, (DENSE, *(THIN,) * 30, DENSE))) == [
        "width 4,096",
        "layers 0, 31: 32 heads of 128, MLP 11,008",
        "layers 1-30: 3 heads of 128, MLP 1,088",
    ]


def test_blocks_of_other_kinds() -> None:
    cross = LayerSpec(15, 5, 64, 2048, "cross")
    layers = (replace(cross, kind="self"), cross) * 3 + (LayerSpec(0, 1, 256, 0, "half"),)
    assert artifact_describe.describe_blocks(TowerSpec(720, layers)) == [
        "width 720",
        "layers 0, 2, ... 4: 15 heads of 64 (5 kv), MLP 2,048",
        "layers 1, 3, ... 5: cross-attention, 15 heads of 64 (5 kv), MLP 2,048",
        "layer 6: keys and values only, 1 of 256",
    ]
    assert artifact_describe.describe_blocks(TowerSpec(8, (LayerSpec(1, 1, 8, 0),)))[1] == "layer 0: 1 head of 8, MLP 0"


def test_dimensions_of_one_kind_are_told_together() -> None:
    assert artifact_describe.format_names("xyzg", ("m", "m", "m", "1")) == "x, y, z (m); g (1)"
    joints = [f"joint_{i}" for i in range(7)]
    assert (
        artifact_describe.format_names([*joints, "grip"], ["rad"] * 7 + ["1"]) == "joint_0 to joint_6 (rad); grip (1)"
    )
    assert artifact_describe.format_names(joints[1:4], ["rad"] * 3) == "joint_1, joint_2, joint_3 (rad)"
    assert artifact_describe.format_names(["a1", "a2", "a4", "a5"], ["1"] * 4) == "a1, a2, a4, a5 (1)"


def test_rows_of_other_policies(tiny_manifest: Manifest) -> None:
    policy = tiny_manifest.policy
    optional = CameraSpec("wrist", 224, 128, "pad", (0.5,) * 3, (0.5,) * 3, "HWC", optional=True)
    action = replace(policy.action, tokens=TokenSpec(50, 90, 131))
    rows = artifact_describe.policy_rows(
        replace(policy, cameras=(*policy.cameras, optional), action=action, state=None, prompt=None)
    )
    assert rows["cameras"] == "corner4 32 x 32, resize none; wrist 224 x 128, resize pad, optional"
    assert (rows["state"], rows["prompt"]) == ("none", "none")
    assert rows["actions"].endswith("chunks of 3, 32 bins among 50 tokens")
    flow = replace(policy, decode="flow", flow=FlowSpec(10, 32), action=replace(policy.action, bins=0))
    rows = artifact_describe.policy_rows(flow)
    assert rows["family"] == "tiny, flow decoding in 10 steps"
    assert rows["actions"].endswith("chunks of 3, continuous")


def test_what_can_be_pruned() -> None:
    towers = {"vision": TowerSpec(8, (DENSE,) * 3), "decoder": TowerSpec(8, (DENSE, THIN, THIN, DENSE))}
    towers["expert"] = TowerSpec(8, (DENSE,) * 2)
    assert artifact_describe.describe_prunable(towers) == "decoder 6 heads, 2,176 MLP channels; expert nothing"


@pytest.mark.parametrize("fixture", ["tiny_artifact", "tiny_int4_artifact"])
def test_parameters_of_every_module(fixture: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(fixture)
    artifact = artifacts.load(path)
    totals = artifact_describe.module_parameters(artifact)
    assert sum(totals.values()) == artifact.manifest.parameters
    # Seven words of width 64; 64 -> 4 dimensions of 32 bins; 3 numbers of state with a bias.
    assert (totals["embedding"], totals["head"], totals["state"]) == (7 * 64, 64 * 128, 4 * 64)


def test_one_screen(tiny_artifact: Path) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    describe.describe(artifacts.load(tiny_artifact), console)
    lines = console.export_text().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
