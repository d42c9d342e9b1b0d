"""Normalisation, bins and the check of observations: numbers worked out by hand, and the formulas of the specs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlrc.artifact import FlowSpec, Manifest, NormStats, PolicySpec, PromptSpec
from rlrc.errors import UserError
from rlrc.runtime.inference.preprocess import Tokenizer, bin_centers, check, normalise, prepare, to_bins, unnormalise


def random_pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def test_normalise_by_hand() -> None:
    stats = NormStats((10.0, -2.0), (4.0, 0.5), clip=3.0)
    raw = np.array([[12.0, -2.25], [10.0, 0.0], [-10.0, -2.0]])
    normalised = normalise(raw, stats)
    assert normalised.dtype == np.float32
    assert normalised.tolist() == [[0.5, -0.5], [0.0, 3.0], [-3.0, 0.0]]  # 4 and -5 are clipped
    assert unnormalise([[0.5, -0.5], [4.0, 0.0]], stats).tolist() == [[12.0, -2.25], [26.0, -2.0]]  # nothing clipped
    assert normalise(raw, replace(stats, clip=None))[2, 0] == -5.0


def test_normalise_keeps_the_digits_of_large_offsets() -> None:
    # 1e6 + 0.03 in float32 would lose the 0.03 (spacing 0.0625) if the offset were subtracted after rounding.
    assert normalise(np.array([1e6 + 0.03]), NormStats((1e6,), (0.01,)))[0] == pytest.approx(3.0, abs=1e-4)


@pytest.mark.parametrize(
    "stats", [NormStats((0.0,), (0.0,)), NormStats((float("nan"),), (1.0,)), NormStats((0.0,), ())]
)
def test_normalise_refuses_impossible_statistics(stats: NormStats) -> None:
    with pytest.raises(UserError, match="normalisation statistics"):
        normalise(np.zeros(1), stats)


def test_bins_by_hand() -> None:
    assert bin_centers(4).tolist() == [-0.75, -0.25, 0.25, 0.75]
    actions = np.array([[-1.0, -0.51, -0.5], [0.0, 0.999, 1.0], [-7.0, 7.0, -0.0]])
    assert to_bins(actions, 4).tolist() == [[0, 0, 1], [2, 3, 3], [0, 3, 2]]
    assert to_bins(actions, 4).dtype == np.int64


@pytest.mark.parametrize("bins", [2, 7, 32, 100, 128, 255, 256, 1024])
def test_bins_round_trip(bins: int) -> None:
    assert to_bins(bin_centers(bins), bins).tolist() == list(range(bins))
    values = np.linspace(-1, 1, 999)
    assert np.abs(bin_centers(bins)[to_bins(values, bins)] - values).max() <= 1 / bins + 1e-6  # half a bin


def test_bins_refuse_nan() -> None:
    with pytest.raises(UserError, match="finite"):
        to_bins([0.0, np.nan], 8)


def test_check_accepts_what_fits(tiny_manifest: Manifest, observation: dict[str, Any]) -> None:
    check(observation, tiny_manifest.policy)
    check(observation | {"state": observation["state"].astype(np.float64).tolist()}, tiny_manifest.policy)


def test_check_accepts_any_size_where_the_camera_resizes(tiny_manifest: Manifest, observation: dict[str, Any]) -> None:
    spec = tiny_manifest.policy
    spec = replace(spec, cameras=(replace(spec.cameras[0], resize="bilinear"),))
    check(observation | {"image.corner4": random_pictures(48, 64)}, spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image.corner4": None},
            "expected an observation with image.corner4, instruction, state, found no image.corner4;",
        ),
        ({"image.wrist": np.zeros(3)}, "found unknown image.wrist; name"),
        ({"image.corner4": None, "image.corner": np.zeros(3)}, "found no image.corner4 and unknown image.corner;"),
        ({"instruction": None}, "found no instruction;"),
        ({"instruction": 3}, "expected instruction to be a non-empty string, found int;"),
        ({"instruction": b"open"}, "found bytes;"),
        ({"instruction": "  "}, "found '  ';"),
        ({"image.corner4": random_pictures(48, 64)}, "32 x 32 pixels (height x width), found 48 x 64;"),
        ({"image.corner4": np.zeros((32, 32, 3))}, "as a uint8 array, found dtype float64;"),
        ({"image.corner4": [[0]]}, "as a uint8 array, found list;"),
        ({"image.corner4": np.zeros((32, 32, 4), np.uint8)}, "(height, width, 3), found (32, 32, 4);"),
        ({"image.corner4": np.zeros((32, 32), np.uint8)}, "(height, width, 3), found (32, 32);"),
        ({"image.corner4": np.zeros((1, 32, 32, 3), np.uint8)}, "found (1, 32, 32, 3);"),
        ({"state": np.zeros(4)}, "expected state of shape (3,), found (4,); give x, y, grip"),
        ({"state": np.zeros((1, 3))}, "found (1, 3);"),
        ({"state": np.array([0, np.nan, 0])}, "expected finite state, found nan in y (dimension 1);"),
        ({"state": np.array([0, 0, -np.inf])}, "found -inf in grip (dimension 2);"),
        ({"state": np.array([0, 1e300, 0])}, "found 1e+300 in y (dimension 1);"),  # infinite in float32
        ({"state": np.array([1, 2, 3])}, "expected state as floating-point numbers, found int64;"),
        ({"state": ["a", "b", "c"]}, "expected state as floating-point numbers, found <U1;"),
        ({"state": [[0.0], [0.0, 1.0]]}, "expected state as floating-point numbers, found object;"),
    ],
)
def test_check_refuses(
    tiny_manifest: Manifest, observation: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    changed = {name: value for name, value in (observation | changes).items() if value is not None}
    with pytest.raises(UserError) as caught:
        check(changed, tiny_manifest.policy)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_check_of_a_policy_without_state(tiny_manifest: Manifest, observation: dict[str, Any]) -> None:
    spec = replace(tiny_manifest.policy, state=None)
    with pytest.raises(UserError, match="found unknown state"):
        check(observation, spec)
    check({name: value for name, value in observation.items() if name != "state"}, spec)


def other(spec: PolicySpec, name: str, **changes: Any) -> PolicySpec:
    """With a second camera."""
    return replace(spec, cameras=(*spec.cameras, replace(spec.cameras[0], name=name, **changes)))


def test_check_of_optional_cameras(tiny_manifest: Manifest, observation: dict[str, Any]) -> None:
    spec = other(tiny_manifest.policy, "wrist", optional=True)
    check(observation, spec)
    check(observation | {"image.wrist": observation["image.corner4"]}, spec)
    with pytest.raises(UserError, match=r"expected image\.wrist as a uint8 array"):
        check(observation | {"image.wrist": None}, spec)
    with pytest.raises(
        UserError, match=r"image.corner4, instruction, state and optionally image.wrist, found no image"
    ):
        check({"image.wrist": observation["image.corner4"], "state": np.zeros(3), "instruction": "go"}, spec)


def test_check_wants_one_camera_of_several_optional_ones(tiny_manifest: Manifest, observation: dict[str, Any]) -> None:
    spec = other(tiny_manifest.policy, "wrist", optional=True)
    spec = replace(spec, cameras=tuple(replace(camera, optional=True) for camera in spec.cameras))
    check({**observation, "image.wrist": observation["image.corner4"]}, spec)
    del observation["image.corner4"]
    with pytest.raises(UserError, match=r"and optionally image.corner4, image.wrist, found no picture;"):
        check(observation, spec)


def test_check_of_a_policy_of_one_task(tiny_manifest: Manifest, observation: dict[str, Any]) -> None:
    spec = replace(tiny_manifest.policy, prompt=None)
    check(observation, spec)  # its instruction is not read
    del observation["instruction"]
    check(observation, spec)
    with pytest.raises(UserError, match=r"expected an observation with image.corner4, state, found no state;"):
        check({"image.corner4": observation["image.corner4"]}, spec)


@pytest.fixture
def flow_spec(tiny_manifest: Manifest) -> PolicySpec:
    """Chunks of 3 steps of 4 dimensions, from noise of width 6."""
    spec = tiny_manifest.policy
    return replace(spec, decode="flow", flow=FlowSpec(10, 6), action=replace(spec.action, bins=0))


def test_check_of_noise(flow_spec: PolicySpec, tiny_manifest: Manifest, observation: dict[str, Any]) -> None:
    noise = np.zeros((3, 6), np.float32)
    check(observation, flow_spec)
    check(observation | {"noise": noise}, flow_spec)
    with pytest.raises(UserError, match="found unknown noise"):
        check(observation | {"noise": noise}, tiny_manifest.policy)
    for wrong, found in ((noise[:2], r"float32 \(2, 6\)"), (noise.astype(int), r"int64 \(3, 6\)"), ([], "list")):
        with pytest.raises(UserError, match=rf"expected noise as a float array of shape \(3, 6\), found {found}"):
            check(observation | {"noise": wrong}, flow_spec)
    with pytest.raises(UserError, match="expected finite noise"):
        check(observation | {"noise": noise + np.nan}, flow_spec)


@pytest.fixture
def tokenizer(tmp_path: Path, write_tokenizer: Callable[[Path], None]) -> Callable[[PolicySpec], Tokenizer]:
    write_tokenizer(tmp_path / "tokenizer.json")
    return lambda spec: Tokenizer(tmp_path / "tokenizer.json", spec.prompt or PromptSpec("", 1, 0))


def test_prepare(
    tiny_manifest: Manifest, observation: dict[str, Any], tokenizer: Callable[[PolicySpec], Tokenizer]
) -> None:
    spec = other(other(tiny_manifest.policy, "left", optional=True), "right", resize="bilinear", height=16)
    observation |= {"image.right": random_pictures(8, 8), "state": np.array([0.5, 0.6, 1.0])}
    prepared = prepare(observation, spec, tokenizer(spec))
    assert [picture.shape for picture in prepared.pixels] == [(32, 32, 3), (16, 32, 3)]  # left is not there
    assert prepared.ids is not None
    assert prepared.ids.tolist() == [2, 4, 5, 0, 0]
    assert prepared.state is not None
    np.testing.assert_allclose(prepared.state, [1, 0, 1])  # centers 0, 0.6, 0.5; scales 0.5, 0.25, 0.5
    assert spec.state is not None
    wide = replace(spec, state=replace(spec.state, width=5), prompt=None)
    prepared = prepare(observation, wide, None)
    assert prepared.ids is None
    assert prepared.state is not None
    np.testing.assert_allclose(prepared.state, [1, 0, 1, 0, 0])
    assert prepared.state.dtype == np.float32


def test_prepare_tells_the_state_before_it_is_widened(
    tiny_manifest: Manifest, observation: dict[str, Any], tokenizer: Callable[[PolicySpec], Tokenizer]
) -> None:
    spec = tiny_manifest.policy
    assert spec.state is not None
    spec = replace(spec, state=replace(spec.state, width=32), prompt=PromptSpec("{state}", 9, None, state_bins=4))
    prepared = prepare(observation | {"state": np.array([0.0, 0.6, 0.5])}, spec, tokenizer(spec))
    assert prepared.ids is not None
    assert len(prepared.ids) == 3  # numbers, unknown words to this vocabulary
    assert prepared.state is None
