"""The same integers in safetensors, GGUF and ONNX; artifacts of 8 bits and of mixtures through export and runtime."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
gguf = pytest.importorskip("gguf")

from onnx import numpy_helper  # noqa: E402

from families import flags  # noqa: E402
from rlrc import artifact as artifacts  # noqa: E402
from rlrc.artifact import Artifact, ArtifactError  # noqa: E402
from rlrc.compressor.quantize.grid import decompress, unpack  # noqa: E402
from rlrc.compressor.quantize.quantize import QuantizeConfig, quantize  # noqa: E402
from rlrc.compressor.stages import artifact_io  # noqa: E402
from rlrc.compressor.stages import quantize as stages_quantize  # noqa: E402
from rlrc.compressor.stages.stage import StageOptions  # noqa: E402
from rlrc.errors import UserError  # noqa: E402
from rlrc.exporters.export import export  # noqa: E402
from rlrc.exporters.gguf.blocks import pack_blocks  # noqa: E402
from rlrc.runtime.cli import main  # noqa: E402
from rlrc.runtime.inference.policy import LocalPolicy  # noqa: E402
from rlrc.runtime.inference.verify import read_golden  # noqa: E402

DATA = Path(__file__).parent / "data"
QUIET = StageOptions(evaluate=0, workers=1, threads=1)
MIXED = QuantizeConfig(("projector.weight", "decoder.layers.0.attention.k.weight"), embeddings=8)
CONFIGS = {"int4": QuantizeConfig(), "mixed": MIXED, "int8": QuantizeConfig(bits=8, embeddings=8)}

Make = Callable[[QuantizeConfig], Artifact]


@pytest.fixture
def make(tiny_artifact: Path, tmp_path: Path) -> Make:
    """``tiny_artifact`` quantized, without the simulator of its family."""

    def made(config: QuantizeConfig) -> Artifact:
        parent, out = artifacts.load(tiny_artifact), tmp_path / "quantized"
        policy, raw = artifact_io.load_policy(parent), artifact_io.read_observations(parent.file("golden.npz"))
        with artifacts.create_artifact(out) as draft:
            draft.inherit(parent, "tokenizer")
            artifact_io.write_policy(draft, policy, raw, parent.manifest.history, quantize(policy, config))
        return artifacts.load(out)

    return made


def in_safetensors(artifact: Artifact) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Integers and scales by tensor."""
    tensors, spec = artifact_io.open_tensors(artifact), artifact.manifest.quantization
    assert spec is not None
    found = {}
    for name, bits in spec.tensors.items():
        integers = tensors[f"{name}.q"]
        found[name] = ((unpack(integers) if bits == 4 else integers).numpy(), tensors[f"{name}.scale"].numpy())
    return found


