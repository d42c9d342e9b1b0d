"""--precision auto, 8-bit products and attention in the cache's place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from rlrc import artifact as artifacts  # noqa: E402
from rlrc.artifact import ActionSpec, Artifact, LayerSpec, Manifest, NormStats, TokenSpec, TowerSpec  # noqa: E402
from rlrc.compressor.models.openvla import OpenVLAPolicy  # noqa: E402
from rlrc.compressor.models.storage.tensors import Tensors  # noqa: E402
from rlrc.compressor.quantize.grid import decompress  # noqa: E402
from rlrc.compressor.quantize.quantize import QuantizeConfig, quantize  # noqa: E402
from rlrc.errors import UserError  # noqa: E402
from rlrc.exporters.auto import Candidate, measure_candidates, rank_plans  # noqa: E402
from rlrc.exporters.export import export, replace_graphs  # noqa: E402
from rlrc.exporters.graphs.weights import Weights  # noqa: E402
from rlrc.exporters.onnx.builder import FORMATS, OnnxRuntimeBuilder  # noqa: E402
from rlrc.exporters.onnx.target import build_graph, write_graphs  # noqa: E402
from rlrc.runtime.cli import main  # noqa: E402
from rlrc.runtime.inference.backends.onnxruntime import OnnxRuntime  # noqa: E402

# Heads of 16 numbers, and fewer of keys than of queries: what attention in place can rotate.
TOWERS = {
    "vision": TowerSpec(32, (LayerSpec(2, 2, 16, 32),)),
    "decoder": TowerSpec(64, (LayerSpec(4, 2, 16, 64), LayerSpec(4, 4, 16, 96), LayerSpec(2, 1, 16, 64))),
}


def openvla(tiny_manifest: Manifest) -> tuple[Manifest, OpenVLAPolicy]:
    norm, names = NormStats((0.0, 0.0), (1.0, 1.0)), ("dx", "grip")
    spec = tiny_manifest.policy
    assert spec.prompt is not None
    spec = replace(
        spec,
        family="openvla",
        decode="autoregressive",
        state=None,
        cameras=(replace(spec.cameras[0], height=28, width=28),),
        prompt=replace(spec.prompt, max_tokens=110, pad_id=None),
        action=ActionSpec(2, names, ("delta", "gripper"), ("m", "1"), norm, 15, TokenSpec(16, 16, 31)),
        geometry={"vocabulary": 32, "patch": 14, "extra": [1], "scaled": [True], "projector": [64, 64]},
    )
    torch.manual_seed(0)
    policy = OpenVLAPolicy(spec, TOWERS).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return Manifest(spec, TOWERS, 0, "float32"), policy


def engine(manifest: Manifest, tensors: dict[str, Any], precision: str, folder: Path) -> OnnxRuntime:
    """The graphs of these weights, loaded."""
    from safetensors.torch import save_file

    draft = artifacts.Draft(folder)
    save_file(tensors, draft.file("weights/model.safetensors"))
    manifest = replace_graphs(manifest, draft, [])
    parent = Artifact(folder, manifest, "")
    return OnnxRuntime(Artifact(folder, replace_graphs(manifest, draft, write_graphs(draft, parent, precision)), ""), 1)


@pytest.mark.parametrize(("precision", "close"), [("fp32", 1e-4), ("int8-rows", 0.3), ("int8+int4", 0.3)])
def test_decoding_in_place_computes_what_torch_does(
    precision: str, close: float, tiny_manifest: Manifest, tmp_path: Path
) -> None:
    manifest, policy = openvla(tiny_manifest)
    tensors: dict[str, Any] = policy.state_dict()
    if precision == "int8+int4":
        packed, spec, _ = quantize(policy.state_dict(), QuantizeConfig())
        tensors = dict(packed)
        manifest = replace(manifest, quantization=spec)
        policy.load_state_dict(decompress(tensors, spec))
    loaded, random = engine(manifest, tensors, precision, tmp_path), np.random.default_rng(0)
    scale = 0.0
    for words in (3, 60, 5):  # the second outgrows the buffers while it decodes
        image_tokens = random.standard_normal((1, 4, 64)).astype(np.float32)
        ids, past, start = random.integers(0, 32, (1, words)), None, 0
        for i in range(34):
            seen = image_tokens if i == 0 else image_tokens[:, :0]
            end = start + seen.shape[1] + ids.shape[1]
            given: dict[str, Any] = {
                "image_tokens": seen,
                "ids": ids,
                "start": np.array([start]),
                "end": np.array([end]),
            }
            found = loaded.run("decoder", given)
            with torch.inference_mode():
                pictures = None if i else torch.from_numpy(image_tokens)
                expected, past = policy.step(pictures, torch.from_numpy(ids), past)
            assert found.keys() == {"logits"}
            np.testing.assert_allclose(found["logits"], expected.numpy(), atol=close)
            scale = max(scale, float(expected.abs().max()))
            ids, start = random.integers(0, 32, (1, 1)), end
    assert scale > 2.5


def test_keys_and_values_have_one_place(tiny_manifest: Manifest, tmp_path: Path) -> None:
    manifest, policy = openvla(tiny_manifest)
    loaded = engine(manifest, policy.state_dict(), "fp32", tmp_path)
    cache = loaded._caches["decoder"]
    inputs = {"image_tokens": np.zeros((1, 4, 64), np.float32), "ids": np.array([[1, 2]])}
    loaded.run("decoder", {**inputs, "start": np.array([0]), "end": np.array([6])})
    places = {name: kept.data_ptr() for name, kept in cache._kept.items()}
    loaded.run("decoder", {**inputs, "start": np.array([0]), "end": np.array([6])})
    assert {name: kept.data_ptr() for name, kept in cache._kept.items()} == places
    assert cache._kept["past.1.key"].numpy()[0, 0, 5].any()
    assert not cache._kept["past.1.key"].numpy()[0, 0, 6:].any()


def test_the_two_parts_of_a_mixed_graph_share_all_but_the_products(tiny_manifest: Manifest) -> None:
    manifest, policy = openvla(tiny_manifest)
    packed, spec, _ = quantize(policy.state_dict(), QuantizeConfig())
    weights = Weights(packed, spec)
    mixed, many, one = (
        build_graph(weights, manifest, "decoder", name) for name in ("int8+int4", "int8-rows", "int4a8")
    )
    stored = {tensor.name: len(tensor.raw_data) for tensor in mixed.model("decoder").graph.initializer}
    assert stored["embedding.weight"] == 2 * 32 * 64
    assert not [name for name in stored if "norm" in name and name.startswith("one.")]
    assert max(many.bytes(), one.bytes()) < sum(stored.values()) < many.bytes() + one.bytes() - 2 * 32 * 64
    assert mixed.memory == many.memory + one.memory


def test_8_bit_products_keep_small_rows_beside_large_ones() -> None:
    """One scale for all rows would leave rows a thousand times smaller than the largest one or two integers."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((48, 64)).astype(np.float32)
    builder = OnnxRuntimeBuilder(Weights(Tensors("w", {"m.weight": torch.from_numpy(weight)})), FORMATS["int8-rows"])
    builder.output("y", builder.linear(builder.input("x", "float32", (1, "rows", 64)), "m"), "float32", (1, "rows", 48))
    session = ort.InferenceSession(builder.model("m").SerializeToString(), providers=["CPUExecutionProvider"])
    x = random.standard_normal((1, 9, 64)).astype(np.float32)
    x[0, 2] *= 1000
    x[0, 5] = 0
    (found,) = session.run(None, {"x": x})
    expected = x @ weight.T
    error = np.abs(found - expected).max(-1) / np.maximum(np.abs(expected).max(-1), 1e-9)
    assert error.max() < 0.02
    assert not found[0, 5].any()


