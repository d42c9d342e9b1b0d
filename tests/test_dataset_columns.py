"""Columns, pictures and videos of data sets that other programs wrote: what says the same is read, the rest refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rlrc.datasets.inspection import describe
from rlrc.datasets.lerobot import Dataset
from rlrc.datasets.meta import Feature
from rlrc.datasets.writer import Recording, write
from rlrc.errors import UserError

TOP, LENGTHS, SIZE, FPS = "observation.images.top", (4, 3, 5), 32, 10
DATA, ROWS, TASKS = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet"
MP4 = f"videos/{TOP}/chunk-000/file-000.mp4"


def record(path: Path, kind: str = "image", lengths: tuple[int, ...] = LENGTHS, mb: float = 100) -> Path:
    features = {
        TOP: Feature(kind, (SIZE, SIZE, 3)),
        "action": Feature("float32", (2,)),
        "next.reward": Feature("float32", (1,)),
        "count": Feature("int64", (1,)),
    }

    def frame(number: int) -> dict[str, Any]:
        picture = np.full((SIZE, SIZE, 3), 40 + number, np.uint8)
        return {
            TOP: picture,
            "action": np.array([number, 1], np.float32),
            "next.reward": np.array([number], np.float32),
            "count": [number],
        }

    def frames(episode: int) -> list[dict[str, Any]]:
        return [frame(10 * episode + i) | {"count": np.array([i])} for i in range(lengths[episode])]

    write(path, FPS, features, (Recording(f"task {e % 2}", frames(e)) for e in range(len(lengths))), data_mb=mb)
    return path


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("columns")
    return {kind: record(parent / kind, kind) for kind in ("image", "video")}


@pytest.fixture
def images(recorded: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded["image"], tmp_path / "set"))


@pytest.fixture
def video(recorded: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded["video"], tmp_path / "set"))


def replace(path: Path, relative: str, name: str, column: pa.Array) -> None:
    table = pq.read_table(path / relative)
    pq.write_table(table.set_column(table.column_names.index(name), name, column), path / relative)


def edit_info(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    info = json.loads((path / "meta/info.json").read_text())
    change(info)
    (path / "meta/info.json").write_text(json.dumps(info))


NUMBERS = [10 * e + i for e, n in enumerate(LENGTHS) for i in range(n)]
PAIRS = [[float(n), 1.0] for n in NUMBERS]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(PAIRS, pa.large_list(pa.float64())),
        pa.array(PAIRS, pa.list_(pa.float16())),
        pa.array([[int(n) for n in pair] for pair in PAIRS], pa.list_(pa.uint8())),
        pa.array([[Decimal(int(n)) for n in pair] for pair in PAIRS], pa.list_(pa.decimal128(9, 2))),
        pa.array([[[n] for n in pair] for pair in PAIRS], pa.list_(pa.list_(pa.float32(), 1), 2)),
        pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.float32(), [2]), pa.array(PAIRS, pa.list_(pa.float32(), 2))
        ),
    ],
    ids=lambda column: str(column.type),
)
def test_types_that_say_the_same_are_read(images: Path, column: pa.Array) -> None:
    replace(images, DATA, "action", column)
    found = Dataset.open(images).column("action")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(PAIRS, np.float32))


@pytest.mark.parametrize(
    "column",
    [
        pa.array(NUMBERS, pa.float64()).dictionary_encode(),
        pa.array(NUMBERS, pa.int16()),
        pa.array([[n] for n in NUMBERS], pa.large_list(pa.float32())),
        pa.array([Decimal(n) for n in NUMBERS], pa.decimal256(50, 3)),
    ],
    ids=lambda column: str(column.type)[:30],
)
def test_single_numbers_of_other_types_are_read(images: Path, column: pa.Array) -> None:
    replace(images, DATA, "next.reward", column)
    np.testing.assert_array_equal(Dataset.open(images).column("next.reward"), np.array(NUMBERS, np.float32))


def test_indices_of_other_types_are_read(images: Path) -> None:
    """pandas writes integers as floats when there was an empty value in between."""
    for name in ("index", "episode_index", "task_index", "frame_index"):
        values = pq.read_table(images / DATA)[name].cast(pa.float64()).combine_chunks()
        replace(images, DATA, name, values)
    for name in ("dataset_from_index", "dataset_to_index", "episode_index"):
        replace(images, ROWS, name, pq.read_table(images / ROWS)[name].cast(pa.float64()).combine_chunks())
    replace(images, TASKS, "task_index", pa.array([0, 1], pa.uint8()))
    replace(images, TASKS, "task", pa.array(["task 0", "task 1"], pa.large_string()).dictionary_encode())
    dataset = Dataset.open(images)
    assert dataset.column("episode_index").dtype == np.int64
    assert (dataset.frame(5).episode, dataset.frame(5).index, dataset.frame(5).task) == (1, 1, "task 1")


STRUCTS = pa.array([{"x": n, "y": 1.0} for n in NUMBERS])
RAGGED = pa.array([[1.0] * (1 + n % 3) for n in range(12)])
HOLES = pa.array([[1.0, None if n == 3 else 2.0] for n in range(12)])


@pytest.mark.parametrize(
    ("name", "column", "found"),
    [
        ("action", STRUCTS, "the type struct<x: int64, y: double>"),
        ("action", RAGGED, "lists of 1 to 3 values"),
        ("action", HOLES, "1 empty values"),
        ("action", pa.array([[1.0] * 3] * 12), "lists of 3 values"),
        ("action", pa.array(NUMBERS), "single numbers"),
        ("action", pa.array([["a", "b"]] * 12), "the type string"),
        ("action", pa.array([[("a", 1.0)]] * 12, pa.map_(pa.string(), pa.float64())), "the type map<string, double.*>"),
        ("action", pa.nulls(12), "empty values only"),
        ("action", pa.array([[1e300, 0.0]] * 12), "the double 1e\\+300"),
        ("count", pa.array([str(n) for n in NUMBERS]), "the type string"),
        ("count", pa.array([n + 0.5 for n in NUMBERS]), "the double 0.5"),
        ("count", pa.array([None, *NUMBERS[1:]]), "1 empty values"),
        ("count", pa.array([float("nan")] * 12), "the double nan"),
        ("count", pa.array([2**64 - 1] * 12, pa.uint64()), "the uint64 18446744073709551615"),
        ("next.reward", pa.array([b"1"] * 12), "the type binary"),
        ("timestamp", pa.array([None, *NUMBERS[1:]], pa.float32()), "1 empty values"),
        ("timestamp", pa.array(NUMBERS, pa.timestamp("us")), r"the type timestamp\[us\]"),
        ("index", pa.nulls(12), "empty values only"),
        ("index", pa.array([None, *range(1, 12)]), "1 empty values"),
        ("episode_index", pa.array(["0"] * 12), "the type string"),
        ("task_index", pa.array([[0]] * 11 + [[]]), "lists of 0 to 1 values"),
    ],
)
def test_other_types_are_refused_by_name(images: Path, name: str, column: pa.Array, found: str) -> None:
    replace(images, DATA, name, column)
    with pytest.raises(UserError, match=f"in every row of the column {name} in .*{DATA}, found {found}; ") as error:
        Dataset.open(images).column(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("relative", "name", "column", "message"),
    [
        (ROWS, "episode_index", pa.array([0, None, 2]), "column episode_index in .* found 1 empty values"),
        (ROWS, "dataset_from_index", pa.array([0.5, 4, 7]), "column dataset_from_index in .* found the double 0.5"),
        (ROWS, "dataset_to_index", pa.array(["4", "7", "12"]), "column dataset_to_index in .* found the type string"),
        (ROWS, f"videos/{TOP}/from_timestamp", pa.nulls(3), "from_timestamp in .* found empty values only"),
        (
            ROWS,
            f"videos/{TOP}/from_timestamp",
            pa.array([0, float("nan"), 1]),
            "expected a from_timestamp .* found nan",
        ),
        (ROWS, f"videos/{TOP}/from_timestamp", pa.array([-1.0, 0.4, 0.7]), "expected a from_timestamp .* found -1"),
        (ROWS, f"videos/{TOP}/file_index", pa.array([{"i": 0}] * 3), "file_index in .* found the type struct"),
        (TASKS, "task_index", pa.array([0, None]), "column task_index in .* found 1 empty values"),
        (TASKS, "task_index", pa.array([0, 0]), r"expected task_index 0, 1, ... in .* found \[0, 0\]"),
        (TASKS, "task_index", pa.array(["0", "1"]), "column task_index in .* found the type string"),
        (TASKS, "task", pa.array([3, 4]), "expected strings .* column task in .* found int64"),
        (TASKS, "task", pa.array([["a"], ["b"]]), "expected strings .* column task in .* found list"),
        (TASKS, "task", pa.array([b"\xff", b"a"]).view(pa.string()), "expected strings in UTF-8 .* column task"),
        (DATA, "timestamp", pa.array([0.0, float("nan"), *[1.0] * 10]), "finite timestamp .* found nan at frame 1"),
    ],
)
def test_metadata_of_other_types_is_refused(
    video: Path, relative: str, name: str, column: pa.Array, message: str
) -> None:
    replace(video, relative, name, column)
    with pytest.raises(UserError, match=message) as error:
        Dataset.open(video)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.update(features=[]), "expected an object at features, found"),
        (lambda i: i["features"].update(action="float32"), "expected an object at features.action, found 'float32'"),
        (lambda i: i["features"]["action"].update(shape=[2.0]), "expected a dtype and a shape of the feature action"),
        (lambda i: i["features"]["action"].update(shape=2), "expected a dtype and a shape of the feature action"),
        (
            lambda i: i["features"]["index"].update(dtype="string"),
            r"expected the feature index of int64 .* found string",
        ),
        (
            lambda i: i["features"]["timestamp"].update(shape=[2]),
            r"expected the feature timestamp of float32 and shape",
        ),
        (lambda i: i.update(total_frames="12"), "expected an integer at total_frames, found '12'"),
        (lambda i: i.update(robot_type=["a"]), "expected a string at robot_type|found"),
        (lambda i: i.update(video_path=3), "expected .* at video_path, found 3"),
        (lambda i: i.update(fps=None), "expected a number at fps, found None"),
    ],
)
def test_a_description_of_other_types_is_refused(images: Path, change: Callable[[Any], Any], message: str) -> None:
    edit_info(images, change)
    with pytest.raises(UserError, match=message) as error:
        Dataset.open(images)
    assert "\n" not in str(error.value)


def test_details_of_other_types_are_left_alone(images: Path) -> None:
    edit_info(images, lambda i: i["features"]["action"].update(info="none", names=7, video_info=[1]))
    edit_info(images, lambda i: i["features"]["next.reward"].update(shape=[], names={"a": 1}))
    dataset = Dataset.open(images)
    assert dataset.features["action"].names is None
    assert dataset.column("next.reward").shape == (12,)


def test_a_column_that_is_there_twice_is_refused(images: Path) -> None:
    table = pq.read_table(images / DATA)
    pq.write_table(table.append_column("action", table["action"]), images / DATA)
    with pytest.raises(UserError, match=f"expected the column action in .*{DATA}, found 2; "):
        Dataset.open(images).column("action")


def test_tasks_of_episodes_are_those_of_their_frames(images: Path) -> None:
    """lerobot/libero has no tasks in meta/episodes."""
    pq.write_table(pq.read_table(images / ROWS).drop_columns(["tasks", "length"]), images / ROWS)
    found = describe(Dataset.open(images))
    assert found["tasks"] == {"task 0": {"episodes": 2, "frames": 9}, "task 1": {"episodes": 1, "frames": 3}}


@pytest.mark.parametrize("wrong", ["file_index", "chunk_index", "none"])
def test_data_files_are_found_by_their_names(tmp_path: Path, wrong: str) -> None:
    """As lerobot finds them, whatever meta/episodes says about them."""
    path = record(tmp_path / "set", lengths=(4, 3, 5, 2), mb=1e-6)
    assert len(list((path / "data").rglob("*.parquet"))) == 4
    if wrong == "none":
        pq.write_table(pq.read_table(path / ROWS).drop_columns(["data/file_index", "data/chunk_index"]), path / ROWS)
        edit_info(path, lambda i: i.pop("data_path"))
    else:
        replace(path, ROWS, f"data/{wrong}", pa.array([0, 7, 0, 0]))
    dataset = Dataset.open(path)
    for i, number in enumerate([*NUMBERS, 30, 31]):
        assert dataset.picture(i, TOP)[0, 0, 0] == 40 + number
        assert dataset.column("action")[i, 0] == number


def test_an_episode_may_lie_in_two_data_files(images: Path) -> None:
    table = pq.read_table(images / DATA)
    pq.write_table(table.slice(0, 6), images / DATA)
    (images / "data/chunk-001").mkdir()
    pq.write_table(table.slice(6), images / "data/chunk-001/file-000.parquet", row_group_size=2)
    dataset = Dataset.open(images)
    assert [int(dataset.picture(i, TOP)[0, 0, 0]) - 40 for i in range(12)] == NUMBERS


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def with_pictures(path: Path, data: Any, kind: pa.DataType | None = None) -> Dataset:
    column = pa.array([data] * 12, kind) if kind else pa.array([{"bytes": data, "path": "frame.png"}] * 12)
    replace(path, DATA, TOP, column)
    return Dataset.open(path)


GREY = np.linspace(0, 255, SIZE * SIZE).astype(np.uint8).reshape(SIZE, SIZE)
COLOURS = np.stack([GREY, GREY.T, 255 - GREY], -1)
BLACK = Image.new("L", (SIZE, SIZE))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(Image.fromarray(GREY)), GREY),
        (encoded(Image.fromarray(np.stack([GREY, GREY.T], -1), "LA")), GREY),
        (encoded(Image.fromarray(GREY > 100)), (GREY > 100) * 255),
        (encoded(Image.fromarray(GREY).convert("P")), GREY),
        (encoded(Image.fromarray(COLOURS).convert("RGBA")), COLOURS),
        (encoded(Image.fromarray(255 - COLOURS).convert("RGB"), "BMP"), 255 - COLOURS),
        (encoded(Image.merge("CMYK", [*Image.fromarray(COLOURS).split(), BLACK]), "TIFF"), 255 - COLOURS),
    ],
    ids=["L", "LA", "1", "P", "RGBA", "BMP", "CMYK"],
)  # fmt: skip
def test_pictures_of_8_bits_are_read(images: Path, data: bytes, expected: np.ndarray) -> None:
    expected = np.broadcast_to(expected if expected.ndim == 3 else expected[..., None], (SIZE, SIZE, 3))
    np.testing.assert_array_equal(with_pictures(images, data).picture(3, TOP), expected)
    np.testing.assert_array_equal(with_pictures(images, data, pa.large_binary()).picture(11, TOP), expected)


def test_a_picture_is_turned_as_its_orientation_says(images: Path) -> None:
    """Orientation 6: the camera was turned to the left, so that the picture is turned to the right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(COLOURS), "PNG", exif=exif)
    np.testing.assert_array_equal(with_pictures(images, data).picture(0, TOP), np.rot90(COLOURS, -1))


