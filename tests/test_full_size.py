"""Claims at a real size, with a size that is not: all of it but the gigabytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import full_size_arms
import numpy as np
import pytest
import torch

from rlrc.artifact import ActionSpec, CameraSpec, LayerSpec, NormStats, PolicySpec, PromptSpec, TokenSpec, TowerSpec
from rlrc.benchmarks.claims import full_size, operating_points, random_weights, roofline
from rlrc.benchmarks.claims.claims import thresholds
from rlrc.benchmarks.claims.operating_points import OperatingPoint, point
from rlrc.benchmarks.claims.policy_process import ActionTimes, PolicyProcess
from rlrc.benchmarks.claims.roofline import Peaks
from rlrc.compressor.checkpoints import reader
from rlrc.errors import UserError
from rlrc.runtime.cli import main

QUIET = lambda _: None  # noqa: E731
WHOLE, CUT = LayerSpec(4, 4, 16, 96), LayerSpec(1, 1, 16, 32)
TOWERS = {
    "vision": TowerSpec(32, (LayerSpec(2, 2, 16, 120),) * 2, eps=1e-6),
    "decoder": TowerSpec(64, (WHOLE,) * 4),
}
NAMES = ("x", "y", "grip")


def spec() -> PolicySpec:
    """4 patches of 14 pixels, then words; three tokens of a vocabulary of 96 rows."""
    norm = NormStats((0.0,) * 3, (1.0,) * 3)
    action = ActionSpec(1, NAMES, ("delta", "delta", "gripper"), ("1",) * 3, norm, 31, TokenSpec(96, 0, 95))
    camera = CameraSpec("top", 28, 28, "none", (0.5,) * 3, (0.5,) * 3, "HWC")
    geometry = {"vocabulary": 96, "patch": 14, "extra": [0], "scaled": [False], "projector": [64, 64]}
    prompt = PromptSpec("{instruction}", 64, None)
    return PolicySpec("openvla", "autoregressive", (camera,), None, prompt, action, geometry)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> OperatingPoint:
    monkeypatch.setattr(random_weights, "dense", lambda name: (spec(), TOWERS))
    return OperatingPoint("small", 0.9, ("*.layers.0.attention.*",), "onnxruntime", "fp16", "int4a8")


def test_what_is_compared(small: OperatingPoint) -> None:
    both = full_size.describe(small)
    assert both.dense.towers == TOWERS
    assert both.dense.quantization is None
    cut = both.compressed
    # A tenth of 96 channels is one group of 32, of 4 heads one; 8 channels fill the last group of vision's 120.
    assert cut.towers["decoder"].layers == (WHOLE, CUT, CUT, WHOLE)
    assert {layer.mlp for layer in cut.towers["vision"].layers} == {128}
    assert cut.policy.action.tokens == TokenSpec(32, 64, 95)  # the head has rows for its 31 bins and one more
    assert cut.quantization is not None
    bits = cut.quantization.tensors
    assert bits["embedding.weight"] == bits["vision.layers.0.attention.qkv.weight"] == 8
    assert bits["vision.layers.1.mlp.down.weight"] == bits["head.weight"] == 4
    assert "vision.stem.steps.0.weight" not in bits  # 588 inputs
    assert both.modules["embedding"] == 96 * 64


def test_weights_are_the_same_at_every_reading_and_of_a_sound_size(small: OperatingPoint) -> None:
    both = full_size.describe(small)
    for manifest in (both.dense, both.compressed):
        weights = random_weights.weights(manifest)
        shapes = {
            n: tuple(t.shape)
            for n, t in random_weights.build_shapes(manifest.policy, manifest.towers).state_dict().items()
        }
        assert weights.shapes() == shapes
        for name, shape in shapes.items():
            values = weights.values(name)
            assert values.shape == shape
            assert np.isfinite(values).all()
            if len(shape) == 2 and values.size > 2000:
                assert values.std() == pytest.approx(shape[1] ** -0.5, rel=0.1)
            assert np.array_equal(values, weights.values(name))


def test_all_of_it(small: OperatingPoint, tmp_path: Path) -> None:
    steps: list[str] = []
    kind = full_size.policy_process.faster_torch_type()
    result = full_size.run(small, tmp_path, 1, 2, True, thresholds(), steps.append)
    assert list(tmp_path.iterdir()) == []
    assert "elsewhere" not in result
    assert json.loads(json.dumps(result)) == result
    asked = ["geometry", "runtime", "threads", "dense", "compressed", "memory_ratio", "latency_ratio", "success"]
    assert {*asked, "verdict", "command", "machine", "load", "roofline"} <= result.keys()
    assert result["success"] == {"dense": None, "compressed": None, "episodes": 0, "interval": None}
    dense, compressed, in_torch = (result[name] for name in ("dense", "compressed", "torch"))
    assert (dense["precision"], compressed["precision"], in_torch["precision"]) == ("fp16", "int4a8", kind)
    assert dense["bytes"] > 2 * dense["parameters"] * 0.99
    assert result["memory_ratio"] == round(dense["bytes"] / compressed["bytes"], 3)
    for arm in (dense, compressed, in_torch):
        assert {"p50", "p90", "p99"} == arm["latency_ms"].keys()
        assert len(arm["trials_ms"]) == 2
        assert arm["parts_ms"].keys() == {"vision", "prefill", "decode"} == arm["roofline"].keys()
        assert sum(part["p50"] for part in arm["parts_ms"].values()) < 1.1 * arm["latency_ms"]["p99"]
        assert arm["peak_rss"] > 20e6
        assert arm["cpu_ms"]["p50"] > 0
        assert len(arm["pages_read"]) == 2
    assert [check["claim"] for check in result["checks"]] == ["memory", "latency", f"latency against torch {kind}"]
    assert result["verdict"] == "FAIL"  # Python itself is larger than these policies
    assert result["pruned"]["decoder_intermediate_heads"] == 0.75
    assert any("round 2 of 2: torch" in step for step in steps)


def test_a_torch_that_dies_takes_nothing_along(
    small: OperatingPoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel ends it for want of memory: what was measured before stays, and nothing has passed."""
    monkeypatch.setattr(full_size.policy_process, "open_in_torch", full_size_arms.dying_with)
    result = full_size.run(small, tmp_path, 1, 2, True, thresholds(), QUIET)
    assert len(result["dense"]["trials_ms"]) == len(result["compressed"]["trials_ms"]) == 2
    assert "torch" not in result
    (check,) = (check for check in result["checks"] if "torch" in check["claim"])
    assert (check["verdict"], check["value"], result["verdict"]) == ("NOT MEASURED", None, "FAIL")
    assert "SIGKILL" in check["reason"]
    assert json.loads(json.dumps(result)) == result


