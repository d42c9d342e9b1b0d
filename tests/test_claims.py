"""Verdicts: each threshold from both sides, what is refused, and the exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrc import artifact as artifacts
from rlrc.artifact import FileSpec, LayerSpec, Manifest, QuantizationSpec, TowerSpec
from rlrc.benchmarks.claims import claims
from rlrc.benchmarks.claims.claims import Thresholds
from rlrc.benchmarks.measure.latency import Trials
from rlrc.errors import UserError
from rlrc.runtime.cli import main

LIMITS = Thresholds(memory_ratio=8.0, latency_ratio=2.3, success_margin=0.03, success_episodes=500)
DECODER, TOKENIZER = "graphs/onnx/decoder.onnx", "tokenizer/tokenizer.json"


def test_thresholds_are_the_papers() -> None:
    assert claims.thresholds() == LIMITS


@pytest.mark.parametrize(
    "text",
    ["[memory]\nratio = 8", "memory = 8", "nonsense", '[memory]\nratio = "8"\n[latency]\nratio=1\n[success]\nmargin=0'],
)
def test_thresholds_that_do_not_fit_are_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"mine\.toml"):
        claims.thresholds(file)


@pytest.fixture
def manifest(toy_artifact: Path) -> Callable[..., Manifest]:
    """(bytes of the decoder graph, parameters) -> manifest with a tokenizer of 10 bytes."""
    exported = artifacts.load(toy_artifact).manifest

    def make(size: int, parameters: int, **changes: Any) -> Manifest:
        files = {DECODER: FileSpec("0" * 64, size), TOKENIZER: FileSpec("0" * 64, 10)}
        return replace(exported, files=files, parameters=parameters, **changes)

    return make


@pytest.mark.parametrize(("size", "verdict", "ratio"), [(240, "PASS", 2010 / 250), (242, "FAIL", 2010 / 252)])
def test_memory_is_against_bf16(manifest: Callable[..., Manifest], size: int, verdict: str, ratio: float) -> None:
    """1000 parameters stored as fp32 count as 2000 bytes: against 4000, both sizes would pass."""
    quantized = manifest(size, 100, dtype="int4", quantization=QuantizationSpec("int4", 32, {}))
    check = claims.memory(quantized, manifest(4000, 1000), LIMITS)
    assert check.verdict == verdict
    assert check.value == pytest.approx(ratio)
    assert "(as bf16, 2 bytes a parameter, + tokenizer; the float32 graph files take 0.00 MB)" in check.reason


def trials(milliseconds: float, stable: bool = True, noise: float = 0.02) -> Trials:
    random = np.random.default_rng(0)
    return Trials(10, list(milliseconds * random.lognormal(0, noise, 400)), {}, 40, stable)


def test_latency_needs_the_lower_end_of_the_interval() -> None:
    clear = claims.latency(trials(2.0), trials(5.0), LIMITS)
    assert clear.verdict == "PASS"
    assert clear.value == pytest.approx(2.5, rel=0.01)
    assert clear.limit is not None
    assert 2.3 <= clear.limit <= 2.5
    assert claims.latency(trials(2.0), trials(4.4), LIMITS).verdict == "FAIL"
    random = np.random.default_rng(3)
    scattered = Trials(10, list(4.7 * random.lognormal(0, 0.8, 400)), {}, 40, True)
    unsure = claims.latency(trials(2.0), scattered, LIMITS)
    assert unsure.limit is not None
    assert unsure.limit < 2.3
    assert unsure.verdict == "FAIL"  # even where the ratio of the medians is above
    assert "did not become stable" in claims.latency(trials(2.0, stable=False), trials(5.0), LIMITS).reason


def played(name: str, outcomes: str, first_seed: int = 0) -> dict[str, Any]:
    rate = outcomes.count("1") / len(outcomes)
    scenes = {"first_seed": first_seed, "horizon": 200}
    row = {"name": name, "success": rate, "episodes": len(outcomes), "scenes": scenes}
    return row | {"outcomes": {"task": outcomes}}


def test_success_is_compared_scene_by_scene_where_that_is_possible() -> None:
    # 450 of 500 each, 15 scenes solved by one only: paired -0.0187, independent -0.0315 (see test_stats).
    dense = played("dense", "1" * 450 + "0" * 50)
    ours = "1" * 435 + "0" * 15 + "1" * 15 + "0" * 35
    paired = claims.success(played("compressed", ours), dense, LIMITS)
    assert (paired.verdict, paired.value) == ("PASS", 0.0)
    assert paired.limit == pytest.approx(-0.0187, abs=1e-4)
    independent = claims.success(played("compressed", ours, first_seed=9), dense, LIMITS)
    assert independent.verdict == "FAIL"
    assert independent.limit == pytest.approx(-0.0315, abs=1e-4)
    assert "450/500 against 450/500" in independent.reason


def test_few_episodes_never_pass() -> None:
    check = claims.success(played("compressed", "1" * 499), played("dense", "1" * 499), LIMITS)
    assert check.verdict == "FAIL"
    assert "500 episodes" in check.reason


def test_what_was_not_measured_is_not_claimed() -> None:
    assert claims.success(None, None, LIMITS).verdict == "NOT MEASURED"


def test_cut_by_hand(tiny_manifest: Manifest) -> None:
    block, cut = LayerSpec(heads=10, kv_heads=10, head_dim=32, mlp=640), LayerSpec(1, 1, 32, 128)
    towers = {"vision": TowerSpec(64, (block,) * 2), "decoder": TowerSpec(256, (block,) * 12)}
    dense = replace(tiny_manifest, towers=towers, parameters=1000)
    ours = replace(dense, towers={**towers, "decoder": TowerSpec(256, (block, *(cut,) * 10, block))}, parameters=250)
    assert claims.measure_cuts(ours, dense) == {
        "decoder_intermediate_heads": 0.9,
        "decoder_intermediate_channels": 0.8,
        "whole_policy": 0.75,
    }
    assert claims.measure_cuts(dense, dense) == {"whole_policy": 0.0}


def test_every_tower_that_was_cut_is_named(tiny_manifest: Manifest) -> None:
    """ACT's large tower is its encoder; a policy without its last prefix block; a tower of two blocks."""
    block, cut = LayerSpec(8, 8, 64, 3200), LayerSpec(4, 4, 64, 800)
    towers = {"encoder": TowerSpec(512, (block,) * 4), "decoder": TowerSpec(512, (block,)), "vision": TowerSpec(64, ())}
    dense = replace(tiny_manifest, towers=towers, parameters=100)
    encoder = replace(dense, towers={**towers, "encoder": TowerSpec(512, (block, cut, cut, block))}, parameters=60)
    assert claims.measure_cuts(encoder, dense) == {
        "encoder_intermediate_heads": 0.5,
        "encoder_intermediate_channels": 0.75,
        "whole_policy": 0.4,
    }
    shorter = replace(dense, towers={**towers, "encoder": TowerSpec(512, (block,) * 3)}, parameters=75)
    assert claims.measure_cuts(shorter, dense) == {
        "encoder_blocks": 0.25,
        "encoder_intermediate_heads": 0.5,
        "encoder_intermediate_channels": 0.5,
        "whole_policy": 0.25,
    }
    two = replace(dense, towers={**towers, "decoder": TowerSpec(512, (cut,))})
    assert claims.measure_cuts(two, dense)["decoder_intermediate_heads"] == 0.5


