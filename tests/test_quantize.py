"""The grid against numpy and by hand, and which tensors are put on it; the methods are in test_quantize_methods.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlrc import artifact as artifacts
from rlrc.artifact import ArtifactError, folder
from rlrc.compressor.models import weights as models_weights
from rlrc.compressor.models.weights import tensors_of
from rlrc.compressor.quantize.grid import GROUP, GROUPS, decompress, fit_group, pack, quantize_groups, unpack
from rlrc.compressor.quantize.quantize import QuantizeConfig, quantize
from rlrc.compressor.stages import artifact_io
from rlrc.errors import UserError


def weights(rows: int = 24, columns: int = 96, seed: int = 0) -> torch.Tensor:
    """Normal values with some outliers, and rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    w[torch.rand(w.shape, generator=generator) < 0.02] *= 6
    return w * torch.logspace(-2, 1, rows)[:, None]


def numpy_grid(w: np.ndarray, bits: int, search: bool, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The same rule in float64 and plain loops: integers (out, in), fp16 scale (out, in / size)."""
    low, high = {4: (-8, 7), 8: (-127, 127)}[bits]
    factors = np.linspace(0.7, 1.1, 17) if search else np.array([1.0])
    integers, scales = np.zeros(w.shape, int), np.zeros((len(w), w.shape[1] // size), np.float16)
    for row in range(len(w)):
        for g in range(w.shape[1] // size):
            members = row, slice(size * g, size * g + size)
            group = w[members].astype(np.float64)
            extreme = max(group, key=abs)
            best = np.inf
            for factor in factors:
                scale = np.float16(factor * extreme / low)
                rounded = np.clip(np.rint(group / np.float64(scale)), low, high)
                error = np.square(rounded * np.float64(scale) - group).sum()
                if error < best:
                    best, scales[row, g], integers[members] = error, scale, rounded
    return integers, scales


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", GROUPS)
def test_integers_and_scales_are_those_of_numpy(group: int, bits: int, search: bool) -> None:
    w = weights(columns=256)
    integers, scale = quantize_groups(w, bits, search, group)
    expected, expected_scale = numpy_grid(w.numpy(), bits, search, group)
    np.testing.assert_array_equal(scale.numpy(), expected_scale)
    np.testing.assert_array_equal(integers.numpy(), expected)
    assert integers.dtype == torch.int8
    assert scale.dtype == torch.float16


def test_one_group_by_hand() -> None:
    """The largest value maps to -8, whatever its sign: 4 needs the scale -0.5, and then -3.5 is 7 and 0.6 is -1."""
    group = torch.zeros(2, 32)
    group[0, :4] = torch.tensor([4.0, -3.5, 0.6, 0.2])
    group[1] = -group[0]
    integers, scale = quantize_groups(group, 4, search=False)
    assert scale.tolist() == [[-0.5], [0.5]]
    assert integers[:, :4].tolist() == [[-8, 7, -1, 0], [-8, 7, -1, 0]]
    assert integers[:, 4:].abs().max() == 0


def test_a_narrow_tensor_has_the_largest_group_that_divides_it() -> None:
    assert [fit_group(inputs, 128) for inputs in (256, 192, 96, 160)] == [128, 64, 32, 32]
    assert fit_group(256, 32) == 32
    tensors = {"wide.weight": weights(8, 256), "narrow.weight": weights(8, 96)}
    packed, spec, _ = quantize(tensors, QuantizeConfig(group=128))
    assert spec.group == 128
    assert packed["wide.weight.scale"].shape == (8, 2)
    assert packed["narrow.weight.scale"].shape == (8, 3)
    restored = decompress(packed, spec)
    for name, tensor in tensors.items():
        assert (restored[name] - tensor).norm() < 0.3 * tensor.norm()  # it has outliers


def test_integers_stay_on_the_grid() -> None:
    four, eight = (quantize_groups(weights(seed=1), bits, search=True)[0] for bits in (4, 8))
    assert (four.min(), four.max()) == (-8, 7)
    assert eight.min() == -127  # the largest value of a group takes that sign
    assert 100 < eight.max() <= 127


def error_of_groups(w: torch.Tensor, search: bool) -> torch.Tensor:
    packed, spec, _ = quantize({"a.weight": w}, QuantizeConfig(search=search))
    return (decompress(packed, spec)["a.weight"] - w).unflatten(1, (-1, GROUP)).square().sum(-1)


def test_search_is_never_worse() -> None:
    w = weights(64, 256, seed=2)
    searched, plain = error_of_groups(w, True), error_of_groups(w, False)
    assert (searched <= plain).all()
    assert searched.sum() < 0.95 * plain.sum()


def test_pack_by_hand_and_round_trip() -> None:
    """Nibbles with offset 8, the first in the low half: -8, 7 -> 0x0, 0xF -> 0xF0; 0, -1 -> 0x8, 0x7 -> 0x78."""
    assert pack(torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8)).tolist() == [[0xF0, 0x78]]
    every_byte = torch.arange(256, dtype=torch.uint8).view(4, 64)
    assert torch.equal(pack(unpack(every_byte)), every_byte)
    integers = torch.randint(-8, 8, (5, 64), dtype=torch.int8)
    assert torch.equal(unpack(pack(integers)), integers)


def test_zeros_stay_zero() -> None:
    w = weights(4, 64)
    w[1], w[2, :32], w[3, 0] = 0.0, 0.0, 1e-9  # a row, a group, and a value far below the smallest scale
    w[3, 1:32] = 0.0
    packed, spec, _ = quantize({"a.weight": w}, QuantizeConfig())
    integers, restored = unpack(packed["a.weight.q"]), decompress(packed, spec)["a.weight"]
    assert restored.isfinite().all()
    assert integers[1].abs().max() == integers[2, :32].abs().max() == integers[3, :32].abs().max() == 0
    assert restored[1].abs().max() == restored[2, :32].abs().max() == restored[3, :32].abs().max() == 0
    assert restored[2, 32:].abs().max() > 0


def test_only_linear_weights_of_whole_groups_are_quantized() -> None:
    tensors = {
        "head.weight": weights(8, 64),
        "narrow.weight": weights(8, 48),
        "embedding.weight": weights(8, 64),
        "norm.weight": torch.ones(64),
        "head.bias": torch.ones(64),
        "vision.position": weights(8, 64),
    }
    packed, spec, _ = quantize(tensors, QuantizeConfig())
    assert spec.tensors == {"head.weight": 4}
    assert (spec.grid, spec.group) == ("int4", 32)
    assert packed["head.weight.q"].shape == (8, 32)
    assert packed["head.weight.q"].dtype == torch.uint8
    assert packed["head.weight.scale"].shape == (8, 2)
    restored = decompress(packed, spec)
    assert restored.keys() == tensors.keys()
    for name in tensors.keys() - {"head.weight"}:
        assert packed[name].dtype == torch.float16
        assert torch.equal(restored[name], tensors[name].half().float())


def test_exempt_tensors_take_eight_bits() -> None:
    tensors = {"a.weight": weights(), "b.weight": weights(seed=3)}
    packed, spec, _ = quantize(tensors, QuantizeConfig(exempt=("b.weight",), search=False))
    assert spec.tensors == {"a.weight": 4, "b.weight": 8}
    assert packed["b.weight.q"].shape == (24, 96)
    assert packed["b.weight.q"].dtype == torch.int8
    restored = decompress(packed, spec)["b.weight"]
    # Rounding to nearest is off by half a step at most, and by the scale's own rounding (2^-11) of 127 steps.
    step = packed["b.weight.scale"].float().abs().repeat_interleave(32, 1)
    assert ((restored - tensors["b.weight"]).abs() <= step * (0.5 + 127 / 2**11)).all()


@pytest.mark.parametrize("name", ["c.weight", "norm.weight"])
def test_exemption_that_names_no_quantizable_tensor_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"quantize.exempt to name .*a.weight.*found '{name}'"):
        quantize({"a.weight": weights(), "norm.weight": torch.ones(32)}, QuantizeConfig(exempt=("a.weight", name)))


def test_eight_bits_for_all() -> None:
    tensors = {"a.weight": weights(), "head.weight": weights(seed=3), "norm.weight": torch.ones(64)}
    packed, spec, report = quantize(tensors, QuantizeConfig(bits=8))
    assert (spec.grid, spec.tensors) == ("int8", {"a.weight": 8, "head.weight": 8})
    assert packed["a.weight.q"].dtype == torch.int8
    assert (packed["a.weight.q"] == quantize_groups(tensors["a.weight"], 8, search=True)[0]).all()
    assert report == {"bytes": 2 * (24 * 96 + 24 * 3 * 2) + 64 * 2}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"a.weight": 4, "head.weight": 4, "action_out.weight": 4}),
        ({"head": 8}, {"a.weight": 4, "head.weight": 8, "action_out.weight": 8}),
        ({"head": 16}, {"a.weight": 4}),
        ({"bits": 8, "head": 4}, {"a.weight": 8, "head.weight": 4, "action_out.weight": 4}),
        ({"embeddings": 8, "head": 16}, {"a.weight": 4, "embedding.weight": 8}),
        ({"exempt": ("head.weight",), "head": 4}, {"a.weight": 4, "head.weight": 8, "action_out.weight": 4}),
    ],
)
def test_head_and_embeddings_are_decided_explicitly(config: dict[str, Any], expected: dict[str, int]) -> None:
    names = ("a.weight", "head.weight", "action_out.weight", "embedding.weight")
    packed, spec, _ = quantize({name: weights(8, 64) for name in names}, QuantizeConfig(**config))
    assert spec.tensors == expected
    for name in names:
        assert (
            packed[f"{name}.q" if name in expected else name].dtype
            == {
                4: torch.uint8,
                8: torch.int8,
                None: torch.float16,
            }[expected.get(name)]
        )


def test_grid_is_that_of_most_weights() -> None:
    """dtype and grid of the manifest follow the weights, not the number of tensors."""
    tensors = {"a.weight": weights(8, 64), "b.weight": weights(8, 64), "c.weight": weights(17, 64)}
    for exempt, grid in ((("a.weight", "b.weight"), "int4"), (("c.weight",), "int8")):
        assert quantize(tensors, QuantizeConfig(exempt)).spec.grid == grid


def test_layers_cut_to_nothing_are_left_alone() -> None:
    packed, spec, _ = quantize({"o.weight": torch.zeros(64, 0), "q.weight": torch.zeros(0, 64)}, QuantizeConfig())
    assert spec.tensors == {}
    assert packed["o.weight"].shape == (64, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "awk"}, r"expected quantize\.method rtn, awq, gptq, found 'awk'"),
        ({"bits": 5}, r"expected quantize\.bits 4, 8, found 5"),
        ({"head": 2}, r"expected quantize\.head 4, 8, 16, found 2"),
        ({"embeddings": 4}, r"expected quantize\.embeddings 8, 16, found 4"),
        ({"budget": -0.1}, r"expected quantize\.budget from 0 to 1, .* found -0\.1"),
        ({"budget": 1.5}, r"found 1\.5"),
        ({"budget": float("nan")}, r"found nan"),
        ({"budget": 0.1, "bits": 8}, r"expected quantize\.budget 0 with 8 bits, .* found 0\.1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        QuantizeConfig(**settings)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"finite weights, found NaN or infinity in norm\.weight; repair"),
        (float("inf"), r"in norm\.weight"),
        (1e5, r"norm\.weight within float16's range, found 1e\+05"),
    ],
)
def test_weights_that_the_format_cannot_hold_are_refused(value: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        quantize({"a.weight": weights(), "norm.weight": torch.tensor([1.0, value])}, QuantizeConfig())


@pytest.mark.parametrize("settings", [{"method": "gptq"}, {"method": "awq"}, {"budget": 0.1}])
def test_calibration_needs_observations(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"expected a policy and calibration observations .*found none"):
        quantize({"a.weight": weights()}, QuantizeConfig(**settings))


def test_int4_artifact_holds_the_policy_its_goldens_show(tiny_int4_artifact: Path) -> None:
    artifact = artifacts.load(tiny_int4_artifact)
    policy = artifact_io.load_policy(artifact)
    observations = artifact_io.read_observations(artifact.file("golden.npz"))
    with np.load(artifact.file("golden.npz")) as golden:
        again = artifact_io.golden(policy, observations)
        np.testing.assert_array_equal(again["tokens"], golden["tokens"])
        np.testing.assert_allclose(again["logits"], golden["logits"], atol=1e-5)
    assert artifact.manifest.quantization is not None
    assert set(artifact.manifest.quantization.tensors.values()) == {4}
    for name in artifact.manifest.quantization.tensors:
        levels = tensors_of(policy)[name].unflatten(1, (-1, 32))
        assert max(len(group.unique()) for row in levels for group in row) <= 16


def test_tensor_that_does_not_fit_is_refused(tiny_artifact: Path, tmp_path: Path) -> None:
    artifact = artifacts.load(tiny_artifact)
    for damage, message in (
        (lambda t: t.pop("head.weight"), "for tensor head.weight in .*found nothing"),
        (lambda t: t.update({"extra": torch.zeros(2)}), "expected nothing for tensor extra"),
        (lambda t: t.update({"query": t["query"][:, :8].contiguous()}), r"tensor query .*found \(3, 8\)"),
    ):
        tensors = load_file(artifact.file(folder.WEIGHTS))
        damage(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        policy = artifact_io.load_policy(artifact)
        with pytest.raises(ArtifactError, match=message):
            models_weights.load_tensors(policy, load_file(tmp_path / "model.safetensors"), str(tmp_path))
