"""LeRobotDataset v3.0 folders, written and read again: frames, episodes, files that roll over, statistics, refusals.

lerobot 0.6.1 itself read folders of this writer and wrote folders for this reader, with no difference in any frame
(docs/data.md says how); lerobot is no dependency, so that the tests go by the format's description.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlrc.datasets.lerobot import Dataset
from rlrc.datasets.meta import Feature
from rlrc.datasets.stats import Colours, compute_stats
from rlrc.datasets.video import Video
from rlrc.datasets.writer import Recording, write
from rlrc.errors import UserError

TOP = "observation.images.top"
HEIGHT, WIDTH, FPS = 32, 64, 10
LENGTHS = (7, 1, 12, 9)
TASKS = ("open the drawer", "close the drawer")


def pattern(number: int) -> np.ndarray:
    """A picture that tells its number in blocks of 8 x 8 pixels, black or white, which lossy coding does not blur."""
    bits = (number >> np.arange(32)) & 1
    blocks = np.kron(bits.reshape(4, 8), np.ones((8, 8))).astype(np.uint8)
    return np.repeat((blocks * 180 + 40)[..., None], 3, -1)


def number_of(picture: np.ndarray) -> int:
    bits = picture.reshape(4, 8, 8, 8, 3).mean((1, 3, 4)).ravel() > 130
    return int((bits * 2 ** np.arange(32)).sum())


def features(kind: str = "image") -> dict[str, Feature]:
    return {
        TOP: Feature(kind, (HEIGHT, WIDTH, 3)),
        "observation.state": Feature("float32", (3,), ("x", "y", "grip")),
        "action": Feature("float32", (2,)),
        "next.reward": Feature("float32", (1,)),
    }


def frame(episode: int, step: int) -> dict[str, Any]:
    number = 1000 * episode + step
    return {
        TOP: pattern(number),
        "observation.state": np.array([number, -step, 0.5], np.float32),
        "action": np.array([step + 0.25, episode], np.float32),
        "next.reward": np.array([step], np.float32),
    }


def recordings(lengths: tuple[int, ...] = LENGTHS) -> Iterator[Recording]:
    for episode, length in enumerate(lengths):
        yield Recording(TASKS[episode % 2], (frame(episode, step) for step in range(length)))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same episodes as images and as video. Copy one before you damage it."""
    parent = tmp_path_factory.mktemp("lerobot")
    for kind in ("image", "video"):
        write(parent / kind, FPS, features(kind), recordings(), "arm")
    return {kind: parent / kind for kind in ("image", "video")}


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["video"], tmp_path / "copied"))


PLACES = [(episode, step) for episode, length in enumerate(LENGTHS) for step in range(length)]


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("order", ["forwards", "backwards", "random"])
def test_every_frame_comes_back(folders: dict[str, Path], kind: str, order: str) -> None:
    dataset = Dataset.open(folders[kind])
    assert (len(dataset), dataset.fps, dataset.info.robot_type) == (sum(LENGTHS), FPS, "arm")
    places = list(range(len(dataset)))
    if order == "backwards":
        places.reverse()
    elif order == "random":
        places = [int(i) for i in np.random.default_rng(0).integers(0, len(dataset), 60)]
    for i in places:
        episode, step = PLACES[i]
        found, wanted = dataset.frame(i), frame(episode, step)
        assert (found.episode, found.index, found.task) == (episode, step, TASKS[episode % 2])
        assert found.timestamp == np.float32(step / FPS)
        np.testing.assert_array_equal(found.state, wanted["observation.state"])
        np.testing.assert_array_equal(found.action, wanted["action"])
        assert found.state is not None
        assert found.state.dtype == found.action.dtype == np.float32
        picture = found.pictures[TOP]
        assert (picture.dtype, number_of(picture)) == (np.uint8, 1000 * episode + step)
        difference = np.abs(picture.astype(int) - wanted[TOP]).mean()
        assert difference < (3 if kind == "video" else 1e-9)
    dataset.close()
    assert number_of(dataset.picture(5, TOP)) == 5  # it opens its files again
    dataset.close()


