"""The model file of llama.cpp, read again with gguf's own reader. Needs no llama.cpp."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")

from rlrc.artifact import LayerSpec, QuantizationSpec, TowerSpec  # noqa: E402
from rlrc.compressor.models.nn.decoder import Decoder  # noqa: E402
from rlrc.compressor.models.storage.tensors import Tensors  # noqa: E402
from rlrc.compressor.quantize.grid import pack, quantize_groups  # noqa: E402
from rlrc.errors import UserError  # noqa: E402
from rlrc.exporters.gguf import file  # noqa: E402
from rlrc.exporters.graphs.weights import Weights  # noqa: E402

UNIFORM = TowerSpec(64, (LayerSpec(4, 2, 16, 96),) * 2, eps=1e-6, theta=500.0)
MIXED = TowerSpec(64, (LayerSpec(4, 2, 16, 96), LayerSpec(2, 1, 16, 32)), norm_offset=1.0)
KINDS = gguf.GGMLQuantizationType


def state_of(tower: TowerSpec) -> dict[str, Any]:
    torch.manual_seed(0)
    return {f"decoder.{name}": tensor for name, tensor in Decoder(tower).state_dict().items()}


def quantized(state: dict[str, Any], bits: dict[str, int]) -> Weights:
    stored = {name: tensor for name, tensor in state.items() if name not in bits}
    for name, number in bits.items():
        integers, scale = quantize_groups(state[name], number, search=False)
        stored |= {f"{name}.q": pack(integers) if number == 4 else integers, f"{name}.scale": scale}
    return Weights(Tensors("the test", stored), QuantizationSpec("int4", 32, bits))


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def values(tensor: Any) -> np.ndarray:
    return np.asarray(gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type), np.float32)


@pytest.mark.parametrize("tower", [UNIFORM, MIXED], ids=["llama", "deci"])
def test_every_weight_is_in_the_file(tower: TowerSpec, tmp_path: Path) -> None:
    state = state_of(tower)
    file.write(tmp_path / "model.gguf", Weights(Tensors("the test", state)), tower, "fp32")
    fields, tensors = read(tmp_path / "model.gguf")
    arch = "llama" if tower is UNIFORM else "deci"
    assert fields["general.architecture"] == arch
    expected = {
        "block_count": 2,
        "embedding_length": 64,
        "attention.head_count": 4 if arch == "llama" else [4, 2],
        "attention.head_count_kv": 2 if arch == "llama" else [2, 1],
        "feed_forward_length": 96 if arch == "llama" else [96, 32],
        "attention.key_length": 16,
        "rope.dimension_count": 16,
    }
    assert {name: fields[f"{arch}.{name}"] for name in expected} == expected
    assert fields[f"{arch}.rope.freq_base"] == tower.theta
    assert fields[f"{arch}.attention.layer_norm_rms_epsilon"] == pytest.approx(tower.eps)

    names = {"attn_v": "attention.v", "attn_output": "attention.o", "ffn_gate": "mlp.gate", "ffn_up": "mlp.up"}
    names |= {"ffn_down": "mlp.down"}
    for i, layer in enumerate(tower.layers):
        for theirs, ours in names.items():
            found = values(tensors[f"blk.{i}.{theirs}.weight"])
            np.testing.assert_array_equal(found, state[f"decoder.layers.{i}.{ours}.weight"])
        for theirs, ours in {"attn_norm": "norm1", "ffn_norm": "norm2"}.items():
            weight = state[f"decoder.layers.{i}.{ours}.weight"] + tower.norm_offset
            np.testing.assert_array_equal(values(tensors[f"blk.{i}.{theirs}.weight"]), weight)
        for part, heads in (("q", layer.heads), ("k", layer.kv_heads)):
            found = values(tensors[f"blk.{i}.attn_{part}.weight"]).reshape(heads, 8, 2, 64)
            weight = state[f"decoder.layers.{i}.attention.{part}.weight"].reshape(heads, 2, 8, 64)
            for half in (0, 1):  # a rotated pair is channels j and j + 8 of ours, 2 j and 2 j + 1 of llama.cpp's
                np.testing.assert_array_equal(found[:, :, half], weight[:, half])
    np.testing.assert_array_equal(
        values(tensors["output_norm.weight"]), state["decoder.norm.weight"] + tower.norm_offset
    )


def test_pairs_stand_side_by_side() -> None:
    assert file.interleave_pairs(2, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_integers_are_the_artifacts_own(tmp_path: Path) -> None:
    """Bit for bit in blocks of Q4_0 and Q8_0; what is not quantized is float16, but for what is exact."""
    state = state_of(MIXED)
    bits = {
        name: 8 if ".v." in name else 4 for name, tensor in state.items() if tensor.ndim == 2 and ".up." not in name
    }
    weights = quantized(state, bits)
    file.write(tmp_path / "model.gguf", weights, MIXED, "int4")
    _, tensors = read(tmp_path / "model.gguf")
    for name, theirs in (("attention.q", "attn_q"), ("attention.v", "attn_v"), ("mlp.down", "ffn_down")):
        ours = f"decoder.layers.0.{name}.weight"
        integers, scale = (part.numpy() for part in quantize_groups(state[ours], bits[ours], search=False))
        if name == "attention.q":
            integers, scale = (x.reshape(4, 2, 8, -1).swapaxes(1, 2).reshape(64, -1) for x in (integers, scale))
        tensor = tensors[f"blk.0.{theirs}.weight"]
        assert tensor.tensor_type == (KINDS.Q8_0 if bits[ours] == 8 else KINDS.Q4_0)
        blocks = np.array(tensor.data).reshape(*scale.shape, -1)
        np.testing.assert_array_equal(blocks[..., :2].copy().view(np.float16)[..., 0], scale)
        payload = blocks[..., 2:]
        found = payload.view(np.int8)
        if bits[ours] == 4:
            found = np.concatenate([payload & 15, payload >> 4], -1).astype(np.int8) - 8
        np.testing.assert_array_equal(found.reshape(integers.shape), integers)
    assert tensors["blk.0.ffn_up.weight"].tensor_type == KINDS.F16
    weights = replace(weights, exact=frozenset({"decoder.layers.0.mlp.up.weight"}))
    file.write(tmp_path / "exact.gguf", weights, MIXED, "int4")
    _, tensors = read(tmp_path / "exact.gguf")
    assert tensors["blk.0.ffn_up.weight"].tensor_type == KINDS.F32
    assert tensors["blk.1.ffn_up.weight"].tensor_type == KINDS.F16


@pytest.mark.parametrize("bits", [4, 8])
def test_larger_groups_are_written_with_their_scale_repeated(bits: int, tmp_path: Path) -> None:
    state, name = state_of(UNIFORM), "decoder.layers.0.attention.o.weight"
    integers, scale = quantize_groups(state[name], bits, True, 64)
    stored = {f"{name}.q": pack(integers) if bits == 4 else integers, f"{name}.scale": scale}
    weights = Weights(
        Tensors("the test", {**state, **stored}), QuantizationSpec("int4" if bits == 4 else "int8", 64, {name: bits})
    )
    file.write(tmp_path / "model.gguf", weights, UNIFORM, "fp16")
    found = values(read(tmp_path / "model.gguf")[1]["blk.0.attn_output.weight"])
    np.testing.assert_array_equal(found, integers.numpy() * scale.numpy().astype(np.float32))  # 64 inputs, one group


def test_eight_bits_of_floats(tmp_path: Path) -> None:
    state = state_of(UNIFORM)
    file.write(tmp_path / "model.gguf", Weights(Tensors("the test", state)), UNIFORM, "int8")
    _, tensors = read(tmp_path / "model.gguf")
    found, weight = tensors["blk.1.ffn_up.weight"], state["decoder.layers.1.mlp.up.weight"].numpy()
    assert found.tensor_type == KINDS.Q8_0
    np.testing.assert_allclose(values(found), weight, atol=np.abs(weight).max() / 127)


def test_one_tensor_in_memory_at_a_time(tmp_path: Path) -> None:
    """However many there are: each is gone when the next is read."""
    tower, alive, most = TowerSpec(64, (LayerSpec(4, 2, 16, 96),) * 6), 0, 0
    state = state_of(tower)

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def fresh(name: str) -> Any:
        nonlocal alive, most
        tensor = state[name].bfloat16()
        weakref.finalize(tensor, gone)
        alive += 1
        most = max(most, alive)
        return tensor

    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    file.write(tmp_path / "model.gguf", Weights(Tensors("the test", shapes, fresh)), tower, "fp16")
    assert most == 1
    assert (tmp_path / "model.gguf").stat().st_size > 6 * 2 * (64 * 64 * 3 + 64 * 96 * 3)


# What is refused


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"norm": "adaptive"}, "adaptive norms"),
        ({"activation": "gelu-tanh"}, "the activation gelu-tanh"),
        ({"layers": (LayerSpec(4, 2, 16, 96), LayerSpec(4, 2, 16, 96, "cross"))}, "cross blocks"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(changes: dict[str, Any], found: str) -> None:
    with pytest.raises(UserError, match=rf"expected a decoder of self-attention.*found {found}; export it --to onnx"):
        file.choose_architecture(replace(UNIFORM, **changes))


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("q4_k_m", r"multiples of 256 for q4_k_m, found width 64 .* --precision fp16, or prune with align 256"),
        ("int8", r"multiples of 32 for int8, found heads \* head_dim 48"),
    ],
)
def test_rows_of_broken_blocks_are_refused(precision: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        file.check_rows(replace(UNIFORM, layers=(LayerSpec(3, 3, 16, 96),)), precision)
    file.check_rows(replace(UNIFORM, layers=(LayerSpec(3, 3, 16, 33),)), "fp16")


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    state = state_of(UNIFORM)
    state["decoder.layers.0.mlp.up.weight"][3, 4] = 1e5
    weights = Weights(Tensors("the test", state))
    with pytest.raises(UserError, match=r"layers.0.mlp.up.weight within float16's range, found 1e\+05; use .*fp32"):
        file.write(tmp_path / "model.gguf", weights, UNIFORM, "fp16")