def test_other_cameras_horizons_and_actions_are_refused(toy_artifact: Path) -> None:
    dense = artifacts.load(toy_artifact).manifest
    policy, action = dense.policy, dense.policy.action
    claims.check_comparable(dense, dense)
    for what, other in (
        ("cameras", replace(policy, cameras=(replace(policy.cameras[0], height=64),))),
        ("horizon", replace(policy, action=replace(action, horizon=8))),
        ("action dimensions", replace(policy, action=replace(action, names=("a", "b", "c", "d")))),
    ):
        with pytest.raises(UserError, match=f"the baseline's {what}"):
            claims.check_comparable(replace(dense, policy=other), dense)


def test_other_tasks_are_refused(make_toy: Callable[..., Path], tmp_path: Path) -> None:
    dense = artifacts.load(make_toy(tmp_path / "dense"))
    claims.check_same_tasks(dense, dense)
    other = make_toy(tmp_path / "other")
    with np.load(other / "golden.npz") as arrays:
        changed = dict(arrays)
    changed["instructions"] = np.array(["open the drawer"] * len(changed["instructions"]))
    np.savez(other / "golden.npz", **changed)
    others = replace(dense, path=other)
    with pytest.raises(UserError, match="the same tasks, found 'close the window' in the baseline only"):
        claims.check_same_tasks(others, dense)
    with pytest.raises(UserError, match="in the compressed one only"):
        claims.check_same_tasks(dense, others)
    rows = [played("compressed", "1" * 600), played("dense", "1" * 600)]
    rows[1]["outcomes"] = {"another": rows[1]["outcomes"]["task"]}
    with pytest.raises(UserError, match="success on the same tasks, found 'task'"):
        claims.success(rows[0], rows[1], LIMITS)