def test_frames_beyond_the_end_are_an_error(folders: dict[str, Path]) -> None:
    dataset = Dataset.open(folders["image"])
    for i in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset.frame(i)


def test_chunks_end_with_their_episode(folders: dict[str, Path]) -> None:
    """Frame 5 of the seven of episode 0; the only frame of episode 1; the last episode; a chunk longer than any."""
    dataset = Dataset.open(folders["image"])
    actions, real = dataset.chunk(5, 4)
    np.testing.assert_array_equal(actions, np.array([[5.25, 0], [6.25, 0], [6.25, 0], [6.25, 0]], np.float32))
    np.testing.assert_array_equal(real, [True, True, False, False])
    actions, real = dataset.chunk(7, 3)
    np.testing.assert_array_equal(actions, np.array([[0.25, 1]] * 3, np.float32))
    np.testing.assert_array_equal(real, [True, False, False])
    actions, real = dataset.chunk(len(dataset) - 1, 2)
    np.testing.assert_array_equal(actions, np.array([[8.25, 3]] * 2, np.float32))
    actions, real = dataset.chunk(0, 100)
    assert (actions.shape, real.sum()) == ((100, 2), 7)
    actions, real = dataset.chunk(8, 3)
    assert real.all()
    np.testing.assert_array_equal(actions[:, 0], [0.25, 1.25, 2.25])


