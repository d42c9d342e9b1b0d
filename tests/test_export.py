"""Exported graphs against torch: every geometry, every precision, the packing of int4, and what the stage refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import numpy_helper  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from rlrc import artifact as artifacts  # noqa: E402
from rlrc.artifact import Artifact, LayerSpec, Manifest, TowerSpec  # noqa: E402
from rlrc.compressor.models.storage.tensors import Tensors  # noqa: E402
from rlrc.compressor.models.tiny import TinyPolicy  # noqa: E402
from rlrc.compressor.quantize.grid import decompress  # noqa: E402
from rlrc.compressor.quantize.quantize import QuantizeConfig, quantize  # noqa: E402
from rlrc.compressor.stages import artifact_io  # noqa: E402
from rlrc.errors import UserError  # noqa: E402
from rlrc.exporters.export import Disagreement, export  # noqa: E402
from rlrc.exporters.graphs import FAMILIES  # noqa: E402
from rlrc.exporters.graphs.weights import Weights  # noqa: E402
from rlrc.exporters.onnx.builder import FORMATS, OnnxRuntimeBuilder  # noqa: E402
from rlrc.runtime.cli import main  # noqa: E402
from rlrc.runtime.inference.policy import LocalPolicy  # noqa: E402
from rlrc.runtime.inference.verify import read_golden  # noqa: E402

VISION = TowerSpec(32, (LayerSpec(2, 2, 16, 32), LayerSpec(1, 1, 16, 64)))
GEOMETRIES = {
    "every layer another": (VISION, (LayerSpec(4, 4, 16, 128), LayerSpec(1, 1, 16, 32), LayerSpec(3, 3, 16, 96))),
    "shared keys and values": (VISION, (LayerSpec(4, 2, 16, 64), LayerSpec(6, 3, 16, 64), LayerSpec(4, 1, 16, 64))),
    "layers without heads or MLP": (
        TowerSpec(32, (LayerSpec(0, 0, 16, 32), LayerSpec(2, 2, 16, 0))),
        (LayerSpec(4, 4, 16, 64), LayerSpec(0, 0, 16, 64), LayerSpec(2, 2, 16, 0), LayerSpec(0, 0, 16, 64)),
    ),
    "one layer": (TowerSpec(32, (LayerSpec(2, 2, 16, 32),)), (LayerSpec(2, 1, 16, 32),)),
}


def with_towers(manifest: Manifest, vision: TowerSpec, decoder: Sequence[LayerSpec]) -> Manifest:
    return replace(manifest, towers={"vision": vision, "decoder": TowerSpec(64, tuple(decoder))})


def random_policy(manifest: Manifest, seed: int = 0) -> TinyPolicy:
    """Every weight random, those of norms too, so that none can be left out unnoticed; logits of size 1 to 10."""
    torch.manual_seed(seed)
    policy = TinyPolicy(manifest.policy, manifest.towers).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return policy


def inputs(manifest: Manifest, batch: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(batch)
    policy, (camera,) = manifest.policy, manifest.policy.cameras
    assert policy.state is not None
    return {
        "pixels": random.standard_normal((batch, camera.height, camera.width, 3)).astype(np.float32),
        "ids": random.integers(0, policy.geometry["vocabulary"], (batch, policy.prompt.max_tokens)),
        "state": random.standard_normal((batch, len(policy.state.names))).astype(np.float32),
    }


def in_torch(policy: TinyPolicy, given: dict[str, np.ndarray]) -> np.ndarray:
    with torch.inference_mode():
        return policy(*(torch.from_numpy(given[name]) for name in ("pixels", "ids", "state"))).numpy()


def models(manifest: Manifest, weights: Weights, precision: str) -> dict[str, Any]:
    built = {}
    for name, define in FAMILIES["tiny"].items():
        builder = OnnxRuntimeBuilder(weights, FORMATS[precision])
        define(builder, manifest.policy, manifest.towers)
        built[name] = builder.model(name)
    return built


def session(model: Any) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def in_onnxruntime(graphs: dict[str, Any], given: dict[str, np.ndarray]) -> np.ndarray:
    (image_tokens,) = session(graphs["vision"]).run(["image_tokens"], {"pixels": given["pixels"]})
    decoder = {"image_tokens": image_tokens, "ids": given["ids"], "state": given["state"]}
    (logits,) = session(graphs["decoder"]).run(["logits"], decoder)
    return logits


def floats(policy: TinyPolicy) -> Weights:
    return Weights(Tensors("a policy", policy.state_dict()))


def quantized(
    policy: TinyPolicy, exempt: tuple[str, ...] = (), group: Literal[32, 64, 128] = 32
) -> tuple[Weights, TinyPolicy]:
    """Its int4 weights, and the policy that they mean."""
    tensors, spec, _ = quantize(policy.state_dict(), QuantizeConfig(exempt, group=group))
    meant = TinyPolicy(policy.spec, policy.towers).eval()
    meant.load_state_dict(decompress(tensors, spec))
    return Weights(Tensors("its int4 weights", tensors), spec), meant


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_fp32_graphs_compute_what_torch_does(tiny_manifest: Manifest, geometry: str, batch: int) -> None:
    manifest = with_towers(tiny_manifest, *GEOMETRIES[geometry])
    policy, given = random_policy(manifest), inputs(manifest, batch)
    expected = in_torch(policy, given)
    found = in_onnxruntime(models(manifest, floats(policy), "fp32"), given)
    assert expected.std() > 0.5
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_pictures_need_not_be_square(tiny_manifest: Manifest) -> None:
    camera = replace(tiny_manifest.policy.cameras[0], height=48, width=80)
    manifest = replace(tiny_manifest, policy=replace(tiny_manifest.policy, cameras=(camera,)))
    policy, given = random_policy(manifest), inputs(manifest, 2)
    found = in_onnxruntime(models(manifest, floats(policy), "fp32"), given)
    np.testing.assert_allclose(found, in_torch(policy, given), atol=1e-4)


def test_fp16_is_a_way_to_store_weights(tiny_manifest: Manifest) -> None:
    policy, given = random_policy(tiny_manifest), inputs(tiny_manifest, 2)
    graphs = models(tiny_manifest, floats(policy), "fp16")
    policy.load_state_dict({name: tensor.half().float() for name, tensor in policy.state_dict().items()})
    np.testing.assert_allclose(in_onnxruntime(graphs, given), in_torch(policy, given), atol=1e-4)
    wide = models(tiny_manifest, floats(policy), "fp32")
    for name, graph in graphs.items():
        assert graph.ByteSize() < 0.65 * wide[name].ByteSize()  # the small tensors' nodes weigh in here


EXEMPT = ("decoder.layers.0.attention.k.weight", "decoder.layers.1.mlp.down.weight", "projector.weight")


@pytest.mark.parametrize("exempt", [(), EXEMPT], ids=["all int4", "some int8"])
@pytest.mark.parametrize(("batch", "group"), [(1, 32), (3, 32), (1, 128)])
def test_int4_graphs_compute_what_torch_does_with_the_dequantized_weights(
    tiny_manifest: Manifest, batch: int, group: Literal[32, 128], exempt: tuple[str, ...]
) -> None:
    manifest = with_towers(tiny_manifest, *GEOMETRIES["shared keys and values"])
    dense = random_policy(manifest)
    (weights, meant), given = quantized(dense, exempt, group), inputs(manifest, batch)
    expected = in_torch(meant, given)
    found = in_onnxruntime(models(manifest, weights, "int4"), given)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(in_torch(dense, given) - expected).max() > 0.1  # so the dense weights would have failed


def test_int4_packing_is_the_artifacts_bit_by_bit(tiny_manifest: Manifest) -> None:
    weights, meant = quantized(random_policy(tiny_manifest))
    graph = models(tiny_manifest, weights, "int4")["decoder"].graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    fused = "decoder.layers.0.attention.q+k+v.weight"
    integers, scales = stored[f"{fused}.q"], stored[f"{fused}.scale"]
    assert integers.dtype == np.uint8
    assert scales.dtype == np.float16
    nibbles = np.stack([integers & 15, integers >> 4], -1).reshape(*integers.shape[:2], 32)
    found = (nibbles.astype(np.float32) - 8) * scales.astype(np.float32).reshape(*integers.shape[:2], 1)
    state = meant.state_dict()
    expected = np.concatenate([state[f"decoder.layers.0.attention.{part}.weight"].numpy() for part in "qkv"])
    assert (found.reshape(expected.shape) == expected).all()


@pytest.mark.parametrize("exempt", [(), ("decoder.layers.0.attention.k.weight",)], ids=["MatMulNBits", "unpacked"])
@pytest.mark.parametrize("group", [32, 64])
def test_int4_products_use_the_artifacts_weights_bit_by_bit(
    tiny_manifest: Manifest, group: Literal[32, 64], exempt: tuple[str, ...]
) -> None:
    # The product with the identity is the matrix itself, through ONNX Runtime's own kernel.
    weights, meant = quantized(random_policy(tiny_manifest), exempt, group)
    found = product(weights, "int4", np.eye(64, dtype=np.float32))
    assert (found == matrix(meant)).all()


@pytest.mark.parametrize(
    ("precision", "bits", "mean"), [("int8", 16, 1.2), ("int8", 4, 1.2), ("w4a8", 4, 1.2), ("int8-rows", 16, 0.95)]
)
def test_int8_products_are_close(tiny_manifest: Manifest, precision: str, bits: int, mean: float) -> None:
    # Activations reach 4 sigma, so a step is 8 / 255 sigma and its error 0.9 % of sigma; the sum of two weights reaches
    # 3.4 sigma, a step of 3.4 / 127 and an error of 0.8 %: together 1.2 % of an output, however small its weights.
    # A row of 64 activations reaches 2.5 sigma only, which makes 0.95 %.
    policy = random_policy(tiny_manifest)
    with torch.no_grad():
        policy.decoder.layers[0].attention.q.weight *= torch.logspace(0, -3, 64)[:, None]
    weights, meant = (floats(policy), policy) if bits == 16 else quantized(policy)
    x = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32)
    expected = x @ matrix(meant)
    error = np.linalg.norm(product(weights, precision, x) - expected, axis=0) / np.linalg.norm(expected, axis=0)
    assert abs(100 * error.mean() - mean) < 0.15
    assert error.max() < 0.016


def test_w4a8_stores_four_bits(tiny_manifest: Manifest) -> None:
    weights, _ = quantized(random_policy(tiny_manifest))
    stored = {precision: stored_bytes(models(tiny_manifest, weights, precision)) for precision in ("int4", "w4a8")}
    assert stored["w4a8"] <= stored["int4"] * 1.01


def product(weights: Weights, precision: str, x: np.ndarray) -> np.ndarray:
    """x times the first block's queries, keys and values, as a graph of that one product."""
    builder = OnnxRuntimeBuilder(weights, FORMATS[precision])
    value = builder.input("x", "float32", ("batch", 64))
    names = [f"decoder.layers.0.attention.{part}" for part in "qkv"]
    builder.output("y", builder.linear(value, *names), "float32", ("batch", 3 * 64))
    return session(builder.model("product")).run(["y"], {"x": x})[0]