def test_combinations_from_the_fastest_on() -> None:
    a, b = Candidate("vision", "fp32", 5, 400), Candidate("vision", "int8", 2, 100)
    c, d, e = (
        Candidate("decoder", "fp32", 30, 800),
        Candidate("decoder", "int8", 9, 200),
        Candidate("decoder", "x", 8, 900),
    )
    # By milliseconds: 10, 11, 13, 14, 32, 35.
    assert rank_plans([a, b, c, d, e]) == [(b, e), (b, d), (a, e), (a, d), (b, c), (a, c)]
    assert rank_plans([a, b, c, d, e], budget=600) == [(b, d), (a, d)]
    with pytest.raises(UserError, match="fit into 299 bytes, found that the smallest take 300"):
        rank_plans([a, b, c, d, e], budget=299)


def test_every_precision_is_measured(tiny_int4_artifact: Path) -> None:
    found = {(each.graph, each.precision): each for each in measure_candidates(artifacts.load(tiny_int4_artifact), 1)}
    assert found.keys() == {
        (graph, name) for graph in ("vision", "decoder") for name in ("int4", "int4a8", "int8", "int8-rows")
    }
    assert all(each.ms > 0 for each in found.values())
    assert found["decoder", "int4"].memory == found["decoder", "int4a8"].memory < found["decoder", "int8"].memory


def test_the_command_keeps_to_the_tolerance_and_tells_what_it_measured(
    tiny_int4_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["export", str(tiny_int4_artifact), str(out), "--precision", "auto", "--tolerance", "1e-5", "--json"]
    assert main(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert max(told["verified"][0]["max_error"]) <= 1e-5
    assert list(tmp_path.iterdir()) == [out]  # what was refused on the way is not left
    manifest = artifacts.load(out).manifest
    chosen = {graph.name: graph.precision for graph in manifest.graphs}
    config = manifest.history[-1].config
    assert config["precision"] == [chosen]
    assert config["auto"]["threads"] == 1
    assert len(config["measured_ms"]) == 8
    assert config["memory_bytes"] > 0


def test_auto_refuses_what_cannot_be(tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    auto = ["export", str(tiny_artifact), str(tmp_path / "out"), "--precision", "auto"]
    assert main([*auto, "--budget-bytes", "1000"]) == 2
    assert "expected graphs that fit into 1,000 bytes" in capsys.readouterr().err
    assert main([*auto, "--to", "gguf"]) == 2
    assert "expected --to onnx with --precision auto, found gguf" in capsys.readouterr().err
    assert main([*auto[:-1], "fp16", "--budget-bytes", "1000"]) == 2
    assert "expected --budget-bytes with --precision auto, found fp16" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_each_graph_in_its_own_precision(tiny_artifact: Path, tmp_path: Path) -> None:
    plan = {"vision": "fp32", "decoder": "int8"}
    manifest = export(artifacts.load(tiny_artifact), tmp_path / "out", precision=plan, tolerance=2.0)
    assert {graph.name: graph.precision for graph in manifest.graphs} == plan
    with pytest.raises(UserError, match=r"expected a precision of .* for weights in .*, found w4a8; choose"):
        export(artifacts.load(tiny_artifact), tmp_path / "other", precision=plan | {"vision": "w4a8"})
