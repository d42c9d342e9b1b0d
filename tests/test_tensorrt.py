"""TensorRT's graphs of every family, on their stand-in: against torch, in every precision, and what is refused.

Whether NVIDIA's builder takes them: tests/test_jetson_check.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, numpy_helper  # noqa: E402

from families import DATA, FAMILIES, flags, official  # noqa: E402
from rlrc import artifact as artifacts  # noqa: E402
from rlrc.artifact import Artifact, LayerSpec, TowerSpec  # noqa: E402
from rlrc.artifact.build_plan import PLAN, fits, read_plan  # noqa: E402
from rlrc.compressor.models.storage.tensors import Tensors  # noqa: E402
from rlrc.compressor.models.tiny import TinyPolicy  # noqa: E402
from rlrc.compressor.prune.prune import PruneConfig  # noqa: E402
from rlrc.compressor.quantize.grid import unpack  # noqa: E402
from rlrc.compressor.quantize.quantize import QuantizeConfig, quantize  # noqa: E402
from rlrc.compressor.stages import artifact_io, prune  # noqa: E402
from rlrc.compressor.stages import quantize as stages_quantize  # noqa: E402
from rlrc.compressor.stages.sources import examples  # noqa: E402
from rlrc.compressor.stages.stage import StageOptions  # noqa: E402
from rlrc.errors import UserError  # noqa: E402
from rlrc.exporters.export import export  # noqa: E402
from rlrc.exporters.graphs import FAMILIES as GRAPHS  # noqa: E402
from rlrc.exporters.graphs import builder  # noqa: E402
from rlrc.exporters.graphs.weights import Weights  # noqa: E402
from rlrc.exporters.tensorrt.builder import TensorRTBuilder, TensorRTFormat  # noqa: E402
from rlrc.exporters.tensorrt.cpu_reference import CpuReferenceEngine, open_session  # noqa: E402
from rlrc.exporters.tensorrt.int8 import int8_scale  # noqa: E402
from rlrc.exporters.tensorrt.target import choose_precision  # noqa: E402
from rlrc.runtime.inference.policy import LocalPolicy  # noqa: E402
from rlrc.runtime.inference.verify import read_golden  # noqa: E402

QUIET = StageOptions(evaluate=0, workers=1, threads=1)
ARTIFACTS = [(name, kind) for name in FAMILIES for kind in ("dense", "pruned")]
OF = Callable[[str, str], Artifact]
EXPORTED = Callable[..., Artifact]


@pytest.fixture(scope="module")
def exported(of: OF, tmp_path_factory: pytest.TempPathFactory) -> EXPORTED:
    """The same with graphs of this precision, within the default tolerance or a given one; each is made once."""
    folder, made = tmp_path_factory.mktemp("exported"), dict[tuple[Any, ...], Artifact]()

    def make(name: str, kind: str, precision: str | None = None, tolerance: float | None = None) -> Artifact:
        key = (name, kind, precision, tolerance)
        if key not in made:
            export(of(name, kind), folder / str(len(made)), ("tensorrt",), precision, tolerance)
            made[key] = artifacts.load(folder / str(len(made)))
        return made[key]

    return make


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> OF:
    """The artifact of a family, "dense", "pruned" or "int4"; each is made once."""
    folder, made = tmp_path_factory.mktemp("artifacts"), dict[tuple[str, str], Artifact]()

    def make(name: str, kind: str) -> Artifact:
        if (name, kind) not in made:
            out, given = folder / f"{name}-{kind}", DATA / name / "checkpoint"
            if kind == "int4":
                stages_quantize.run_quantize(given, out, QuantizeConfig(), QUIET, flags(name))
            elif kind == "pruned":
                keep = 0 if name in ("act", "openvla-oft-l1") else 1
                config = PruneConfig(ratio=0.5, score="magnitude", keep=keep)
                prune.run_prune(given, out, config, QUIET, flags(name))
            else:
                source, policy = official(name)
                with artifacts.create_artifact(out) as draft:
                    source.copy_files(draft)
                    observations = examples(policy.spec, source.tokenizer)
                    artifact_io.write_policy(draft, policy, observations, (), exact=True)
            made[name, kind] = artifacts.load(out)
        return made[name, kind]

    return make


def models(artifact: Artifact) -> list[Any]:
    return [onnx.load(artifact.file(graph.file)) for graph in artifact.manifest.graphs]


# Whole policies


@pytest.mark.parametrize(("name", "kind"), ARTIFACTS)
def test_fp32_is_torch(name: str, kind: str, exported: EXPORTED) -> None:
    artifact = exported(name, kind, "fp32")
    (record,) = artifact.manifest.verified
    assert record.backend == "tensorrt"
    assert record.versions["stand-in"] == "onnxruntime's CPU provider"
    assert max(record.max_error) < 1e-4  # actions are of size 0.1 to 4
    assert record.token_flips == 0


@pytest.mark.parametrize(("name", "kind"), [each for each in ARTIFACTS if each[0] != "pi05"])
def test_fp16_is_within_a_hundredth_of_the_range(name: str, kind: str, exported: EXPORTED) -> None:
    artifact = exported(name, kind)
    (record,) = artifact.manifest.verified
    assert {graph.precision for graph in artifact.manifest.graphs} == {"fp16"}
    assert max(record.range_error) < 0.01  # held to that by the export; and it is rounded indeed:
    assert record.tokens or max(record.max_error) > 1e-4


@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_what_overflows_float16_gets_bfloat16(kind: str, of: OF, exported: EXPORTED) -> None:
    artifact = exported("pi05", kind)
    assert {graph.precision for graph in artifact.manifest.graphs} == {"bf16"}
    assert max(artifact.manifest.verified[0].range_error) < 0.01
    with pytest.raises(UserError, match=r"activations of pi05, found fp16, which they overflow; use --precision bf16"):
        choose_precision(of("pi05", kind), "fp16")


@pytest.mark.parametrize("name", FAMILIES)
def test_int4_is_the_quantized_policy(name: str, of: OF, exported: EXPORTED) -> None:
    artifact = exported(name, "int4")
    assert {graph.precision for graph in artifact.manifest.graphs} == {"int4"}
    assert max(artifact.manifest.verified[0].range_error) < 0.02
    plan = read_plan(artifact.file(PLAN))
    assert plan.int4_block == 32
    assert plan.least_sm == 80
    check_integers(of(name, "int4"), models(artifact))


def check_integers(parent: Artifact, graphs: list[Any]) -> None:
    """Every 4-bit constant of the graphs holds the artifact's integers and scales, transposed."""
    stored, spec = artifact_io.open_tensors(parent), parent.manifest.quantization
    assert spec is not None
    found, known = 0, {tensor.name: tensor for graph in graphs for tensor in graph.graph.initializer}
    for name, tensor in known.items():
        if tensor.data_type != TensorProto.INT4:
            continue
        first, *others = name.removesuffix(".weight.q").split("+")
        names = [f"{each}.weight" for each in (first, *(f"{first.rpartition('.')[0]}.{other}" for other in others))]
        integers = torch.cat([unpack(stored[f"{each}.q"]) for each in names]).numpy()
        assert (numpy_helper.to_array(tensor).astype(np.int8) == integers.T).all()
        scales = torch.cat([stored[f"{each}.scale"] for each in names]).float()
        kept = known[f"{name.removesuffix('.q')}.scale"]
        if kept.data_type == TensorProto.BFLOAT16:
            scales = scales.bfloat16().float()
        expected = torch.where(scales == 0, 1, scales).T.numpy()
        assert (numpy_helper.to_array(kept).astype(np.float32) == expected).all()
        found += len(names)
    assert found == sum(bits == 4 for bits in spec.tensors.values())


