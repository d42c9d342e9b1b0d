"""Pre-processing against PIL, numbers worked out by hand, and the formulas of the specs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlrc.artifact import CameraSpec, Manifest, NormStats, PromptSpec
from rlrc.errors import UserError
from rlrc.runtime.preprocess import Tokenizer, bin_centers, check, normalise, pictures, to_bins, unnormalise

CAMERA = CameraSpec("front", 2, 2, "none", (0.5, 0.25, 0.0), (0.5, 0.25, 1.0), "HWC")


def random_pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def test_pictures_by_hand() -> None:
    image = np.array([[[0, 0, 0], [255, 255, 255]], [[51, 102, 204], [255, 0, 51]]], np.uint8)
    # (v / 255 - mean) / std; 51 / 255 = 0.2, 102 / 255 = 0.4, 204 / 255 = 0.8
    expected = [[[-1, -1, 0], [1, 3, 1]], [[-0.6, 0.6, 0.8], [1, -1, 0.2]]]
    pixels = pictures(image, CAMERA)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


def test_pictures_every_byte_value_is_exact_to_float32() -> None:
    image = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, -1)  # (256, 1, 3)
    camera = CameraSpec("front", 256, 1, "none", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "HWC")
    exact = (np.arange(256)[:, None, None] / 255.0 - camera.mean) / camera.std
    np.testing.assert_allclose(pictures(image, camera), exact, atol=5e-7)  # 2 of the largest value's last places


def test_pictures_channels_first() -> None:
    image = random_pictures(2, 2)
    pixels = pictures(image, replace(CAMERA, layout="CHW"))
    assert pixels.shape == (3, 2, 2)
    assert pixels.flags.c_contiguous
    assert pixels[2, 1, 0] == pytest.approx(image[1, 0, 2] / 255, abs=1e-6)


@pytest.mark.parametrize("size", [(7, 5), (64, 48), (300, 200)])
def test_pictures_bilinear_is_pil(size: tuple[int, int]) -> None:
    camera = CameraSpec("front", 32, 24, "bilinear", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "HWC")
    image = random_pictures(*size)
    resized = Image.fromarray(image).resize((24, 32), Image.Resampling.BILINEAR)  # PIL says (width, height)
    np.testing.assert_allclose(pictures(image, camera), np.asarray(resized) / 255.0, atol=1e-6)


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
@pytest.mark.parametrize("size", [(32, 24), (50, 40)])
def test_pictures_of_a_batch_are_those_of_its_members(layout: Any, size: tuple[int, int]) -> None:
    camera = CameraSpec("front", 32, 24, "bilinear", (0.5, 0.4, 0.3), (0.25, 0.2, 0.1), layout)
    batch = random_pictures(4, *size)
    assert np.array_equal(pictures(batch, camera), np.stack([pictures(image, camera) for image in batch]))


def test_pictures_refuses_to_resize_where_the_camera_says_none() -> None:
    with pytest.raises(UserError, match=r"expected image.front of 2 x 2 pixels .* found 4 x 3"):
        pictures(random_pictures(4, 3), CAMERA)


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


@pytest.fixture
def tokenizer_file(tmp_path: Path, write_tokenizer: Callable[[Path], None]) -> Path:
    write_tokenizer(tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


def test_tokenizer(tokenizer_file: Path) -> None:
    ids = Tokenizer(tokenizer_file, PromptSpec("the {instruction}", 5, pad_id=6))("open drawer")
    assert ids.dtype == np.int64
    assert ids.tolist() == [4, 2, 5, 6, 6]  # PAD UNK open close the drawer window


def test_tokenizer_template_takes_braces_as_they_are(tokenizer_file: Path) -> None:
    ids = Tokenizer(tokenizer_file, PromptSpec("{} {instruction}", 5, 0))("{instruction}")
    assert ids.tolist() == [1, 1, 1, 1, 0]  # the words "{}", "{", "instruction" and "}" are unknown


def test_tokenizer_refuses_what_does_not_fit(tokenizer_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"at most 2 tokens .* found 3 in 'open the drawer'; shorten it"):
        Tokenizer(tokenizer_file, PromptSpec("{instruction}", 2, 0))("open the drawer")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"expected a tokenizers file, found .*broken.json"):
        Tokenizer(tmp_path / "broken.json", PromptSpec("{instruction}", 2, 0))


def test_tokenizer_ignores_padding_and_truncation_of_its_file(tokenizer_file: Path) -> None:
    from tokenizers import Tokenizer as Tokenizers

    carrying = Tokenizers.from_file(str(tokenizer_file))
    carrying.enable_padding(length=9)
    carrying.enable_truncation(1)
    carrying.save(str(tokenizer_file))
    assert Tokenizer(tokenizer_file, PromptSpec("{instruction}", 4, 0))("open the drawer").tolist() == [2, 4, 5, 0]


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