@pytest.mark.parametrize(
    ("stored", "resident", "verdict"), [(13.0, 8.1, "PASS"), (13.0, 7.9, "FAIL"), (7.9, 9, "FAIL")]
)
def test_memory_is_both_what_is_stored_and_what_is_resident(stored: float, resident: float, verdict: str) -> None:
    check = claims.memory_of_sizes(stored, resident, LIMITS)
    assert (check.verdict, check.value, check.limit) == (verdict, stored, min(stored, resident))


def success_file(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"kind": "success", "rows": rows}))
    return path


def test_command_measures_states_the_operating_point_and_fails(toy_artifact: Path, tmp_path: Path, capsys: Any) -> None:
    """A policy against itself: success holds, memory and latency cannot."""
    digest = artifacts.load(toy_artifact).digest
    evidence = success_file(tmp_path / "success.json", played("anything", "1" * 600) | {"digest": digest})
    out = tmp_path / "claims.json"
    command = ["bench", "claims", f"compressed={toy_artifact}", "--baseline", f"dense={toy_artifact}"]
    assert main([*command, "--success", str(evidence), "--trials", "60", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert [check["verdict"] for check in result["checks"]] == ["FAIL", "FAIL", "PASS"]
    assert result["verdict"] == "FAIL"
    assert "operating point: compressed (float32) against dense (float32), 1 thread" in printed
    point = result["operating_point"]
    assert (point["threads"], point["pruned"]["whole_policy"]) == (1, 0.0)
    assert {row["name"] for row in result["rows"]} == {"dense", "compressed"}

    easy = tmp_path / "easy.toml"
    easy.write_text("[memory]\nratio=1.0\n[latency]\nratio=0.1\n[success]\nmargin=0.03\nepisodes=500\n")
    arguments = ["--thresholds", str(easy), "--trials", "60"]
    assert main([*command, *arguments, "--success", str(evidence)]) == 0
    capsys.readouterr()
    assert main([*command, *arguments]) == 1  # success was not measured
    assert "NOT MEASURED" in capsys.readouterr().out


def test_success_of_another_artifact_is_no_evidence(toy_artifact: Path, tmp_path: Path, capsys: Any) -> None:
    evidence = success_file(tmp_path / "success.json", played("compressed", "1" * 600) | {"digest": "other"})
    command = ["bench", "claims", f"compressed={toy_artifact}", "--baseline", f"dense={toy_artifact}"]
    assert main([*command, "--success", str(evidence)]) == 2
    assert "none of exactly that artifact" in capsys.readouterr().err
