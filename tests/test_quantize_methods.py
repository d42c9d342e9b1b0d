"""What chooses integers: calibration inputs, GPTQ, AWQ; NF4 to compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rlrc.artifact import LayerSpec, Manifest, TowerSpec
from rlrc.compressor.models.nn.vit import PatchStem, merge_patches
from rlrc.compressor.models.policy import Inputs, Outputs, PolicyModule
from rlrc.compressor.models.storage.tensor_files import write_file
from rlrc.compressor.models.storage.tensors import Tensors
from rlrc.compressor.models.tiny import TinyPolicy
from rlrc.compressor.models.weights import build_policy
from rlrc.compressor.quantize import calibration, grid
from rlrc.compressor.quantize.action_error import swap_tensors
from rlrc.compressor.quantize.awq import ALPHAS, Fold, compute_scales, find_folds, fold_scales, scale_channels
from rlrc.compressor.quantize.calibration import RowSample, collect_inputs
from rlrc.compressor.quantize.gptq import DAMPENING, feedback, gptq
from rlrc.compressor.quantize.grid import decompress, dequantize_groups, quantize_groups
from rlrc.compressor.quantize.nf4 import LEVELS, round_to_nf4
from rlrc.compressor.quantize.quantize import QuantizeConfig, choose_bits, quantize

FAMILIES = ("act", "openvla", "openvla-oft-l1", "openvla-oft-discrete", "pi0", "pi05", "smolvla")

Golden = tuple[Any, list[Inputs]]  # a policy and observations
Official = Callable[[str], Golden]


def act(policy: PolicyModule, inputs: list[Inputs]) -> list[Outputs]:
    with torch.inference_mode():
        return [policy.act(one) for one in inputs]


# Calibration inputs


def test_rows_are_what_the_layers_were_given(tiny_policy: Golden) -> None:
    policy, inputs = tiny_policy
    names = [f"decoder.layers.0.attention.{part}.weight" for part in "qkv"]
    found = collect_inputs(policy, inputs, ["head.weight", "projector.weight", *names])
    with torch.inference_mode():
        hidden = [policy.hidden(policy.encode_image(one.pixels[0]), one.ids, one.state)[0] for one in inputs]
        seen = [merge_patches(policy.vision(one.pixels[0]), policy.merge).flatten(0, 2) for one in inputs]
    torch.testing.assert_close(found["head.weight"], torch.cat(hidden))
    torch.testing.assert_close(found["projector.weight"], torch.cat(seen))
    length = policy.image_tokens + 5 + 1 + 3  # words, state, chunk
    assert found[names[0]].shape == (8 * length, 64)
    assert torch.equal(found[names[0]], found[names[1]])
    assert torch.equal(found[names[0]], found[names[2]])
    assert not any(module._forward_pre_hooks for module in policy.modules())


class Eyes(nn.Module):
    """A patch embedding, which calls a convolution and not the linear layer whose weight it has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = PatchStem((4,), (8,))

    def act(self, inputs: Inputs) -> Tensor:
        return self.stem(inputs.pixels[0])


def test_rows_of_a_patch_embedding(tiny_policy: Golden) -> None:
    eyes, pixels = Eyes(), torch.randn(2, 8, 12, 3, generator=torch.Generator().manual_seed(0))
    rows = collect_inputs(eyes, [Inputs([pixels])], ["stem.steps.0.weight"])["stem.steps.0.weight"]  # type: ignore[arg-type]
    assert rows.shape == (2 * 2 * 3, 48)
    (step,) = eyes.stem.steps
    torch.testing.assert_close(step(rows), eyes.act(Inputs([pixels])).flatten(0, 2))


