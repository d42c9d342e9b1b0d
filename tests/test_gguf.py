"""Policies on llama.cpp against torch: every family that it runs, dense and pruned, in floats and quantized."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; make gguf builds it")

from families import DATA, flags, official  # noqa: E402
from rlrc import artifact as artifacts  # noqa: E402
from rlrc.artifact import Artifact, LayerSpec, TowerSpec  # noqa: E402
from rlrc.compressor.checkpoints.torch_policy import TorchPolicy  # noqa: E402
from rlrc.compressor.models.families import build  # noqa: E402
from rlrc.compressor.models.nn.decoder import Decoder, causal_mask  # noqa: E402
from rlrc.compressor.models.storage.tensors import Tensors  # noqa: E402
from rlrc.compressor.prune.prune import PruneConfig  # noqa: E402
from rlrc.compressor.quantize.quantize import QuantizeConfig, quantize  # noqa: E402
from rlrc.compressor.stages import artifact_io, prune  # noqa: E402
from rlrc.compressor.stages.sources import examples  # noqa: E402
from rlrc.compressor.stages.stage import StageOptions  # noqa: E402
from rlrc.errors import UserError  # noqa: E402
from rlrc.exporters.export import Disagreement, export  # noqa: E402
from rlrc.exporters.gguf import file  # noqa: E402
from rlrc.exporters.gguf.target import write_blocks  # noqa: E402
from rlrc.exporters.graphs.weights import Weights  # noqa: E402
from rlrc.runtime.cli import main  # noqa: E402
from rlrc.runtime.inference.backends import llama_model  # noqa: E402
from rlrc.runtime.inference.backends.llama_model import LlamaModel  # noqa: E402
from rlrc.runtime.inference.decode import NoAction  # noqa: E402
from rlrc.runtime.inference.policy import LocalPolicy  # noqa: E402
from rlrc.runtime.inference.verify import read_golden  # noqa: E402

NAMES = ("openvla", "openvla-oft-l1", "openvla-oft-discrete")
QUIET = StageOptions(evaluate=0, workers=1, threads=1)
CLOSE = 1e-4  # in action units

FULL, NARROW = LayerSpec(4, 2, 32, 160), LayerSpec(1, 1, 32, 64)
TOWERS = {
    "of one shape": TowerSpec(64, (FULL,) * 3, eps=1e-6, theta=500.0),
    "of every shape": TowerSpec(64, (FULL, NARROW, LayerSpec(3, 3, 32, 96), FULL)),
    "of odd widths": TowerSpec(20, (LayerSpec(4, 2, 6, 33), LayerSpec(6, 1, 6, 5))),
    "without some parts": TowerSpec(64, (FULL, replace(FULL, mlp=0), LayerSpec(0, 0, 32, 96), NARROW)),
    "without anything in the first": TowerSpec(64, (LayerSpec(0, 0, 32, 0), FULL, LayerSpec(0, 0, 32, 64))),
}


# The blocks alone


def random_decoder(tower: TowerSpec) -> tuple[Decoder, Weights]:
    generator = torch.Generator().manual_seed(0)
    decoder = Decoder(tower).eval()
    with torch.no_grad():
        for tensor in decoder.state_dict().values():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.1 * noise if tensor.ndim == 1 else noise / max(1, tensor.shape[1]) ** 0.5)
    state = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    return decoder, Weights(Tensors("the test", state))


def in_torch(decoder: Decoder, x: np.ndarray, causal: bool) -> np.ndarray:
    with torch.inference_mode():
        hidden, _ = decoder(torch.from_numpy(x)[None], causal_mask(len(x)) if causal else None)
    return np.asarray(hidden[0])


def vectors(tower: TowerSpec, length: int = 40, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((length, tower.width)).astype(np.float32)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("kind", TOWERS)
def test_blocks(kind: str, causal: bool, tmp_path: Path) -> None:
    tower = TOWERS[kind]
    decoder, weights = random_decoder(tower)
    x = vectors(tower)
    expected = in_torch(decoder, x, causal)  # of size 4
    for precision, close in (("fp32", 2e-5), ("fp16", 1e-2)):
        file.write(tmp_path / "model.gguf", weights, tower, precision)
        model = LlamaModel(tmp_path / "model.gguf", tower.width, precision, causal, threads=1)
        model.begin(40)
        np.testing.assert_allclose(model.run(x, 40), expected, rtol=0, atol=close)
        if not causal:
            continue
        model.begin(40)  # the same in pieces, which continue what was kept
        found = [model.run(x[:30], 2), *(model.run(row[None], 1) for row in x[30:])]
        np.testing.assert_allclose(np.concatenate(found), expected[28:], rtol=0, atol=close)


def test_a_longer_sequence_gets_more_room(tmp_path: Path) -> None:
    tower = TOWERS["of every shape"]
    decoder, weights = random_decoder(tower)
    file.write(tmp_path / "model.gguf", weights, tower, "fp32")
    model = LlamaModel(tmp_path / "model.gguf", tower.width, "fp32", causal=False, threads=2)
    for length in (5, 300, 7, 600):
        x = vectors(tower, length, seed=length)
        model.begin(length)
        np.testing.assert_allclose(model.run(x, length), in_torch(decoder, x, causal=False), rtol=0, atol=2e-5)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_4_bits_are_not_mapped_beside_what_is_made_of_them(tmp_path: Path) -> None:
    """Floats are computed where they lie, in the page cache."""
    tower = TowerSpec(256, (LayerSpec(8, 4, 32, 512),) * 2)
    decoder, weights = random_decoder(tower)
    state = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    result = quantize(state, QuantizeConfig(search=False))
    integers = Weights(Tensors("the test", result.tensors), result.spec)
    for precision, given, mapped in (("int4", integers, False), ("fp16", weights, True)):
        path = tmp_path / f"{precision}.gguf"
        file.write(path, given, tower, precision)
        model = LlamaModel(path, 256, precision, causal=True, threads=1)
        assert (str(path) in Path("/proc/self/maps").read_text()) == mapped
        model.begin(40)
        assert np.isfinite(model.run(vectors(tower), 40)).all()


def test_k_quants_are_llama_cpps_own(tmp_path: Path) -> None:
    """4.8 bits a weight: nearer to the floats than round-to-nearest on groups of 32 in 4.5."""
    tower = TowerSpec(256, (LayerSpec(8, 4, 32, 512), LayerSpec(8, 8, 32, 256), LayerSpec(8, 4, 32, 512)))
    decoder, weights = random_decoder(tower)
    write_blocks(tmp_path / "model.gguf", weights, tower, "q4_k_m")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    numbers = sum(tensor.numel() for tensor in decoder.state_dict().values())
    assert 4.5 < (tmp_path / "model.gguf").stat().st_size * 8 / numbers < 6.6
    model = LlamaModel(tmp_path / "model.gguf", 256, "q4_k_m", causal=True, threads=1)
    x = vectors(tower)
    model.begin(40)
    found, expected = model.run(x, 40), in_torch(decoder, x, causal=True)
    assert 0.01 < np.abs(found - expected).mean() / np.abs(expected).mean() < 0.2  # random weights forgive nothing


# Whole policies


def observations(name: str) -> list[dict[str, Any]]:
    source, _ = official(name)
    arrays = examples(source.spec, source.tokenizer, seed=5)
    texts = arrays.pop("instructions")
    arrays.pop("ids")
    return [{key: array[i] for key, array in arrays.items()} | {"instruction": str(texts[i])} for i in range(2)]


def check_same(exported: Path, origin: Artifact, name: str, close: float = CLOSE) -> None:
    """llama.cpp's actions and tokens are those of the artifact's weights in torch, from other observations than its."""
    source, _ = official(name)
    local = LocalPolicy.load(exported)
    assert local.backend == "gguf"
    reference = TorchPolicy(local.spec, source.tokenizer, lambda: artifact_io.load_policy(origin))
    for row in (*observations(name), observations(name)[0]):  # the first once more: nothing is left of the others
        found, expected = local.infer(row), reference.infer(row)
        if expected["tokens"] is not None:
            assert found["tokens"].tolist() == expected["tokens"].tolist()
        np.testing.assert_allclose(found["actions"], expected["actions"], rtol=0, atol=close)


def architecture_of(exported: Path) -> str:
    field = gguf.GGUFReader(exported / "graphs/gguf/decoder.gguf").get_field("general.architecture")
    assert field is not None
    return str(field.contents())


@pytest.mark.parametrize("name", NAMES)
def test_dense_and_pruned(name: str, tmp_path: Path) -> None:
    folder, keep = DATA / name / "checkpoint", 0 if name == "openvla-oft-l1" else 1
    prune.run_prune(folder, tmp_path / "dense", PruneConfig(lossless=True), QUIET, flags(name))
    prune.run_prune(folder, tmp_path / "pruned", PruneConfig(0.5, "magnitude", keep=keep), QUIET, flags(name))
    for kind in ("dense", "pruned"):
        artifact, out = artifacts.load(tmp_path / kind), tmp_path / f"{kind} in fp32"
        manifest = export(artifact, out, ("gguf",), "fp32")
        assert {graph.backend for graph in manifest.graphs} == {"gguf"}
        check_same(out, artifact, name)
        assert architecture_of(out) == ("deci" if kind == "pruned" and keep else "llama")
        record = export(artifact, tmp_path / f"{kind} in fp16", ("gguf",)).verified[-1]
        assert (record.backend, record.token_flips) == ("gguf", 0)
        assert max(record.range_error) < 0.01


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized(name: str, bits: Any, tmp_path: Path) -> None:
    """Against the artifact's own integers in torch: within 2 % of the range."""
    source, _ = official(name)
    layers = (LayerSpec(4, 2, 32, 64), LayerSpec(2, 2, 32, 96), LayerSpec(4, 2, 32, 64))
    towers = source.towers | {"decoder": replace(source.towers["decoder"], width=64, layers=layers)}
    spec = source.spec
    projector = [*spec.geometry["projector"][:-1], 64]
    policy = build(replace(spec, geometry=spec.geometry | {"projector": projector}), towers).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in policy.state_dict().values():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(0.5 + 0.25 * noise if tensor.ndim == 1 else noise / tensor[0].numel() ** 0.5)
    with artifacts.create_artifact(tmp_path / "quantized") as draft:
        source.copy_files(draft)
        result = quantize(policy, QuantizeConfig(bits=bits))
        artifact_io.write_policy(draft, policy, examples(spec, source.tokenizer), (), result)
    artifact = artifacts.load(tmp_path / "quantized")
    assert artifact.manifest.quantization is not None
    inside = [tensor for tensor in artifact.manifest.quantization.tensors if tensor.startswith("decoder.layers")]
    assert len(inside) == 7 * 3
    manifest = export(artifact, tmp_path / "out", ("gguf",))
    assert {graph.name: graph.precision for graph in manifest.graphs}["decoder"] == f"int{bits}"
    assert manifest.verified[-1].token_flips == 0
    assert manifest.verified[-1].range_tolerance == (0.02 if bits == 4 else 0.01)
    for precision, around in (("int4a8", "int4a8"), ("int8+int4", "int8-rows")) if bits == 4 else ():
        manifest = export(artifact, tmp_path / precision, ("gguf",), precision, tolerance=10.0)
        assert {graph.name: graph.precision for graph in manifest.graphs} == {
            "vision": around, "embed": around, "head": around, "decoder": "int4"
        }  # fmt: skip
        assert max(manifest.verified[-1].range_error) < 0.05
        assert LocalPolicy.load(tmp_path / precision).infer(observations(name)[0])["actions"].shape[1] == 7