def matrix(policy: TinyPolicy) -> np.ndarray:
    state = policy.state_dict()
    return np.concatenate([state[f"decoder.layers.0.attention.{part}.weight"].numpy() for part in "qkv"]).T


def stored_bytes(graphs: dict[str, Any]) -> int:
    return sum(len(tensor.raw_data) for graph in graphs.values() for tensor in graph.graph.initializer)


def test_files_hold_little_but_weights(tiny_manifest: Manifest) -> None:
    # The reference family's own widths, where a tenth of the bytes in names and nodes would be a tenth of the claim.
    full, pruned = LayerSpec(10, 10, 32, 640), LayerSpec(1, 1, 32, 64)
    towers = {
        "vision": TowerSpec(128, (LayerSpec(4, 4, 32, 384),) * 3),
        "decoder": TowerSpec(256, (full, *(pruned,) * 10, full)),
    }
    weights, meant = quantized(random_policy(replace(tiny_manifest, towers=towers)))
    graphs = models(replace(tiny_manifest, towers=towers), weights, "int4")
    size = sum(graph.ByteSize() for graph in graphs.values())
    tensors = sum(weights.tensors.read(name).nbytes for name in weights.tensors)
    assert tensors < size < 1.03 * tensors
    parameters = sum(parameter.numel() for parameter in meant.parameters())
    assert size < 0.65 * parameters  # bytes: 4.5 bits for most of the parameters, against 16