@pytest.mark.parametrize("name", ["act", "openvla-oft-l1", "smolvla"])
@pytest.mark.parametrize(("precision", "tolerance"), [("int8", 0.2), ("fp8", 1.5)])
def test_products_of_8_bits_are_near(name: str, precision: str, tolerance: float, exported: EXPORTED) -> None:
    """Tiny random policies are more sensitive than trained ones; but no graph is built wrongly."""
    artifact = exported(name, "pruned", precision, tolerance=tolerance)
    assert read_plan(artifact.file(PLAN)).least_sm == {"int8": 72, "fp8": 89}[precision]
    kinds = [node.op_type for model in models(artifact) for node in model.graph.node]
    assert kinds.count("QuantizeLinear") > 4
    assert kinds.count("DequantizeLinear") == 2 * kinds.count("QuantizeLinear")


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int4", "int8", "fp8"])
def test_only_standard_operators_of_one_opset_and_consistent_types(precision: str, exported: EXPORTED) -> None:
    for name in ("openvla", "smolvla", "act"):
        kind = "int4" if precision == "int4" else "pruned"
        for model in models(exported(name, kind, precision, tolerance=2.0)):
            assert {opset.domain: opset.version for opset in model.opset_import} == {"": 21}
            assert {node.domain for node in model.graph.node} == {""}
            onnx.checker.check_model(model, full_check=True)