def test_on_llama_cpp(small: OperatingPoint, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    on_gguf = replace(small, runtime="gguf", elsewhere=("onnxruntime", {"vision": "int8", "decoder": "int4a8"}))
    result = full_size.run(on_gguf, tmp_path, 1, 2, True, thresholds(), QUIET)
    assert list(tmp_path.iterdir()) == []
    elsewhere = result["elsewhere"]
    assert (elsewhere["runtime"], elsewhere["precision"]) == ("onnxruntime", "vision int8, decoder int4a8")
    low, high = elsewhere["torch_latency_ratio_interval"]
    assert 0 < low <= elsewhere["torch_latency_ratio"] <= high
    assert result["dense"]["precision"] == "fp16"
    assert result["compressed"]["precision"] == "vision int4a8, embed int4a8, head int4a8, decoder int4"
    assert result["compressed"]["roofline"].keys() == {"vision", "prefill", "decode"}


def test_what_there_is_no_room_for_is_refused(
    small: OperatingPoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = full_size.describe(small)
    full_size.check_disk(small, both, tmp_path)
    assert full_size.bytes_needed(both, 1000.0) == 1000 + 0.75 * both.compressed.parameters + full_size.ROOM
    full_size.check_memory(small, full_size.ROOM)
    monkeypatch.setattr(full_size, "available", lambda: full_size.ROOM)
    with pytest.raises(UserError, match="of memory for small on onnxruntime"):
        full_size.check_memory(small, full_size.ROOM + 1)
    monkeypatch.setattr(full_size.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="GB of room in"):
        full_size.check_disk(small, both, tmp_path)


def test_memory_that_others_took_meanwhile_ends_the_run_and_leaves_nothing(
    small: OperatingPoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, steps = iter([1e12]), list[str]()
    monkeypatch.setattr(full_size, "available", lambda: next(answers, full_size.ROOM))
    monkeypatch.setattr(full_size, "PATIENCE_S", 0.05)
    with pytest.raises(UserError, match="of memory for small"):
        full_size.run(small, tmp_path, 1, 2, False, thresholds(), steps.append)
    assert list(tmp_path.iterdir()) == []
    assert steps[-1] == "waiting for 1.0 GB of memory, 1.0 GB are free"


@pytest.mark.parametrize(
    ("quicker", "room", "kind", "width"),
    [("bf16", 0, "bf16", 2), ("fp32", 0, "fp32", 4), ("fp32", -1, "bf16", 2)],  # bytes beyond what float32 needs
)
def test_torch_competes_in_its_quicker_type_that_fits(
    small: OperatingPoint, monkeypatch: pytest.MonkeyPatch, quicker: str, room: int, kind: str, width: int
) -> None:
    both, steps = full_size.describe(small), list[str]()
    monkeypatch.setattr(full_size.WorkerPool, "run", lambda *_: iter([(1, quicker)]))
    monkeypatch.setattr(full_size, "total", lambda: full_size.bytes_needed(both, 4 * both.dense.parameters) + room)
    needed = full_size.bytes_needed(both, width * both.dense.parameters)
    assert full_size.choose_torch_type(both, steps.append) == (kind, needed)
    assert len(steps) == (quicker != kind)


def test_resident_by_hand(small: OperatingPoint) -> None:
    """Float32 for all but the embedding; on llama.cpp the blocks stay in 16 bits too."""
    both = full_size.describe(small)
    narrow, blocks = 96 * 64, 4 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64) + 64
    numbers = both.dense.parameters
    assert full_size.weight_bytes(small, both) == 2 * narrow + 4 * (numbers - narrow)
    on_gguf = replace(small, runtime="gguf")
    assert full_size.weight_bytes(on_gguf, both) == 2 * (narrow + blocks) + 4 * (numbers - narrow - blocks)


class Short:
    """An arm that reads weights from the disk in so many of its first actions."""

    def __init__(self, times: int) -> None:
        self.times, self.actions = times, 0

    def act(self) -> ActionTimes:
        self.actions += 1
        return ActionTimes(float(self.actions), {"vision": 1.0}, 1.0, 5000 if self.actions <= self.times else 3)

    def memory(self) -> dict[str, int]:
        return {}

    def close(self) -> None: ...


def test_rounds_in_which_memory_was_short_do_not_count() -> None:
    steps: list[str] = []
    opened: Any = {"dense": lambda: Short(3), "compressed": lambda: Short(0)}
    trials = full_size.run_interleaved(opened, 2, steps.append)
    # The first action of each is no trial, the second and third were in need of memory.
    assert trials.totals("dense") == trials.totals("compressed") == [4.0, 5.0]
    assert (trials.repeated, len(trials.load)) == (2, 2)
    assert steps.count("round 1 is repeated: memory was short") == 2
    with pytest.raises(UserError, match="21 rounds had to read them from the disk again"):
        full_size.run_interleaved({"dense": lambda: Short(99)}, 2, QUIET)  # type: ignore[dict-item, return-value]


# The operating points


def test_every_geometry_has_its_points() -> None:
    assert point("openvla-7b").runtime == "gguf"
    assert point("openvla-7b", "onnxruntime").compressed == {"vision": "int8", "decoder": "int4a8"}
    assert point("openvla-7b").elsewhere == ("onnxruntime", {"vision": "int8", "decoder": "int4a8"})
    assert point("pi0").elsewhere is None
    assert point("smolvla-450m").compressed == {"vision": "int8", "prefix": "int4a8", "step": "int8"}
    with pytest.raises(UserError, match="does not support experts"):
        point("pi0", "gguf")
    with pytest.raises(UserError, match="the nearest is openvla-7b"):
        point("openvla")
    for name in ("openvla-7b", "openvla-oft-7b", "pi0", "smolvla-450m"):
        assert point(name).prune == 0.9
    assert operating_points.RUNTIMES == ("gguf", "onnxruntime")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "found neither"),
        (["somewhere"], "found one of them"),
        (["somewhere", "--geometry", "pi0"], "expected --geometry alone"),
        (["--geometry", "pi0", "--runtime", "gguf"], "does not support experts"),
        (["--geometry", "pi0", "--rounds", "1"], "two or more rounds"),
        (["--geometry", "pi0", "--work", "nowhere"], "found none at nowhere"),
    ],
)
def test_bad_requests_are_one_line_and_exit_2(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["bench", "claims", *arguments]) == 2
    complaint = capsys.readouterr().err
    assert message in complaint
    assert len(complaint.splitlines()) == 1