def test_an_old_onnxruntime_can_read_the_format(tiny_manifest: Manifest) -> None:
    for graph in models(tiny_manifest, floats(random_policy(tiny_manifest)), "fp16").values():
        assert graph.ir_version <= 10  # onnxruntime 1.18
        assert {opset.domain: opset.version for opset in graph.opset_import} == {"": 20, "com.microsoft": 1}


# The stage


def make_int4(parent: Path, out: Path) -> Path:
    """An int4 artifact, as the quantization stage writes it."""
    dense = artifacts.load(parent)
    weights, spec, _ = quantize(artifact_io.load_policy(dense).state_dict(), QuantizeConfig())
    meant = TinyPolicy(dense.manifest.policy, dense.manifest.towers)
    meant.load_state_dict(decompress(weights, spec))
    with artifacts.create_artifact(out) as draft, np.load(parent / "golden.npz") as observations:
        draft.inherit(dense, "tokenizer")
        save_file(dict(weights), draft.file("weights/model.safetensors"))
        answers: dict[str, Any] = artifact_io.golden(meant, dict(observations))
        np.savez(draft.file("golden.npz"), **answers)
        draft.finish(replace(dense.manifest, dtype="int4", quantization=spec))
    return out


def rewrite(parent: Path, out: Path, manifest: dict[str, Any] | None = None, **files: Any) -> Path:
    """A consistent copy with other fields of the manifest, weights or golden arrays."""
    original = artifacts.load(parent)
    with artifacts.create_artifact(out) as draft:
        draft.inherit(original, "tokenizer")
        tensors = load_file(parent / "weights/model.safetensors") | files.get("tensors", {})
        save_file(tensors, draft.file("weights/model.safetensors"))
        with np.load(parent / "golden.npz") as golden:
            np.savez(draft.file("golden.npz"), **{**golden, **files.get("golden", {})})
        draft.finish(replace(original.manifest, **(manifest or {})))
    return out