def test_sample_is_even(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "ROWS", 200)
    sample = RowSample(torch.empty(200, 1))
    for start in range(0, 2000, 100):
        sample.add(torch.arange(start, start + 100.0).view(2, 50, 1))
    rows = sample.rows[:, 0]
    assert len(rows) == len(rows.unique()) == 200
    # Of every half 100 are expected; the deviation is below 7.
    assert 75 < (rows < 1000).sum() < 125
    assert sample.rows.shape == (200, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_quantized_layer_of_every_family_is_seen(name: str, official_policy: Official) -> None:
    policy, inputs = official_policy(name)
    bits = choose_bits(policy.state_dict(), QuantizeConfig())
    assert collect_inputs(policy, inputs, bits).keys() == bits.keys()


# GPTQ


def brute_force(weight: np.ndarray, x: np.ndarray, group: int) -> np.ndarray:
    """The same by least squares, in float64: after every rounded column the best values of all that are left.

    Minimises the change of the outputs, (w' - w) (X^T X + dampening) (w' - w)^T, with the rounded columns fixed.
    """
    hessian = x.T @ x
    hessian += DAMPENING * np.diag(hessian).mean() * np.eye(len(hessian))
    columns, found = weight.shape[1], weight.copy()
    for i in range(columns):
        if i % group == 0:
            _, scale = quantize_groups(torch.from_numpy(found[:, i : i + group]), 4, search=True, group=group)
            step = scale.numpy().astype(np.float64)[:, 0]
        found[:, i] = np.clip(np.rint(found[:, i] / step), -8, 7) * step
        fixed, free = slice(0, i + 1), slice(i + 1, columns)
        change = found[:, fixed] - weight[:, fixed]
        found[:, free] = weight[:, free] - np.linalg.solve(hessian[free, free], hessian[free, fixed] @ change.T).T
    return found


def correlated(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs of which a quarter of the directions carry nearly everything, the same for every seed."""
    generator = torch.Generator().manual_seed(seed)
    mixture = torch.randn(columns // 4, columns, generator=torch.Generator().manual_seed(9))
    mixed = torch.randn(rows, columns // 4, generator=generator) @ mixture
    return mixed + 0.1 * torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("group", [32, 64])
def test_error_feedback_is_the_least_squares_solution(group: int) -> None:
    weight, x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)), correlated(300, 128)
    found = dequantize_groups(*gptq(weight, feedback(x), 4, search=True, group=group))
    np.testing.assert_allclose(found, brute_force(weight.double().numpy(), x.double().numpy(), group), atol=1e-5)


def test_nothing_is_fed_back_between_independent_inputs() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    for rows in (3 * torch.eye(64), torch.zeros(4, 64)):
        for found, expected in zip(
            gptq(weight, feedback(rows), 8, True), quantize_groups(weight, 8, True), strict=True
        ):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_error_feedback_lowers_the_output_error(bits: int) -> None:
    weight, x = torch.randn(16, 128, generator=torch.Generator().manual_seed(3)), correlated(400, 128)
    unseen = correlated(100, 128, seed=5)
    fed, nearest = (
        dequantize_groups(*pair)
        for pair in (gptq(weight, feedback(x), bits, True), quantize_groups(weight, bits, True))
    )
    assert ((fed - weight) @ unseen.T).norm() < 0.5 * ((nearest - weight) @ unseen.T).norm()
    integers, scale = gptq(weight, feedback(x), bits, True)
    assert (integers.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float16, (16, 4))
    assert integers.abs().max() <= (8 if bits == 4 else 127)


# AWQ


def test_scales_by_hand() -> None:
    """mean |x| is (4, 1, 16): at alpha 1/2 (2, 1, 4), and the geometric mean of largest and smallest becomes 1."""
    rows = torch.tensor([[4.0, -1.0, 16.0], [-4.0, 1.0, 16.0]])
    torch.testing.assert_close(compute_scales(Fold(("a",), "b"), rows, 0.5), torch.tensor([1.0, 0.5, 2.0]))
    assert torch.equal(compute_scales(Fold(("a",), "b"), rows, 0.0), torch.ones(3))
    assert torch.equal(compute_scales(Fold(("a",), "b"), torch.zeros(2, 3), 1.0), torch.ones(3))


def test_heads_that_share_a_value_share_its_scale() -> None:
    """Two value heads of one channel for four queries: channels 0 and 1 belong to the first."""
    fold = Fold(("o",), "v", shared=2, size=1)
    assert fold.per_row(torch.tensor([1.0, 3.0, 10.0, 30.0])).tolist() == [2, 20]
    assert fold.per_channel(torch.tensor([2.0, 20.0])).tolist() == [2, 2, 20, 20]
    wide = Fold(("o",), "v", shared=2, size=2)
    assert wide.per_channel(torch.tensor([1.0, 2, 3, 4])).tolist() == [1, 2, 1, 2, 3, 4, 3, 4]


def test_a_channel_that_matters_is_scaled_up() -> None:
    """One input a hundred times the others: its column must lose less, and plain rounding makes no difference."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"a.weight": torch.randn(64, 64, generator=generator), "norm.weight": torch.ones(64)}
    rows = torch.randn(256, 64, generator=generator)
    rows[:, 5] *= 100
    fold, s = Fold(("a",), "norm"), compute_scales(Fold(("a",), "norm"), rows, 0.5)
    after = {name: fold_scales(name, tensor, fold, s) for name, tensor in tensors.items()}
    torch.testing.assert_close((rows * after["norm.weight"]) @ after["a.weight"].T, rows @ tensors["a.weight"].T)
    rounded = dequantize_groups(*quantize_groups(after["a.weight"], 4, True)) / s
    plain = dequantize_groups(*quantize_groups(tensors["a.weight"], 4, True))
    assert (rows @ (rounded - tensors["a.weight"]).T).norm() < 0.5 * (rows @ (plain - tensors["a.weight"]).T).norm()


def check_equal(policy: PolicyModule, inputs: list[Inputs]) -> list[Fold]:
    """Random scales in every fold change no action."""
    found, generator = find_folds(policy), torch.Generator().manual_seed(0)
    tensors = dict(policy.state_dict())
    for fold in found:
        channels = tensors[f"{fold.linears[0]}.weight"].shape[1]
        s = torch.rand(channels // fold.shared, generator=generator) + 0.5
        changed = {name: fold_scales(name, tensor, fold, s) for name, tensor in tensors.items()}
        moved = {name for name, tensor in tensors.items() if changed[name] is not tensor}
        assert moved >= {f"{linear}.weight" for linear in (*fold.linears, fold.before)}
        tensors = changed
    expected = act(policy, inputs)
    with swap_tensors(policy, tensors):
        again = act(policy, inputs)
    for one, other in zip(expected, again, strict=True):
        values = (one.actions, other.actions) if one.logits is None else (one.logits, other.logits)
        torch.testing.assert_close(values[1], values[0], rtol=1e-4, atol=1e-4)
    return found


# How many places there are: in a decoder block 4 (q k v, o, gate up, down), in a vision block 3, a head 1.
PLACES = {
    "act": 8,  # an o of each attention, a down after ReLU in each block that has an MLP, the head
    "openvla": 25,
    "openvla-oft-l1": 27,
    "openvla-oft-discrete": 25,
    "pi0": 23,
    "pi05": 16,
    "smolvla": 31,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_is_exact_in_every_family(name: str, official_policy: Official) -> None:
    policy, inputs = official_policy(name)
    assert len(check_equal(policy, inputs)) == PLACES[name]


def test_folding_is_exact_in_every_geometry(tiny_manifest: Manifest, tiny_policy: Golden) -> None:
    layers = (LayerSpec(4, 2, 16, 64), LayerSpec(0, 0, 16, 64), LayerSpec(2, 1, 16, 0), LayerSpec(6, 3, 16, 64))
    vision = TowerSpec(32, (LayerSpec(0, 0, 16, 32), LayerSpec(2, 2, 16, 0), LayerSpec(1, 1, 16, 32)))
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="zero-element"):
        policy = TinyPolicy(tiny_manifest.policy, {"vision": vision, "decoder": TowerSpec(64, layers)}).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    found = check_equal(policy, tiny_policy[1])
    assert [fold.shared for fold in found if fold.linears[0].endswith("attention.o")] == [2, 2, 2]
    assert len(found) == (4 + 2 + 2 + 4) + (1 + 2 + 3) + 1


def test_awq_lowers_the_output_error_where_channels_differ(tiny_policy: Golden) -> None:
    policy, inputs = tiny_policy
    names = [f"decoder.layers.0.attention.{part}" for part in "qkv"]
    with torch.no_grad():
        policy.state_dict()["decoder.layers.0.norm1.weight"][5] *= 200  # a channel that is most of the input
    plain = Tensors("the policy", policy.state_dict())
    bits = choose_bits(plain, QuantizeConfig())
    equal, alphas = scale_channels(policy, plain, bits, collect_inputs(policy, inputs, bits), search=True)
    assert alphas["+".join(names)] > 0
    assert set(alphas.values()) <= set(ALPHAS)

    def output_error(tensors: Tensors) -> float:
        with swap_tensors(policy, tensors):
            rows = collect_inputs(policy, inputs, bits)
        weight = torch.cat([tensors[f"{name}.weight"] for name in names])
        rounded = dequantize_groups(*quantize_groups(weight, 4, search=True))
        return float((rows[f"{names[0]}.weight"] @ (rounded - weight).T).norm())

    assert output_error(equal) < 0.6 * output_error(plain)
    result = quantize(policy, QuantizeConfig(method="awq"), inputs)
    expected = dequantize_groups(*quantize_groups(equal[f"{names[1]}.weight"], 4, search=True))
    assert torch.equal(decompress(result.tensors, result.spec)[f"{names[1]}.weight"], expected)
    assert torch.equal(result.tensors["decoder.layers.0.norm1.weight"], equal["decoder.layers.0.norm1.weight"].half())


def test_the_policy_is_left_as_it_is(tiny_policy: Golden) -> None:
    policy, inputs = tiny_policy
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    for method in ("awq", "gptq"):
        quantize(policy, QuantizeConfig(method=method, budget=0.1), inputs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())


def test_gptq_is_what_the_artifact_holds(tiny_policy: Golden) -> None:
    policy, inputs = tiny_policy
    result = quantize(policy, QuantizeConfig(method="gptq"), inputs)
    rows = collect_inputs(policy, inputs, result.spec.tensors)
    stored = decompress(result.tensors, result.spec)
    for name in ("head.weight", "decoder.layers.1.mlp.down.weight", "vision.layers.0.attention.qkv.weight"):
        expected = dequantize_groups(*gptq(policy.state_dict()[name], feedback(rows[name]), 4, True))
        assert torch.equal(stored[name], expected)
    assert result.report["unobserved"] == []


def test_layers_that_share_inputs_share_the_factor(tiny_policy: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v; gate and up."""
    policy, inputs = tiny_policy
    computed = list[Tensor]()
    monkeypatch.setattr(
        "rlrc.compressor.quantize.gptq.feedback", lambda rows: (computed.append(rows), feedback(rows))[1]
    )
    names = quantize(policy, QuantizeConfig(method="gptq"), inputs).spec.tensors
    decoder = [name for name in names if name.startswith("decoder.")]
    followers = [name for name in decoder if name.endswith((".k.weight", ".v.weight", ".up.weight"))]
    assert 0 < len(followers) == len(names) - len(computed)


# A policy's tensors, in parts


def test_nothing_is_computed_as_a_whole(tiny_policy: Golden, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """256 numbers at a time: matrices in 4 bits and words in 16, when they are measured, checked and written."""
    policy, inputs = tiny_policy
    monkeypatch.setattr("rlrc.compressor.models.nn.linear.PART", 256)
    dequantized, halved = list[Tensor](), list[Tensor]()
    dequantize, half = grid.dequantize_groups, Tensor.half
    monkeypatch.setattr(grid, "dequantize_groups", lambda q, scale: (dequantized.append(q), dequantize(q, scale))[1])
    monkeypatch.setattr(Tensor, "half", lambda tensor: (halved.append(tensor), half(tensor))[1])
    result = quantize(policy, QuantizeConfig(), inputs)
    build_policy(policy.spec, policy.towers, decompress(result.tensors, result.spec), "the test")
    write_file(tmp_path / "parts", result.tensors, list(result.tensors))
    assert 0 < max(tensor.numel() for tensor in dequantized) <= 256
    words = {len(tensor) for tensor in halved if tensor.shape[1:] == policy.embedding.weight.shape[1:]}
    assert 0 < max(words) < len(policy.embedding.weight)


# NF4


def test_levels_are_those_of_the_paper() -> None:
    """Appendix E: quantiles of the normal distribution between 1/2 and 0.9677, 8 above zero and 7 below."""
    high = 0.9677083
    positive = torch.special.ndtri(torch.linspace(high, 0.5, 9, dtype=torch.float64))
    negative = -torch.special.ndtri(torch.linspace(high, 0.5, 8, dtype=torch.float64))
    levels = torch.cat([positive[:-1], torch.zeros(1), negative[:-1]]).sort().values
    torch.testing.assert_close(torch.tensor(LEVELS, dtype=torch.float64), levels / levels.max(), rtol=0, atol=1e-6)


def test_nf4_is_the_nearest_level_of_every_group() -> None:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))  # groups of 64 run over rows of 96
    weight[2] = 0
    groups = weight.numpy().astype(np.float64).reshape(-1, 64)
    largest = np.abs(groups).max(1)[:, None, None]
    levels = np.array(LEVELS) * largest
    expected = np.take_along_axis(levels[:, 0], np.abs(groups[..., None] - levels).argmin(-1), 1)
    np.testing.assert_allclose(round_to_nf4(weight).numpy(), expected.reshape(6, 96), atol=1e-6)
    assert round_to_nf4(torch.ones(1, 32)).tolist() == [[1.0] * 32]  # less than a group