def in_onnx(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The same of the exported graphs; of tensors joined in one product, a.q+k+v.weight, side by side."""
    stored: dict[str, np.ndarray] = {}
    for file in (folder / "graphs/onnx").glob("*.onnx"):
        stored |= {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer}
    found = {}
    for key, packed in stored.items():
        if not key.endswith(".q"):
            continue
        name, integers = key.removesuffix(".q"), packed.astype(np.int64)
        if packed.dtype == np.uint8:  # pairs, low nibble first, offset 8
            integers = np.stack([integers & 15, integers >> 4], -1) - 8
        scale = stored[f"{name}.scale"]
        outputs = len(packed)
        found[name] = integers.reshape(outputs, -1), scale.reshape(outputs, -1)
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_integers_are_identical_in_safetensors_gguf_and_onnx(make: Make, kind: str, tmp_path: Path) -> None:
    artifact = make(CONFIGS[kind])
    spec = artifact.manifest.quantization
    assert spec is not None
    ours = in_safetensors(artifact)
    meant = decompress(artifact_io.open_tensors(artifact), spec)
    types = {4: gguf.GGMLQuantizationType.Q4_0, 8: gguf.GGMLQuantizationType.Q8_0}

    # GGUF: a file that gguf writes, and its own reader and arithmetic.
    writer = gguf.GGUFWriter(tmp_path / "all.gguf", "test")
    for name, (integers, scale) in ours.items():
        bits = spec.tensors[name]
        writer.add_tensor(name, pack_blocks(integers, scale, bits), raw_dtype=types[bits])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "all.gguf").tensors}
    assert read.keys() == ours.keys() == spec.tensors.keys()
    for name, (integers, scale) in ours.items():
        tensor = read[name]
        assert tensor.tensor_type == types[spec.tensors[name]]
        values = gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
        np.testing.assert_array_equal(values, meant[name].numpy())
        blocks = np.array(tensor.data).reshape(*scale.shape, -1)
        np.testing.assert_array_equal(blocks[..., :2].copy().view(np.float16)[..., 0], scale)
        payload = blocks[..., 2:]
        if spec.tensors[name] == 4:
            found = np.concatenate([payload & 15, payload >> 4], -1).astype(np.int64) - 8
        else:
            found = payload.view(np.int8)
        np.testing.assert_array_equal(found.reshape(integers.shape), integers)

    # ONNX: the initializers of the exported graphs.
    export(artifact, tmp_path / "exported")
    compared = set()
    for joined, (integers, scale) in in_onnx(tmp_path / "exported").items():
        first, *others = joined.removesuffix(".weight").split("+")
        stem = first.rpartition(".")[0]
        names = [f"{first}.weight", *(f"{stem}.{other}.weight" for other in others)]
        np.testing.assert_array_equal(integers, np.concatenate([ours[name][0] for name in names]))
        np.testing.assert_array_equal(scale, np.concatenate([ours[name][1] for name in names]))
        assert scale.dtype == np.float16
        compared.update(names)
    assert compared == spec.tensors.keys()


@pytest.mark.parametrize("bits", [4, 8])
def test_one_block_by_hand(bits: int) -> None:
    """Scale 0.5 is 0x3800. Q4_0: element j low, j + 16 high, offset 8; Q8_0: two's complement."""
    integers = np.zeros((1, 32), np.int8)
    integers[0, 0], integers[0, 1], integers[0, 16] = -8, 7, 3
    (row,) = pack_blocks(integers, np.array([[0.5]], np.float16), bits)
    assert row[:2].tolist() == [0x00, 0x38]
    if bits == 4:
        assert row[2:].tolist() == [0xB0, 0x8F] + [0x88] * 14
    else:
        assert row[2:].tolist() == [0xF8, 7] + [0] * 14 + [3] + [0] * 15


def test_dequantized_is_what_gguf_makes_of_random_integers() -> None:
    """Over the whole range of integers, negative scales among them."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.randn(8, 3, generator=generator).half()
    for bits, low, high, kind in ((4, -8, 7, "Q4_0"), (8, -127, 127, "Q8_0")):
        integers = torch.randint(low, high + 1, (8, 96), generator=generator, dtype=torch.int8)
        blocks = pack_blocks(integers.numpy(), scale.numpy(), bits)
        expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
        found = integers.float() * scale.float().repeat_interleave(32, 1)
        np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("kind", CONFIGS)
def test_exported_and_run(make: Make, kind: str, tmp_path: Path) -> None:
    artifact = make(CONFIGS[kind])
    grid = "int8" if kind == "int8" else "int4"
    assert artifact.manifest.dtype == grid
    manifest = export(artifact, tmp_path / "exported")
    assert {graph.precision for graph in manifest.graphs} == {"w8" if kind == "int8" else "int4"}
    policy = LocalPolicy.load(tmp_path / "exported")
    golden = read_golden(tmp_path / "exported/golden.npz", policy.spec)
    with np.load(tmp_path / "exported/golden.npz") as arrays:
        for i, tokens in enumerate(arrays["tokens"]):
            np.testing.assert_array_equal(policy.infer(golden.observation(i, policy.spec))["tokens"], tokens)


def test_eight_bits_take_half_the_space_of_floats(make: Make, tiny_artifact: Path, tmp_path: Path) -> None:
    export(make(CONFIGS["int8"]), tmp_path / "int8")
    export(artifacts.load(tiny_artifact), tmp_path / "fp16")
    sizes = {
        name: sum(
            numpy_helper.to_array(tensor).nbytes
            for file in (tmp_path / name / "graphs/onnx").glob("*.onnx")
            for tensor in onnx.load(file).graph.initializer
        )
        for name in ("int8", "fp16")
    }
    assert sizes["int8"] < 0.65 * sizes["fp16"]  # 8.5 bits of 16, and small tensors in fp16


def test_precisions_follow_the_grid(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = make(CONFIGS["int8"])
    with pytest.raises(UserError, match="expected a precision of w8, int8, int8-rows for weights in int8, found int4"):
        export(artifact, tmp_path / "out", precision="int4")
    assert (
        main(["export", str(artifact.path), str(tmp_path / "products"), "--precision", "int8", "--tolerance", "2"]) == 0
    )
    assert main(["inspect", str(artifact.path)]) == 0
    assert "stored as int8 in groups of 32, bits [8]" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["act", "openvla", "openvla-oft-l1", "pi0", "pi05", "smolvla"])
def test_official_families_in_eight_bits(name: str, tmp_path: Path) -> None:
    """Embeddings included; the export verifies every graph against the torch policy."""
    config = QuantizeConfig(bits=8, embeddings=8)
    stages_quantize.run_quantize(DATA / name / "checkpoint", tmp_path / "int8", config, QUIET, flags(name))
    manifest = export(artifacts.load(tmp_path / "int8"), tmp_path / "exported")
    assert {graph.precision for graph in manifest.graphs} == {"w8"}
    assert manifest.quantization is not None
    assert set(manifest.quantization.tensors.values()) == {8}
    assert manifest.verified[-1].token_flips == 0
    assert max(manifest.verified[-1].max_error) < 1e-4


# The manifest


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(dtype="int4"), "of that grid, found dtype int4 and grid int8"),
        (lambda m: m.update(dtype="bfloat16"), "quantization exactly where dtype is int4 or int8"),
        (lambda m: m["quantization"]["tensors"].update({"head.weight": 3}), r"4 or 8 bits .*found \[3, 8\]"),
        (lambda m: m["quantization"].update(group=0), "a positive quantization.group"),
    ],
)
def test_manifest_that_contradicts_itself_is_refused(make: Make, change: Any, message: str) -> None:
    path = make(CONFIGS["int8"]).path
    edit(path, change)
    with pytest.raises(ArtifactError, match=message):
        artifacts.load(path)


def test_quantizing_twice_is_refused(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(make(CONFIGS["int8"]).path)
    for command in (["quantize", path, str(tmp_path / "out"), "--method", "gptq"], ["compare-grids", path]):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert "expected an unquantized artifact, found int4 or int8" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_int4a8_computes_what_has_8_bits_in_8(make: Make, tmp_path: Path) -> None:
    """And not in floats, which would be widened at load: the projector alone among the vision graph's products."""
    artifact = make(MIXED)
    export(artifact, tmp_path / "out", precision="int4a8", tolerance=10.0)
    graph = onnx.load(tmp_path / "out/graphs/onnx/vision.onnx").graph
    products = [node for node in graph.node if "MatMul" in node.op_type]
    kinds = {node.input[1]: node.op_type for node in products}
    assert kinds["projector.weight.q"] == "DynamicQuantizeMatMul"
    assert [kind for name, kind in kinds.items() if name.startswith("vision.layers")] == ["MatMulNBits"] * 4
    policy, golden = (
        LocalPolicy.load(tmp_path / "out"),
        read_golden(tmp_path / "out/golden.npz", artifact.manifest.policy),
    )
    reference = golden.logits
    assert reference is not None
    found: list[np.ndarray] = []
    run = policy.engine.run

    def kept(name: str, inputs: Any) -> Any:
        outputs = run(name, inputs)
        found.extend(outputs[key] for key in outputs if key == "logits")
        return outputs

    policy.engine.run = kept  # type: ignore[assignment, method-assign]
    for i in range(len(golden)):
        policy.infer(golden.observation(i, policy.spec))
    assert np.abs(np.concatenate(found) - reference).mean() < 0.05 * np.abs(reference).mean()