def answers(path: Path) -> np.ndarray:
    policy = LocalPolicy.load(path)
    golden = read_golden(path / "golden.npz", policy.spec)
    return np.stack([policy.infer(golden.observation(i, policy.spec))["tokens"] for i in range(len(golden))])


@pytest.mark.parametrize("kind", ["bfloat16", "int4"])
def test_export_adds_verified_graphs_and_keeps_the_rest(tiny_artifact: Path, tmp_path: Path, kind: str) -> None:
    path = tiny_artifact if kind == "bfloat16" else make_int4(tiny_artifact, tmp_path / "int4")
    parent, out = artifacts.load(path), tmp_path / "out"
    export(parent, out)
    exported = artifacts.load(out)
    added = exported.manifest.files.keys() - parent.manifest.files.keys()
    assert added == {"graphs/onnx/vision.onnx", "graphs/onnx/decoder.onnx"}
    assert parent.manifest.files.items() <= exported.manifest.files.items()
    assert {graph.precision for graph in exported.manifest.graphs} == {"fp16" if kind == "bfloat16" else "int4"}
    (record,) = exported.manifest.verified
    assert record.observations == 8
    assert record.token_flips == 0
    *before, entry = exported.manifest.history
    assert tuple(before) == parent.manifest.history
    assert (entry.stage, entry.parent) == ("export", parent.digest)
    with np.load(out / "golden.npz") as golden:
        assert (answers(out) == golden["tokens"]).all()


def test_exporting_again_replaces_the_graphs(tiny_artifact: Path, tmp_path: Path) -> None:
    export(artifacts.load(tiny_artifact), tmp_path / "first")
    before = (tmp_path / "first/graphs/onnx/decoder.onnx").read_bytes()
    export(artifacts.load(tmp_path / "first"), tmp_path / "second", precision="fp32")
    manifest = artifacts.load(tmp_path / "second").manifest
    assert [graph.precision for graph in manifest.graphs] == ["fp32", "fp32"]
    assert len(manifest.verified) == 1
    assert (tmp_path / "first/graphs/onnx/decoder.onnx").read_bytes() == before  # nothing written through a hard link