def test_the_plan_bounds_what_the_drivers_pass(exported: EXPORTED) -> None:
    for name in FAMILIES:
        artifact = exported(name, "pruned", "fp32")
        plan, engine = read_plan(artifact.file(PLAN)), CpuReferenceEngine(artifact)
        graphs = {graph.name: graph for graph in plan.graphs}
        used: set[tuple[str, int]] = set()

        class Watched:
            def __init__(self, used: set[tuple[str, int]], engine: CpuReferenceEngine, graphs: dict[str, Any]) -> None:
                self.used, self.engine, self.graphs = used, engine, graphs

            def run(self, graph: str, inputs: Any) -> dict[str, Any]:
                # How long a past the engine keeps, and of how many observations.
                kept = {"past": int(inputs["start"][0]) if "start" in inputs else None, "batch": 1}
                shapes = {
                    tensor.name: inputs[tensor.name].shape
                    if tensor.name in inputs
                    else tuple(kept.get(size, size) for size in tensor.shape)
                    for tensor in self.graphs[graph].inputs
                }
                fitting = [i for i, each in enumerate(self.graphs[graph].profiles) if fits(each, shapes)]
                assert len(fitting) == 1, (graph, shapes)
                self.used.add((graph, fitting[0]))
                return self.engine.run(graph, inputs)

            def versions(self) -> dict[str, str]:
                return self.engine.versions()

        policy = LocalPolicy(artifact, backend="tensorrt", engine=Watched(used, engine, graphs))
        golden = read_golden(artifact.file("golden.npz"), policy.spec)
        policy.infer(golden.observation(0, policy.spec))
        assert used == {(graph.name, i) for graph in plan.graphs for i in range(len(graph.profiles))}


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_weights_beside_large_graphs_are_in_the_plan(
    kind: str, of: OF, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = of("pi05", "pruned")
    if kind == "int8":
        config = QuantizeConfig(bits=8)
        stages_quantize.run_quantize(DATA / "pi05/checkpoint", tmp_path / "int8", config, QUIET, flags("pi05"))
        parent = artifacts.load(tmp_path / "int8")
    monkeypatch.setattr(builder, "LARGE", 10_000)
    export(parent, tmp_path / "out", ("tensorrt",))
    artifact = artifacts.load(tmp_path / "out")
    assert {graph.precision for graph in artifact.manifest.graphs} == {"bf16"}
    for graph in read_plan(artifact.file(PLAN)).graphs:
        first, beside = graph.files
        assert (first, beside) == (f"graphs/tensorrt/{graph.name}.onnx", f"graphs/tensorrt/{graph.name}.onnx.data")
        assert graph.files == {name: artifact.manifest.files[name].sha256 for name in graph.files}
        assert artifact.manifest.files[beside].size > 10_000


# The reference family


def random_policy(manifest: Any) -> TinyPolicy:
    torch.manual_seed(0)
    policy = TinyPolicy(manifest.policy, manifest.towers).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return policy


def built(define: Callable[[Any], None], weights: Weights, format: TensorRTFormat, path: Path) -> Any:
    b = TensorRTBuilder(weights, format)
    define(b)
    b.write("graph", path)
    return open_session(path, threads=1)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("batch", [1, 3])
def test_the_reference_family(tiny_manifest: Any, batch: int, tmp_path: Path) -> None:
    vision = TowerSpec(32, (LayerSpec(0, 0, 16, 32), LayerSpec(2, 2, 16, 0)))
    decoder = TowerSpec(64, (LayerSpec(4, 2, 16, 64), LayerSpec(0, 0, 16, 64), LayerSpec(6, 3, 16, 33)))
    manifest = replace(tiny_manifest, towers={"vision": vision, "decoder": decoder})
    policy, random = random_policy(manifest), np.random.default_rng(batch)
    (camera,), spec = manifest.policy.cameras, manifest.policy
    pixels = random.standard_normal((batch, camera.height, camera.width, 3)).astype(np.float32)
    ids = random.integers(0, spec.geometry["vocabulary"], (batch, spec.prompt.max_tokens))
    state = random.standard_normal((batch, 3)).astype(np.float32)
    with torch.inference_mode():
        expected = policy(*map(torch.from_numpy, (pixels, ids, state))).numpy()
    weights = Weights(Tensors("a policy", policy.state_dict()))
    sessions = {
        name: built(
            lambda b, d=define: d(b, spec, manifest.towers), weights, TensorRTFormat("float32"), tmp_path / name
        )
        for name, define in GRAPHS["tiny"].items()
    }
    (seen,) = sessions["vision"].run(None, {"pixels": pixels})
    (found,) = sessions["decoder"].run(None, {"image_tokens": seen, "ids": ids, "state": state})
    np.testing.assert_allclose(found, expected, atol=1e-4)
    reshapes = [node.input[1] for node in onnx.load(tmp_path / "vision").graph.node if node.op_type == "Reshape"]
    shapes = {tensor.name: tensor.dims[0] for tensor in onnx.load(tmp_path / "vision").graph.initializer if tensor.dims}
    assert max(shapes[name] for name in reshapes) <= 8  # TensorRT has no more dimensions


# Single products


def product(weights: Weights, format: TensorRTFormat, x: np.ndarray, path: Path, *parts: str) -> np.ndarray:
    def define(b: TensorRTBuilder) -> None:
        rows = b.input("x", "float32", ("rows", x.shape[1]))
        b.output("y", b.linear(rows, *(f"layer.{part}" for part in parts)), "float32", ("rows", "columns"))

    return built(define, weights, format, path).run(None, {"x": x})[0]


def layers(**shapes: tuple[int, int]) -> dict[str, Any]:
    torch.manual_seed(0)
    return {f"layer.{name}.weight": torch.randn(*shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_the_stand_in_rounds_where_a_gpu_does(kind: str, tmp_path: Path) -> None:
    """Both operands and the result, with sums in float32: torch's own arithmetic, bit by bit but for the sums."""
    state, dtype = layers(a=(48, 64)), getattr(torch, kind)
    x = torch.randn(40, 64)
    found = product(Weights(Tensors("one", state)), TensorRTFormat(kind), x.numpy(), tmp_path / "m.onnx", "a")  # type: ignore[arg-type]
    exact = x @ state["layer.a.weight"].T
    rounded = (x.to(dtype).float() @ state["layer.a.weight"].to(dtype).float().T).to(dtype).float().numpy()
    assert np.mean(found == rounded) > 0.98  # the others are at the border between two values
    np.testing.assert_allclose(found, rounded, rtol=2 ** (-7 if kind == "bfloat16" else -10), atol=1e-3)
    assert np.abs(found - exact.numpy()).max() > 1e-3


def test_layers_on_other_grids_are_products_of_their_own(tmp_path: Path) -> None:
    """Integers of 4 and of 8 bits and floats side by side; an odd number of outputs has no pairs and is widened."""
    state = layers(q=(32, 64), k=(16, 64), v=(15, 64), o=(8, 64))
    packed, spec, _ = quantize(state, QuantizeConfig())
    tensors = dict(packed)
    mixed, other, _ = quantize(state, QuantizeConfig(("layer.k.weight",)))
    tensors |= {name: mixed[name] for name in mixed if name.startswith("layer.k")}
    spec = replace(spec, tensors=spec.tensors | {"layer.k.weight": other.tensors["layer.k.weight"]})
    for part in ("q", "scale"):
        del tensors[f"layer.o.weight.{part}"]
    tensors["layer.o.weight"] = state["layer.o.weight"]
    spec = replace(spec, tensors={name: bits for name, bits in spec.tensors.items() if name != "layer.o.weight"})
    weights = Weights(Tensors("four", tensors), spec)
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    found = product(weights, TensorRTFormat("float32", keep_int4=True), x, tmp_path / "m.onnx", "q", "k", "v", "o")
    expected = x @ np.concatenate([weights.values(f"layer.{part}.weight") for part in "qkvo"]).T
    np.testing.assert_allclose(found, expected, atol=1e-4)
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert stored["layer.q.weight.q"].data_type == TensorProto.INT4
    assert stored["layer.v.weight"].data_type == TensorProto.FLOAT


def test_a_layer_keeps_its_own_group(tmp_path: Path) -> None:
    """Of at most 128 inputs: of 160 only 32 can share a scale."""
    tensors, spec, _ = quantize(layers(a=(8, 256), b=(8, 160)), QuantizeConfig(group=128))
    weights = Weights(Tensors("two", tensors), spec)
    for name, inputs, group in (("a", 256, 128), ("b", 160, 32)):
        x, path = np.random.default_rng(0).standard_normal((3, inputs)).astype(np.float32), tmp_path / f"{name}.onnx"
        found = product(weights, TensorRTFormat("float32", keep_int4=True), x, path, name)
        np.testing.assert_allclose(found, x @ weights.values(f"layer.{name}.weight").T, atol=1e-4)
        (node,) = (node for node in onnx.load(path).graph.node if node.op_type == "DequantizeLinear")
        assert {one.name: one.i for one in node.attribute} == {"axis": 0, "block_size": group}


def test_a_group_of_zeros_gets_a_scale_that_tensorrt_takes(tmp_path: Path) -> None:
    state = layers(a=(8, 64))
    state["layer.a.weight"][2, :32] = 0
    tensors, spec, _ = quantize(state, QuantizeConfig())
    assert (tensors["layer.a.weight.scale"] == 0).sum() == 1
    weights, x = Weights(Tensors("one", tensors), spec), np.ones((1, 64), np.float32)
    found = product(weights, TensorRTFormat("float32", keep_int4=True), x, tmp_path / "m.onnx", "a")
    np.testing.assert_allclose(found, x @ weights.values("layer.a.weight").T, atol=1e-5)
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert (numpy_helper.to_array(stored["layer.a.weight.scale"]) != 0).all()


def test_8_bit_products_are_close(tmp_path: Path) -> None:
    # Inputs reach 4 sigma: a step of 4 / 127 sigma and an error of 0.9 %; weights up to 3 sigma, 0.7 %: 1.1 % together.
    state, x = layers(a=(48, 256)), np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
    format = TensorRTFormat("float16", scales={"layer.a.weight": float(np.abs(x).max()) / 127})
    found = product(Weights(Tensors("one", state)), format, x, tmp_path / "m.onnx", "a")
    expected = x @ state["layer.a.weight"].numpy().T
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert 0.008 < error < 0.014


def test_8_bit_floats_are_those_of_torch(tmp_path: Path) -> None:
    state, x = layers(a=(48, 256)), np.random.default_rng(0).standard_normal((9, 256)).astype(np.float32)
    x[3] *= 1e-4  # a row of small numbers keeps its digits
    one = float(np.abs(x).max()) / 448
    weights = Weights(Tensors("one", state))
    format = TensorRTFormat("float16", scales={"layer.a.weight": one}, eight="fp8")
    found = product(weights, format, x, tmp_path / "m.onnx", "a")

    def rounded(values: Any, one: float) -> Any:
        return (values / one).to(torch.float8_e4m3fn).float() * one

    weight = state["layer.a.weight"].float()
    expected = rounded(torch.from_numpy(x), one) @ rounded(weight, float(weight.abs().max()) / 448).T
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-6)
    exact = x @ weight.numpy().T
    assert 0.02 < np.linalg.norm(found[:3] - exact[:3]) / np.linalg.norm(exact[:3]) < 0.05  # 3 bits of mantissa
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert stored["layer.a.weight.q"].data_type == TensorProto.FLOAT8E4M3FN


def test_a_static_scale_is_taken_where_it_is_fine_enough() -> None:
    # 127 / 127 is a step of 1, an error of 1 / sqrt(12) = 0.289; allowed are 2 % of the root mean square.
    assert int8_scale(np.array([[127, 400], [60, 20]], np.float32)) == pytest.approx(1)  # rms sqrt(210) = 14.49: 1.99 %
    assert int8_scale(np.array([[127, 400], [60, 10]], np.float32)) is None  # rms sqrt(205) = 14.32: 2.02 %
    assert int8_scale(np.zeros((3, 2), np.float32)) is None


# What is refused


def test_precisions_that_the_weights_do_not_have_are_refused(of: OF) -> None:
    assert choose_precision(of("pi0", "dense"), None) == "fp16"
    with pytest.raises(UserError, match=r"fp16, bf16, fp32, int8, fp8 .*bfloat16 on TensorRT, found int4"):
        choose_precision(of("pi0", "dense"), "int4")
    with pytest.raises(UserError, match=r"int4, fp16, bf16, int8, fp8 .*int4 on TensorRT, found w4a8"):
        choose_precision(of("pi0", "int4"), "w4a8")
    with pytest.raises(UserError, match=r"int4, bf16, int8, fp8 .*found fp32"):
        choose_precision(of("pi05", "int4"), "fp32")


def test_weights_beyond_float16_are_refused(tmp_path: Path) -> None:
    state = layers(a=(4, 8))
    state["layer.a.weight"] *= 1e6
    with pytest.raises(UserError, match=r"layer.a.weight within float16's range, found .*use --precision bf16"):
        product(
            Weights(Tensors("one", state)),
            TensorRTFormat("float16"),
            np.ones((1, 8), np.float32),
            tmp_path / "m.onnx",
            "a",
        )