def test_the_reference_policy(tiny_artifact: Path, tiny_int4_artifact: Path, tmp_path: Path) -> None:
    for path, precisions in ((tiny_artifact, ("fp32", "fp16", "int8")), (tiny_int4_artifact, ("int4",))):
        artifact = artifacts.load(path)
        policy = artifact_io.load_policy(artifact)
        golden = artifact_io.golden(policy, artifact_io.read_observations(artifact.file("golden.npz")))
        for precision in precisions:
            out = tmp_path / precision
            export(artifact, out, ("gguf",), precision, tolerance=10.0)
            local = LocalPolicy.load(out)
            answers = read_golden(out / "golden.npz", local.spec)
            logits, run = [], local.engine.run

            def watched(graph: str, inputs: Any, run: Any = run, logits: list[np.ndarray] = logits) -> Any:
                outputs = run(graph, inputs)
                if graph == "decoder":
                    logits.append(outputs["logits"][0])
                return outputs

            local.engine.run = watched  # type: ignore[method-assign]
            actions = [local.infer(answers.observation(i, local.spec))["actions"] for i in range(len(answers))]
            error = np.abs(np.stack(logits) - golden["logits"]).max() / np.ptp(golden["logits"])
            assert error < {"fp32": 1e-6, "fp16": 1e-3}.get(precision, 0.02)
            if precision == "fp32":
                np.testing.assert_allclose(np.stack(actions), golden["actions"], rtol=0, atol=CLOSE)