def test_the_command_reports_in_json(tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tiny_artifact), str(tmp_path / "out"), "--to", "onnx", "--precision", "fp32", "--json"]
    assert main(["export", *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["precision"] == {"onnxruntime": "fp32"}
    assert (
        result["graph_bytes"]["graphs/onnx/decoder.onnx"] == (tmp_path / "out/graphs/onnx/decoder.onnx").stat().st_size
    )
    assert result["verified"][0]["token_flips"] == 0


def test_graphs_that_disagree_are_not_written(
    tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The same observations with another policy's answers.
    original = artifacts.load(tiny_artifact)
    with np.load(tiny_artifact / "golden.npz") as golden:
        other = artifact_io.golden(random_policy(original.manifest, seed=1), dict(golden))
    path = rewrite(tiny_artifact, tmp_path / "other", golden=other)
    with pytest.raises(Disagreement) as error:
        export(artifacts.load(path), tmp_path / "out")
    assert error.value.record.token_flips > 0
    assert main(["export", str(path), str(tmp_path / "out")]) == 1
    assert "the worst observation is in" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["other", "out.worst.npz"]
    worst = np.load(tmp_path / "out.worst.npz")
    with np.load(tiny_artifact / "golden.npz") as golden:
        (index,) = (i for i in range(8) if np.array_equal(golden["actions"][i], worst["found"]))
        assert np.array_equal(golden["image.corner4"][index], worst["image.corner4"])
        differences = np.abs(other["actions"] - golden["actions"]) / original.manifest.policy.action.norm.scale
    np.testing.assert_allclose(worst["expected"], other["actions"][index])
    assert differences.max((1, 2)).argmax() == index
    # Allowed, if that is what somebody wants: no error exceeds the range of the actions.
    assert main(["export", str(path), str(tmp_path / "out"), "--tolerance", "100"]) == 0


def refuse(parent: Artifact, out: Path, reason: str, **options: Any) -> None:
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError, match=reason):
        export(parent, out, **options)
    assert sorted(out.parent.iterdir()) == before


def test_a_disk_too_small_is_refused_before_anything_is_written(
    tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = artifacts.load(tiny_artifact)
    weights = parent.manifest.files["weights/model.safetensors"].size
    free = 3 * weights  # a graph, and its constants until it is written
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    refuse(
        parent,
        tmp_path / "out",
        r"expected [1-9][\d,]+ bytes of free space in .* for fp32, found [\d,]+;",
        precision="fp32",
    )
    export(parent, tmp_path / "out", precision="fp16")  # half of that


def test_a_tensor_of_another_shape_is_refused(tiny_artifact: Path, tmp_path: Path) -> None:
    wrong = {"decoder.layers.1.mlp.gate.weight": torch.zeros(32, 64, dtype=torch.bfloat16)}
    path = rewrite(tiny_artifact, tmp_path / "wrong", tensors=wrong)
    refuse(artifacts.load(path), tmp_path / "out", r"expected \(64, 64\).*gate.*found \(32, 64\)")


def test_weights_beyond_float16_are_refused_where_they_would_be_stored_so(tiny_artifact: Path, tmp_path: Path) -> None:
    state = load_file(tiny_artifact / "weights/model.safetensors")
    large = {"decoder.layers.0.mlp.gate.weight": state["decoder.layers.0.mlp.gate.weight"] * 1e7}
    path = rewrite(tiny_artifact, tmp_path / "large", tensors=large)
    refuse(artifacts.load(path), tmp_path / "out", "gate.*float16.*fp32")


def test_an_unknown_family_is_refused(tiny_artifact: Path, tmp_path: Path) -> None:
    parent = artifacts.load(tiny_artifact)
    spec = replace(parent.manifest.policy, family="huge")
    path = rewrite(tiny_artifact, tmp_path / "huge", {"policy": spec})
    refuse(artifacts.load(path), tmp_path / "out", "families tiny.*found 'huge'")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"precision": "int4"}, "fp16, fp32, int8.*bfloat16.*found int4"),
        ({"tolerance": 0.0}, "positive tolerance"),
        ({"tolerance": float("nan")}, "positive tolerance"),
    ],
)
def test_impossible_requests_are_refused(
    tiny_artifact: Path, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    refuse(artifacts.load(tiny_artifact), tmp_path / "out", reason, **options)


def test_an_existing_output_is_refused_and_left_alone(
    tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("precious")
    assert main(["export", str(tiny_artifact), str(tmp_path / "out")]) == 2
    assert "already there" in capsys.readouterr().err
    assert (tmp_path / "out/mine").read_text() == "precious"


def test_what_is_no_artifact_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert "found nothing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