def test_the_layout_is_lerobots(folders: dict[str, Path]) -> None:
    """The names and types that lerobot 0.6.1 writes, read off its own code and folders."""
    path = folders["video"]
    info = json.loads((path / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (4, 29, 2)
    assert (info["fps"], info["splits"], info["chunks_size"]) == (10, {"train": "0:4"}, 1000)
    assert info["features"]["timestamp"] == {"dtype": "float32", "shape": [1], "names": None}
    assert info["features"][TOP]["names"] == ["height", "width", "channels"]
    assert info["features"]["observation.state"]["names"] == ["x", "y", "grip"]
    table = pq.read_table(path / "data/chunk-000/file-000.parquet")
    assert table.schema.field("action").type == pa.list_(pa.float32(), 2)
    assert table.schema.field("next.reward").type == pa.float32()
    assert table.schema.field("index").type == pa.int64()
    assert TOP not in table.column_names
    assert pq.ParquetFile(path / "data/chunk-000/file-000.parquet").num_row_groups == 4  # one an episode
    rows = pq.read_table(path / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    at = f"videos/{TOP}"
    assert [row[f"{at}/from_timestamp"] for row in rows] == pytest.approx([0, 0.7, 0.8, 2.0])
    assert [row[f"{at}/to_timestamp"] for row in rows] == pytest.approx([0.7, 0.8, 2.0, 2.9])
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows] == [(0, 7), (7, 8), (8, 20), (20, 29)]
    assert [row["tasks"] for row in rows] == [[TASKS[0]], [TASKS[1]]] * 2
    assert len(rows[0][f"stats/{TOP}/mean"]) == 3
    tasks = pq.read_table(path / "meta/tasks.parquet")
    assert tasks.to_pydict() == {"task_index": [0, 1], "task": list(TASKS)}
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    image = pq.read_table(folders["image"] / "data/chunk-000/file-000.parquet").schema
    assert image.field(TOP).type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert json.loads(image.metadata[b"huggingface"])["info"]["features"][TOP] == {"_type": "Image"}


@pytest.mark.parametrize("kind", ["image", "video"])
def test_full_files_are_followed_by_others(tmp_path: Path, kind: str) -> None:
    """Limits that two or three episodes reach; every frame is still found, across the files."""
    lengths = (10,) * 8
    limit = {"image": 0.015, "video": 0.006}[kind]
    write(tmp_path / "set", FPS, features(kind), recordings(lengths), data_mb=limit, video_mb=0.002)
    data, videos = (sorted((tmp_path / "set" / part).rglob("file-*")) for part in ("data", "videos"))
    assert 2 <= len(data) < 8
    assert [file.name for file in data] == [f"file-{i:03d}.parquet" for i in range(len(data))]
    assert len(videos) == 0 if kind == "image" else 2 <= len(videos) < 8
    dataset = Dataset.open(tmp_path / "set")
    for i in np.random.default_rng(1).permutation(80):
        assert number_of(dataset.picture(i, TOP)) == 1000 * (i // 10) + i % 10
        assert dataset.chunk(i, 1)[0][0, 1] == i // 10
    if kind == "video":
        rows = pq.read_table(tmp_path / "set/meta/episodes").to_pylist()
        assert [row[f"videos/{TOP}/from_timestamp"] for row in rows].count(0) == len(videos)
    dataset.close()


def test_a_full_chunk_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlrc.datasets.files.FILES_PER_CHUNK", 2)
    write(tmp_path / "set", FPS, features(), recordings((3,) * 5), data_mb=1e-6)
    files = sorted(str(file.relative_to(tmp_path / "set")) for file in (tmp_path / "set/data").rglob("*.parquet"))
    assert files == [f"data/chunk-00{i // 2}/file-00{i % 2}.parquet" for i in range(5)]
    assert number_of(Dataset.open(tmp_path / "set").picture(14, TOP)) == 4002


def test_statistics_are_numpys(folders: dict[str, Path]) -> None:
    states = np.array([frame(*place)["observation.state"] for place in PLACES], np.float64)
    wanted = {"min": states.min(0), "max": states.max(0), "mean": states.mean(0), "std": states.std(0)}
    wanted |= {f"q{q:02d}": np.percentile(states, q, axis=0) for q in (1, 10, 50, 90, 99)}
    stats = json.loads((folders["video"] / "meta/stats.json").read_text())
    for name, value in wanted.items():
        np.testing.assert_allclose(stats["observation.state"][name], value, rtol=1e-12)
    assert stats["observation.state"]["count"] == [29]
    assert stats["next.reward"]["max"] == [11]
    row = pq.read_table(folders["video"] / "meta/episodes/chunk-000/file-000.parquet").to_pylist()[2]
    np.testing.assert_allclose(row["stats/observation.state/mean"], states[8:20].mean(0), rtol=1e-12)
    assert (row["stats/action/count"], row["stats/index/min"]) == ([12], [8])


def test_statistics_of_pictures_are_numpys() -> None:
    pictures = np.random.default_rng(0).integers(0, 200, (3, 5, 4, 3)).astype(np.uint8)
    colours, more = Colours(), Colours()
    colours.add(pictures[0])
    for picture in pictures[1:]:
        more.add(picture)
    colours.join(more)
    flat, stats = pictures.reshape(-1, 3) / 255, colours.stats()
    for name, value in compute_stats(flat).items():
        wanted = np.reshape(value, (3, 1, 1)) if name != "count" else [3]
        np.testing.assert_allclose(stats[name], wanted, rtol=1e-12, err_msg=name)
    large = Colours()
    large.add(np.arange(320 * 320 * 3).reshape(320, 320, 3).astype(np.uint8))
    assert large.counts.sum() == 3 * 160 * 160  # every second pixel


def test_what_lerobot_names_otherwise_is_read(copied: Path) -> None:
    """Names of dimensions by kind, a nameless index of the tasks, channels first, keys of later versions."""
    info = json.loads((copied / "meta/info.json").read_text())
    info["features"]["observation.state"]["names"] = {"motors": ["a", "b", "c"]}
    info["features"][TOP] |= {"shape": [3, HEIGHT, WIDTH], "names": ["channels", "height", "width"]}
    info["tools"] = []
    (copied / "meta/info.json").write_text(json.dumps(info))
    table = pq.read_table(copied / "meta/tasks.parquet")
    pq.write_table(table.rename_columns(["task_index", "__index_level_0__"]), copied / "meta/tasks.parquet")
    dataset = Dataset.open(copied)
    assert dataset.features["observation.state"].names == ("a", "b", "c")
    assert dataset.features[TOP].size == (HEIGHT, WIDTH)
    assert dataset.tasks == list(TASKS)
    assert number_of(dataset.picture(3, TOP)) == 3
    dataset.close()


def test_a_video_of_few_key_frames_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlrc.datasets.video._OPTIONS", {"g": "250", "bf": "2"})
    write(tmp_path / "set", 30, features("video"), recordings((60,)))
    dataset = Dataset.open(tmp_path / "set")
    for i in [0, 59, 1, 30, 31, 29, 45, 2]:
        assert number_of(dataset.picture(i, TOP)) == i
    dataset.close()


def test_going_on_decodes_each_picture_once(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seeks = []
    seek = Video._seek
    monkeypatch.setattr(Video, "_seek", lambda self, seconds: (seeks.append(seconds), seek(self, seconds)))
    dataset = Dataset.open(folders["video"])
    for i in range(len(dataset)):
        dataset.picture(i, TOP)
        dataset.picture(i, TOP)
    assert len(seeks) == 1
    dataset.close()


def test_only_so_many_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlrc.datasets.lerobot._OPEN", 2)
    monkeypatch.setattr("rlrc.datasets.images._ROWS", 1)
    monkeypatch.setattr("rlrc.datasets.images._TABLES", 2)
    for kind in ("image", "video"):
        write(tmp_path / kind, FPS, features(kind), recordings((2,) * 5), data_mb=1e-6, video_mb=1e-6)
        dataset = Dataset.open(tmp_path / kind)
        assert [number_of(dataset.picture(i, TOP)) for i in range(0, 10, 2)] == [0, 1000, 2000, 3000, 4000]
        kept = [len(dataset._videos), len(dataset._pictures._groups), len(dataset._pictures._files)]
        assert kept == ([0, 1, 2] if kind == "image" else [2, 0, 0])
        dataset.close()


def edit_info(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        info = json.loads((path / "meta/info.json").read_text())
        change(info)
        (path / "meta/info.json").write_text(json.dumps(info))

    return damage


def edit_table(relative: str, change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda path: pq.write_table(change(pq.read_table(path / relative)), path / relative)


def truncate(relative: str, size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / relative, size)


def pointer(relative: str) -> Callable[[Path], object]:
    return lambda path: (path / relative).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


DATA, ROWS = "data/chunk-000/file-000.parquet", "meta/episodes/chunk-000/file-000.parquet"
MP4 = f"videos/{TOP}/chunk-000/file-000.mp4"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            edit_info(lambda i: i.update(codebase_version="v2.1")),
            "expected a LeRobotDataset v3.0 .* found .*'v2.1'; conv",
        ),
        (edit_info(lambda i: i.update(codebase_version="v4.0")), "found codebase_version 'v4.0'; see docs/data.md"),
        (edit_info(lambda i: i.pop("codebase_version")), "found codebase_version None"),
        (edit_info(lambda i: i.update(fps=0)), "expected a positive fps in .*, found 0"),
        (edit_info(lambda i: i.update(fps="30")), "expected a number at fps, found '30'"),
        (edit_info(lambda i: i.pop("features")), "expected the key features, found none"),
        (edit_info(lambda i: i["features"].pop("index")), "expected the feature index in"),
        (
            edit_info(lambda i: i["features"]["action"].pop("shape")),
            "expected a dtype and a shape of the feature action",
        ),
        (
            edit_info(lambda i: i["features"][TOP].update(shape=[3])),
            "expected pictures of observation.images.top of three dim",
        ),
        (edit_info(lambda i: i.update(total_frames=30)), "expected 4 episodes of 30 frames .* found 4 of 29; copy"),
        (edit_info(lambda i: i.update(total_episodes=2**70)), "expected 1180591620717411303424 episodes of 29 frames"),
        (edit_info(lambda i: i.update(total_episodes=5)), "expected 5 episodes of 29 frames .* found 4 of 29; copy"),
        (
            edit_info(lambda i: i.update(video_path="../{video_key}/{file_index}")),
            "expected a path inside of the data set",
        ),
        (edit_info(lambda i: i.update(video_path="{nothing}")), "expected a path inside of the data set"),
        (
            edit_info(lambda i: i.update(video_path=None)),
            "expected a path inside of the data set from the template None",
        ),
        (lambda p: (p / "meta/info.json").write_text("{"), "expected JSON, found"),
        (lambda p: (p / "meta/info.json").unlink(), "expected .*info.json, found: No such file"),
        (lambda p: (p / "meta/tasks.parquet").unlink(), "expected the file .*tasks.parquet, found none; copy"),
        (lambda p: shutil.rmtree(p / "meta/episodes"), "expected meta/episodes/.* found none; copy"),
        (lambda p: (p / DATA).unlink(), r"expected data/\*/\*.parquet in .*, found none; copy"),
        (lambda p: (p / MP4).unlink(), "expected the file .*file-000.mp4, found none; copy"),
        (truncate(DATA, 500), "expected a readable parquet file .*file-000.parquet, found: "),
        (truncate(DATA, 0), "expected a readable parquet file .*file-000.parquet, found: "),
        (edit_table(DATA, lambda t: t.slice(1)), "expected 29 rows in .*data, found 28; copy"),
        (edit_table(DATA, lambda t: t.take([1, 0, *range(2, 29)])), "expected rows with index in order in"),
        (edit_table(ROWS, lambda t: t.slice(1)), "expected 4 episodes of 29 frames .* found 3 of 29 with gaps"),
        (truncate(MP4, 100), "expected a readable video .*mp4, found: "),
        (pointer(MP4), "expected a readable video .*mp4, found: a Git LFS pointer to it; run git lfs pull there"),
        (pointer(DATA), "readable parquet file .*0.parquet, found: a Git LFS pointer to it; run git lfs pull there"),
        (edit_table(ROWS, lambda t: t.drop_columns(["dataset_to_index"])), "expected the column dataset_to_index in"),
        (edit_table("meta/tasks.parquet", lambda t: t.slice(0, 1)), "expected task_index below 1, .* found 0 to 1"),
        (edit_table("meta/tasks.parquet", lambda t: t.slice(1)), r"expected task_index 0, 1, ... in .* found \[1\]"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(copied: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(copied)
    with pytest.raises(UserError, match=message) as error:
        Dataset.open(copied)
    assert "\n" not in str(error.value)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found nothing; check the path"):
        Dataset.open(tmp_path / "none")
    with pytest.raises(UserError, match="give the folder of a LeRobotDataset"):
        Dataset.open(tmp_path)


def without_action(table: pa.Table) -> pa.Table:
    return table.drop_columns(["action"])


def with_a_hole(table: pa.Table) -> pa.Table:
    holed = [None, *table["action"].to_pylist()[1:]]
    place = table.column_names.index("action")
    return table.set_column(place, "action", pa.array(holed, pa.list_(pa.float32())))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_info(lambda i: i["features"][TOP].update(shape=[16, 64, 3])), "expected pictures of .* found 32 x 64 at"),
        (
            edit_info(lambda i: i["features"]["action"].update(shape=[3])),
            r"expected float32 \(3,\) in every row of the column action .* found lists of 2 values",
        ),
        (edit_table(DATA, without_action), "expected the column action in"),
        (edit_table(DATA, with_a_hole), "in every row of the column action in .* found 1 empty values"),
    ],
)
def test_damage_is_found_where_it_is_read(copied: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(copied)
    dataset = Dataset.open(copied)
    with pytest.raises(UserError, match=message) as error:
        dataset.frame(7)
    assert "\n" not in str(error.value)
    dataset.close()


def test_broken_pictures_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(folders["image"], tmp_path / "copied"))
    table = pq.read_table(path / DATA)
    broken = pa.array([{"bytes": b"no picture", "path": ""}] * len(table), table.schema.field(TOP).type)
    pq.write_table(table.set_column(table.column_names.index(TOP), TOP, broken), path / DATA)
    with pytest.raises(
        UserError, match=r"expected a picture of 8 bits .* row 3, found 10 bytes that are not a picture"
    ):
        Dataset.open(path).frame(3)


def change(**values: Any) -> dict[str, Any]:
    return frame(0, 0) | {name.replace("_", "."): value for name, value in values.items()}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            change(action=np.array([1], np.float32)),
            r"expected action as float32 \(2,\), found float32 \(1,\) in frame 1 of episode 1",
        ),
        (change(action=np.array([1.0, 2.0])), "found float64"),
        (change(action=np.array([np.nan, 0], np.float32)), "expected finite action, found nan in frame 1 of episode 1"),
        (
            change(observation_state=np.array([0, np.inf, 0], np.float32)),
            "expected finite observation.state, found inf",
        ),
        (change(observation_images_top=pattern(0).astype(np.float32)), "expected observation.images.top as uint8"),
        (change(other=1), "expected the features .* found .*other in frame 1 of episode 1"),
    ],
)
def test_a_value_that_does_not_fit_is_refused(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    episodes = [Recording("go", [frame(0, 0)]), Recording("go", [frame(1, 0), wrong])]
    with pytest.raises(UserError, match=message):
        write(tmp_path / "set", FPS, features("video"), episodes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, features(), []), "expected a positive fps, found 0"),
        ((FPS, features(), []), "expected at least one episode, found none"),
        ((FPS, features(), [Recording("go", [])]), "expected at least one frame in every episode"),
        ((FPS, features(), [Recording(" ", [frame(0, 0)])]), "expected a task, found none"),
        ((FPS, {"index": Feature("int64", (1,))}, []), "found index; rename it"),
        ((FPS, {"a": Feature("video", (31, 64, 3))}, []), "expected an even height and width of the video a"),
        ((FPS, {"a": Feature("image", (31, 64))}, []), r"expected pictures of a of shape \(height, width, 3\)"),
        ((FPS, {"a": Feature("float32", (2, 2))}, []), "expected numbers of one dimension in a"),
        ((FPS, {"a": Feature("string", (1,))}, []), "expected numbers of one dimension in a"),
    ],
)
def test_a_data_set_that_cannot_be_is_refused(tmp_path: Path, arguments: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write(tmp_path / "set", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match="expected a new output"):
        write(tmp_path / "set", FPS, features(), recordings())
    assert list((tmp_path / "set").iterdir()) == []


def test_a_killed_writer_leaves_no_data_set(tmp_path: Path) -> None:
    """Killed in the middle of its second episode: the name stays free, and the next writer clears what is left."""
    program = f"""
        import os, signal, sys
        sys.path[:0] = {[path for path in sys.path if path]!r}
        import numpy as np
        from rlrc.datasets.meta import Feature
        from rlrc.datasets.writer import Recording, write

        def frames(last):
            for step in range(20):
                if last and step == 10:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield {{"a": np.zeros((32, 32, 3), np.uint8)}}

        write(sys.argv[1], 10, {{"a": Feature("video", (32, 32, 3))}}, [Recording("go", frames(i)) for i in range(2)])
        """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "set")]
    ended = subprocess.run(command, check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "set").exists()
    write(tmp_path / "set", FPS, features(), recordings())
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