@pytest.mark.parametrize(
    ("image", "kind", "found"),
    [
        (Image.fromarray(GREY.astype(np.uint16) * 257), "PNG", "16-bit grey"),
        (Image.fromarray(GREY.astype(np.uint16)), "TIFF", "16-bit grey"),
        (Image.fromarray(GREY.astype(np.int32) * 70000), "TIFF", "32-bit grey"),
        (Image.fromarray((GREY / 255).astype(np.float32)), "TIFF", "floating-point grey"),
    ],
)
def test_pictures_of_more_bits_are_refused(images: Path, image: Image.Image, kind: str, found: str) -> None:
    """Their range is not known: 16 bits may hold 12 of a camera or a distance in millimetres. PIL would clip to 255."""
    with pytest.raises(UserError, match=f"expected a picture of 8 bits .* {TOP} of .*row 2, found {found}") as error:
        with_pictures(images, encoded(image, kind)).picture(2, TOP)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "kind", "message"),
    [
        (None, pa.binary(), "found no bytes"),
        (b"", pa.binary(), "found 0 bytes that are not a picture"),
        (encoded(Image.fromarray(COLOURS))[:100], pa.binary(), "row 0, found "),
        (encoded(Image.fromarray(COLOURS), "JPEG")[:300], pa.binary(), "row 0, found "),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), pa.binary(), "row 0, found "),
        ("frame.png", pa.string(), "found the type string"),
        ([[[0]]], pa.list_(pa.list_(pa.list_(pa.uint8()))), "found the type list"),
        ({"path": "frame.png"}, pa.struct([("path", pa.string())]), "found the type struct"),
    ],
)
def test_what_is_no_picture_is_refused(images: Path, data: Any, kind: pa.DataType, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        with_pictures(images, data, kind).picture(0, TOP)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("starts", [[0.0, 0.0, 0.0], [0.0, 0.4, 0.2], [0.7, 0.0, 0.5]])
def test_episodes_that_share_a_part_of_a_video_are_refused(video: Path, starts: list[float]) -> None:
    """As after a merge that joined the videos and forgot the times: all episodes would show the first one."""
    replace(video, ROWS, f"videos/{TOP}/from_timestamp", pa.array(starts))
    with pytest.raises(
        UserError, match=rf"expected a part of .*{MP4} for every episode, found episode \d from"
    ) as error:
        Dataset.open(video)
    assert "\n" not in str(error.value)


def test_a_video_that_is_shorter_than_its_episodes_is_refused(video: Path, tmp_path: Path) -> None:
    for number, lengths in enumerate(((4, 3), (4, 3, 4))):
        short = record(tmp_path / str(number), "video", lengths)
        shutil.copy(short / MP4, video / MP4)
        found = f"{sum(lengths)} up to {sum(lengths) / FPS:.3f} s"
        with pytest.raises(UserError, match=rf"expected 12 pictures up to 1.100 s in .*{MP4}, .* found {found}; "):
            Dataset.open(video)


def test_broken_videos_are_refused(video: Path) -> None:
    whole = (video / MP4).read_bytes()
    for data, message in (
        (b"", "expected a readable video .*found: "),
        (whole[: len(whole) // 2], "expected a readable video .*found: "),
        (whole[:-1], "expected a readable video .*found: that it is shorter than its index says"),
        (whole.replace(b"avc1", b"zzzz"), "expected a video in .* that PyAV's FFmpeg decodes, found an unknown codec"),
    ):
        (video / MP4).write_bytes(data)
        with pytest.raises(UserError, match=message) as error:
            Dataset.open(video)
        assert "\n" not in str(error.value)
    (video / MP4).unlink()
    (video / MP4).mkdir()
    with pytest.raises(UserError, match=r"expected a readable video .*found: "):
        Dataset.open(video)


def test_a_video_without_pictures_is_refused(video: Path) -> None:
    import av

    with av.open(str(video / MP4), "w") as container:
        stream = container.add_stream("h264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        container.start_encoding()
    with pytest.raises(UserError, match=r"expected a readable video|expected 12 pictures") as error:
        Dataset.open(video)
    assert "\n" not in str(error.value)


def test_a_spoilt_picture_in_a_video_is_refused(video: Path) -> None:
    data = bytearray((video / MP4).read_bytes())
    start = data.index(b"mdat") + 4
    for i in range(start, len(data)):
        data[i] = (i * 37) % 251
    (video / MP4).write_bytes(data)
    with pytest.raises(UserError) as error:
        dataset = Dataset.open(video)
        for i in range(12):
            dataset.picture(i, TOP)
    assert "\n" not in str(error.value)