def test_two_targets_side_by_side(tiny_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["export", str(tiny_artifact), str(out), "--to", "onnx", "gguf", "--precision", "fp32", "--json"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["precision"] == {"onnxruntime": "fp32", "gguf": "fp32"}
    for backend in ("onnxruntime", "gguf"):
        assert main(["verify", str(out), "--backend", backend]) == 0
    one, other = (LocalPolicy.load(out, backend=backend) for backend in ("onnxruntime", "gguf"))
    assert "llama-cpp-python" in other.engine.versions()
    observation = read_golden(out / "golden.npz", one.spec).observation(0, one.spec)
    np.testing.assert_allclose(one.infer(observation)["actions"], other.infer(observation)["actions"], atol=CLOSE)


def test_passes_follow_one_another(tmp_path: Path) -> None:
    """The engine keeps what was computed, and says so to a pass that goes on from elsewhere."""
    source, policy = official("openvla")
    with artifacts.create_artifact(tmp_path / "artifact") as draft:
        source.copy_files(draft)
        artifact_io.write_policy(draft, policy, examples(policy.spec, source.tokenizer), ())
    export(artifacts.load(tmp_path / "artifact"), tmp_path / "out", ("gguf",), "fp32")
    engine, width = LocalPolicy.load(tmp_path / "out").engine, policy.towers["decoder"].width
    seen = np.random.default_rng(0).standard_normal((1, 4, width)).astype(np.float32)

    def logits(image_tokens: np.ndarray, ids: list[int], start: int) -> np.ndarray:
        inputs = {"image_tokens": image_tokens, "ids": np.array([ids]), "start": np.array([start])}
        return engine.run("decoder", inputs)["logits"]

    at_once = logits(seen, [1, 5, 7, 3, 9], 0)
    logits(seen, [1, 5, 7], 0)
    logits(seen[:, :0], [3], 7)
    np.testing.assert_allclose(logits(seen[:, :0], [9], 8), at_once, rtol=0, atol=1e-4)
    with pytest.raises(NoAction, match="expected a pass from position 0 or 9, found one from 8"):
        logits(seen[:, :0], [9], 8)


# What is refused


@pytest.mark.parametrize("name", ["act", "pi0", "pi05", "smolvla"])
def test_other_families_are_refused(name: str, tmp_path: Path) -> None:
    source, policy = official(name)
    with artifacts.create_artifact(tmp_path / "artifact") as draft:
        source.copy_files(draft)
        artifact_io.write_policy(draft, policy, examples(policy.spec, source.tokenizer), ())
    with pytest.raises(
        UserError, match=rf"of tiny, openvla, openvla-oft for gguf, found {name}, which has .*export it --to onnx"
    ):
        export(artifacts.load(tmp_path / "artifact"), tmp_path / "out", ("onnx", "gguf"))
    assert not (tmp_path / "out").exists()


def test_precisions_that_the_weights_do_not_have_are_refused(
    tiny_artifact: Path, tiny_int4_artifact: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"fp16, fp32, int8, q4_k_m .* bfloat16, found int4; quantize the policy first"):
        export(artifacts.load(tiny_artifact), tmp_path / "out", ("gguf",), "int4")
    with pytest.raises(UserError, match=r"multiples of 256 for q4_k_m, found width 64"):
        export(artifacts.load(tiny_artifact), tmp_path / "out", ("gguf",), "q4_k_m")
    with pytest.raises(UserError, match=r"of int4, .* for weights in int4, found fp16; choose one"):
        export(artifacts.load(tiny_int4_artifact), tmp_path / "out", ("gguf",), "fp16")
    assert not (tmp_path / "out").exists()


def test_weights_of_others_are_noticed(tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys in our own order: llama.cpp would rotate other pairs, and the export fails."""
    monkeypatch.setattr(file, "interleave_pairs", lambda heads, head_dim: np.arange(heads * head_dim))
    with pytest.raises(Disagreement):
        export(artifacts.load(tiny_artifact), tmp_path / "out", ("gguf",), "fp32")


def test_without_llama_cpp(tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(artifacts.load(tiny_artifact), tmp_path / "out", ("gguf",), "fp32")
    monkeypatch.setattr(llama_model, "_loaded", None)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    message = r"expected llama-cpp-python .*make gguf .*or pip install rlrc\[gguf\]"
    with pytest.raises(UserError, match=message):
        LocalPolicy.load(tmp_path / "out")
    monkeypatch.setattr(file, "write", lambda *_: pytest.fail("work began before the refusal"))
    with pytest.raises(UserError, match=message):
        export(artifacts.load(tiny_artifact), tmp_path / "again", ("onnx", "gguf"))


def test_files_and_vectors_that_do_not_fit(tmp_path: Path) -> None:
    tower = TOWERS["of one shape"]
    _, weights = random_decoder(tower)
    good, cut = tmp_path / "good.gguf", tmp_path / "cut.gguf"
    file.write(good, weights, tower, "fp32")
    cut.write_bytes(good.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"a model that llama.cpp loads, found .*cut.gguf: .*; export it again"):
        LlamaModel(cut, 64, "fp32", causal=True, threads=1)
    with pytest.raises(UserError, match=r"expected vectors of 32 in .*good.gguf, found 64; export it again"):
        LlamaModel(good, 32, "fp32", causal=True, threads=1)
    model = LlamaModel(good, 64, "fp32", causal=True, threads=1)
    model.begin(250)  # rounded up to 256
    model.run(vectors(tower, 250), 1)
    for shape in ((7, 64), (0, 64), (1, 32)):
        with pytest.raises(NoAction, match=r"expected up to 6 vectors of 64 for the decoder, found"):
            model.run(np.zeros(shape, np.float32), 1)


def test_an_older_llama_cpp_is_refused(tiny_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(artifacts.load(tiny_artifact), tmp_path / "out", ("gguf",), "fp32")
    monkeypatch.setattr(metadata, "version", lambda name: "0.3.9")
    with pytest.raises(UserError, match=r"expected llama-cpp-python >=0.3.36, found 0.3.9; upgrade llama-cpp-python"):
        LocalPolicy.load(tmp_path / "out")