def test_the_command_tells_and_fails(
    small: OperatingPoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(operating_points, "point", lambda name, runtime: small)
    out = tmp_path / "claims-small.json"
    arguments = ["--geometry", "openvla-7b", "--rounds", "2", "--no-torch", "--work", str(tmp_path), "--out", str(out)]
    assert main(["bench", "claims", *arguments]) == 1
    printed = capsys.readouterr()
    assert "operating point: int4a8 against fp16 on onnxruntime, 1 thread(s)" in printed.out
    assert "bound by" in printed.out
    assert "round 1 of 2: dense" in printed.err
    assert json.loads(out.read_text())["geometry"] == "small"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


# Arms


def test_an_arm_tells_its_parts_and_its_memory() -> None:
    arm = PolicyProcess("a clock", full_size_arms.clockwork, (5.0,))
    try:
        action = arm.act()
        assert action.parts["vision"] >= 5.0
        assert action.parts["decode"] >= 10.0
        assert sum(action.parts.values()) <= action.total < 1000.0
        assert action.cpu < action.total  # it sleeps
        again = arm.act()
        assert again.parts["vision"] < action.total  # it is not added up over actions
        assert 5e6 < arm.memory()["anonymous"] < arm.memory()["peak"]
    finally:
        arm.close()


def test_what_an_arm_cannot_do_is_told() -> None:
    with pytest.raises(UserError, match="do better"):
        PolicyProcess("a policy", full_size_arms.refused, ())
    arm = PolicyProcess("a policy", full_size_arms.dying, ())
    with pytest.raises(UserError, match="process of a policy to keep running, found that it ended by"):
        arm.act()
    arm.close()


# The roofline


def test_limits_by_hand(small: OperatingPoint) -> None:
    """A decode step of 1 row: two multiply-adds a weight, and every weight read once in 4.5 bits."""
    manifest = full_size.describe(small).compressed
    blocks = sum(64 * (4 * layer.heads * 16 + 3 * layer.mlp) for layer in manifest.towers["decoder"].layers)
    weights, times = blocks + 32 * 64, 2
    kernels = {"vision": "int4a8", "decoder": "int4a8"}
    measured = {"decode": [2.0, 4.0, 3.0], "vision": [1.0]}
    peaks = Peaks(1e6, {"fp32": 1e18, "int8": 1e18})
    by_memory = roofline.compare_with_limits(manifest, kernels, peaks, measured, 8)["decode"]
    assert (by_memory["measured_ms"], by_memory["bound"]) == (3.0, "memory")
    least = times * weights * 4.5 / 8 / 1e6 * 1e3
    assert least < by_memory["limit_ms"] < 2.5 * least  # activations are not small beside such weights
    assert by_memory["share"] == pytest.approx(by_memory["limit_ms"] / 3.0, rel=1e-3)
    peaks = Peaks(1e18, {"fp32": 1e3, "int8": 1e6})
    by_products = roofline.compare_with_limits(manifest, kernels, peaks, measured, 8)["decode"]
    least = times * 2 * weights / 1e6 * 1e3
    assert by_products["bound"] == "products"
    assert least < by_products["limit_ms"] < 1.2 * least  # attention and norms
    assert roofline.compare_with_limits(manifest, kernels, Peaks(1e18, {"int8": 1e6}), {"other": [1.0]}, 8) == {}


def test_products_of_8_bits_and_floats_are_measured() -> None:
    peaks = roofline.measure(1)
    assert peaks.products.keys() == {"fp32", "int8"}
    assert all(1e8 < rate < 1e15 for rate in peaks.products.values())
    assert peaks.record()["read_gb_s"] > 0.05
    best = roofline.best([Peaks(1.0, {"fp32": 3.0, "int8": 4.0}), Peaks(2.0, {"fp32": 2.0}), Peaks(0.0, {"bf16": 5.0})])
    assert best == Peaks(2.0, {"fp32": 3.0, "int8": 4.0, "bf16": 5.0})


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_torch_policies_of_flows_take_either_type(kind: str) -> None:
    """Pictures, states and noise come in float32."""
    from rlrc.benchmarks.claims import policy_process
    from rlrc.compressor.checkpoints import geometry

    folder, options = geometry.folder("smolvla-450m")
    layout = reader.layout(folder, options)
    towers = {name: replace(tower, layers=tower.layers[:2]) for name, tower in layout.towers.items()}
    cameras = (replace(layout.spec.cameras[0], height=64, width=64),)
    flow = layout.spec.flow
    assert flow is not None
    small = replace(random_weights.use_plain_prompt(layout.spec), cameras=cameras, flow=replace(flow, steps=2))
    threads = torch.get_num_threads()
    small = replace(small, geometry=small.geometry | {"vocabulary": 64})
    infer, passes = policy_process.open_in_torch(small, towers, threads, 5, kind)
    result: Any = infer()
    assert result["actions"].shape == (50, 6)
    assert np.isfinite(result["actions"]).all()
    assert passes.keys() == {"vision", "prefix", "steps"}
