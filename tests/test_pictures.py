"""Pictures against PIL, torch, the goldens' pixel values, and numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlrc.artifact import CameraSpec
from rlrc.errors import UserError
from rlrc.runtime.inference.pictures import to_pixels

DATA = Path(__file__).parent / "data"
CAMERA = CameraSpec("front", 2, 2, "none", (0.5, 0.25, 0.0), (0.5, 0.25, 1.0), "HWC")


def random_pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


def test_pictures_by_hand() -> None:
    image = np.array([[[0, 0, 0], [255, 255, 255]], [[51, 102, 204], [255, 0, 51]]], np.uint8)
    # (v / 255 - mean) / std; 51 / 255 = 0.2, 102 / 255 = 0.4, 204 / 255 = 0.8
    expected = np.array([[[-1, -1, 0], [1, 3, 1]], [[-0.6, 0.6, 0.8], [1, -1, 0.2]]])
    pixels = to_pixels(image, CAMERA)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, expected, atol=1e-6)


def test_pictures_every_byte_value_is_exact_to_float32() -> None:
    image = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, -1)  # (256, 1, 3)
    camera = CameraSpec("front", 256, 1, "none", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "HWC")
    exact = (np.arange(256)[:, None, None] / 255.0 - camera.mean) / camera.std
    np.testing.assert_allclose(to_pixels(image, camera), exact, atol=5e-7)  # 2 of the largest value's last places


def test_pictures_channels_first() -> None:
    image = random_pictures(2, 2)
    pixels = to_pixels(image, replace(CAMERA, layout="CHW"))
    assert pixels.shape == (3, 2, 2)
    assert pixels.flags.c_contiguous
    assert pixels[2, 1, 0] == pytest.approx(image[1, 0, 2] / 255, abs=1e-6)


@pytest.mark.parametrize("size", [(7, 5), (64, 48), (300, 200)])
@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
def test_pictures_are_resized_as_pil_does(resize: Any, size: tuple[int, int]) -> None:
    camera = CameraSpec("front", 32, 24, resize, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "HWC")
    image = random_pictures(*size)
    resized = Image.fromarray(image).resize((24, 32), Image.Resampling[resize.upper()])  # PIL says (width, height)
    np.testing.assert_allclose(to_pixels(image, camera), np.asarray(resized) / 255.0, atol=1e-6)


@pytest.mark.parametrize("layout", ["HWC", "CHW"])
@pytest.mark.parametrize("encoders", [1, 2])
@pytest.mark.parametrize("resize", ["bilinear", "bicubic", "pad", "pad-left-top"])
@pytest.mark.parametrize("size", [(32, 24), (50, 40)])
def test_pictures_of_a_batch_are_those_of_its_members(
    layout: Any, encoders: int, resize: Any, size: tuple[int, int]
) -> None:
    camera = CameraSpec("front", 32, 24, resize, (0.5, 0.4, 0.3) * encoders, (0.25, 0.2, 0.1) * encoders, layout)
    batch = random_pictures(4, *size)
    assert np.array_equal(to_pixels(batch, camera), np.stack([to_pixels(image, camera) for image in batch]))


def test_pictures_refuses_to_resize_where_the_camera_says_none() -> None:
    with pytest.raises(UserError, match=r"expected image.front of 2 x 2 pixels .* found 4 x 3"):
        to_pixels(random_pictures(4, 3), CAMERA)


# Written out by hand: three colours a pixel, all the same.
GREY = np.array([[0, 40, 80, 120]], np.uint8)[..., None].repeat(3, -1)  # (1, 4, 3)


def shown(pixels: np.ndarray) -> list[list[float]]:
    """One colour, in bytes."""
    return (pixels[..., 1] * 255).round(3).tolist()


@pytest.mark.parametrize(
    ("resize", "height", "width", "expected"),
    [
        # Half as wide: between the middles of neighbours. Half as high as one row is a row still.
        ("pad", 3, 2, [[0, 0], [20, 100], [0, 0]]),
        ("pad", 4, 2, [[0, 0], [20, 100], [0, 0], [0, 0]]),  # the odd row below
        ("pad-left-top", 3, 2, [[0, 0], [0, 0], [20, 100]]),
        # Twice as high and wide: output places 0.25, 0.75, ... between the inputs, the outermost beyond them.
        ("pad", 2, 8, [[0, 10, 30, 50, 70, 90, 110, 120]] * 2),
        # The height decides: as high as it is, and three black columns left and right, or all at the left.
        ("pad", 1, 7, [[0, 0, 40, 80, 120, 0, 0]]),
        ("pad-left-top", 1, 7, [[0, 0, 0, 0, 40, 80, 120]]),
    ],
)
def test_padding_by_hand(resize: Any, height: int, width: int, expected: list[list[float]]) -> None:
    camera = CameraSpec("top", height, width, resize, (0.0,) * 3, (1.0,) * 3, "HWC")
    assert shown(to_pixels(GREY, camera)) == expected


def test_padding_is_black_before_it_is_normalised() -> None:
    camera = CameraSpec("top", 4, 4, "pad", (0.5, 0.25, 0.0), (0.5, 0.5, 0.1), "HWC")
    pixels = to_pixels(np.full((2, 4, 3), 255, np.uint8), camera)
    np.testing.assert_allclose(pixels[0, 0], [-1, -0.5, 0], atol=1e-6)
    np.testing.assert_allclose(pixels[1, 0], [1, 1.5, 10], atol=1e-5)


def test_a_picture_of_one_row_is_not_lost() -> None:
    camera = CameraSpec("top", 4, 4, "pad", (0.0,) * 3, (1.0,) * 3, "HWC")
    assert to_pixels(np.full((1, 100, 3), 255, np.uint8), camera).sum() == pytest.approx(4 * 3)


@pytest.mark.parametrize("found", [(480, 640), (1080, 1920), (719, 1281), (64, 50), (5, 7), (224, 224), (639, 427)])
@pytest.mark.parametrize("camera_size", [(224, 224), (64, 100), (512, 512)])
def test_padding_resizes_as_torch_does(found: tuple[int, int], camera_size: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    height, width = camera_size
    image = random_pictures(*found)
    ratio = max(found[1] / width, found[0] / height)
    rows, columns = int(found[0] / ratio), int(found[1] / ratio)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255,
        size=(rows, columns),
        mode="bilinear",
        align_corners=False,
    )[0].permute(1, 2, 0)
    pixels = to_pixels(image, CameraSpec("top", height, width, "pad-left-top", (0.5,) * 3, (0.5,) * 3, "HWC"))
    np.testing.assert_allclose(pixels[height - rows :, width - columns :], expected * 2 - 1, atol=2e-6)
    assert (pixels[: height - rows] == -1).all()
    assert (pixels[:, : width - columns] == -1).all()


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
FUSED = (IMAGENET[0] + HALVES[0], IMAGENET[1] + HALVES[1])


@pytest.mark.parametrize(
    ("family", "size", "resize", "normalisation", "tolerance"),
    [
        ("openvla", 56, "bicubic", FUSED, 1e-5),
        ("openvla-oft-discrete", 56, "bicubic", FUSED, 1e-5),
        ("openvla-oft-l1", 56, "bicubic", FUSED, 1e-5),
        ("pi0", 64, "pad", HALVES, 2e-5),
        ("pi05", 64, "pad", HALVES, 2e-5),
        ("smolvla", 64, "pad-left-top", HALVES, 2e-5),
    ],
)
def test_pixels_of_the_official_code(
    family: str, size: int, resize: Any, normalisation: tuple[Any, Any], tolerance: float
) -> None:
    golden = np.load(DATA / family / "golden.npz")
    camera = CameraSpec("any", size, size, resize, *normalisation, layout="CHW")
    for i in range(2):
        raw = [golden[name] for name in sorted(golden.files) if name.startswith(f"obs{i}.image")]
        pixels = np.stack([to_pixels(image, camera) for image in raw])
        # OpenVLA's lie in the channels, one image after the other; the flow models' are (cameras, 3, H, W).
        expected = golden[f"obs{i}.pixel_values"][0] if resize == "bicubic" else golden["pixel_values"][i]
        np.testing.assert_allclose(pixels.reshape(expected.shape), expected, atol=tolerance)
