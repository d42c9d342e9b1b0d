"""What a LeRobotDataset v3.0 folder says about itself: meta/info.json, meta/tasks.parquet, meta/episodes/*.

The layout is that of lerobot's ``lerobot.datasets`` (0.4 to 0.6, codebase version v3.0):

    meta/info.json                                  features, frame rate, path templates, size limits
    meta/stats.json                                 statistics of every feature over the whole data set
    meta/tasks.parquet                              task (a sentence) and its task_index
    meta/episodes/chunk-000/file-000.parquet        a row an episode: its frames, files, place in the videos, statistics
    data/chunk-000/file-000.parquet                 a row a frame, many episodes a file; pictures as PNG bytes, unless
    videos/CAMERA/chunk-000/file-000.mp4            they are video, many episodes one after the other in a file
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rlrc.consistency import is_inside
from rlrc.errors import UserError
from rlrc.strict import StrictError, decode, parse

VERSION = "v3.0"
INFO, STATS, TASKS, EPISODES = "meta/info.json", "meta/stats.json", "meta/tasks.parquet", "meta/episodes"
CHUNK_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH = f"data/{CHUNK_FILE}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{CHUNK_FILE}.mp4"
PICTURES = "observation.images."  # what a camera's key begins with
STATE, ENVIRONMENT, ACTION = "observation.state", "observation.environment_state", "action"


_NUMBERS = {"bool", *(f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64))} - {"float8"}


@dataclass(frozen=True)
class Feature:
    """A column: ``dtype`` "image", "video", "string" or a numpy dtype; ``names`` of its dimensions, if any."""

    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...] | None = None
    depth: bool = False

    @property
    def camera(self) -> bool:
        return self.dtype in ("image", "video")

    @property
    def numeric(self) -> bool:
        return self.dtype in _NUMBERS

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a camera's pictures, wherever the shape has its channels."""
        channels = [i for i, name in enumerate(self.names or ()) if name in ("channels", "channel")]
        first = channels == [0] if channels else self.shape[0] in (1, 3) and self.shape[-1] not in (1, 3)
        height, width = self.shape[1:] if first else self.shape[:2]
        return height, width


INDICES = {  # the columns that every data set has
    "timestamp": Feature("float32", (1,)),
    "frame_index": Feature("int64", (1,)),
    "episode_index": Feature("int64", (1,)),
    "index": Feature("int64", (1,)),
    "task_index": Feature("int64", (1,)),
}


@dataclass(frozen=True)
class Info:
    """info.json, as far as it is read; the defaults are lerobot's. Other keys are left alone, as lerobot does."""

    codebase_version: str
    fps: float
    features: dict[str, dict[str, Any]]
    total_episodes: int
    total_frames: int
    robot_type: str | None = None
    data_path: str = DATA_PATH
    video_path: str | None = VIDEO_PATH


@dataclass(frozen=True)
class Place:
    """Where an episode is in the videos of a camera, in seconds from the start of the file."""

    file: Path
    start: float
    end: float


@dataclass(frozen=True)
class Episode:
    """Frames [start, end) of the data set. ``places`` has one entry for every camera that is video."""

    index: int
    start: int
    end: int
    tasks: tuple[str, ...]
    data: Path
    places: dict[str, Place] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.end - self.start


def read_info(path: Path) -> Info:
    """Raises UserError for another version of the format, and for a folder that is no data set."""
    if not path.is_dir():
        raise UserError(
            f"expected a LeRobotDataset folder at {path}, found {'a file' if path.exists() else 'nothing'}; "
            "check the path"
        )
    try:
        values = parse((path / INFO).read_bytes())
    except OSError as error:
        raise UserError(
            f"expected {path / INFO}, found: {error.strerror}; give the folder of a LeRobotDataset {VERSION}"
        ) from None
    except StrictError as error:
        raise UserError(f"{path / INFO}: {error}") from None
    version = values.get("codebase_version") if isinstance(values, dict) else None
    if version != VERSION:
        old = isinstance(version, str) and version.startswith(("v1", "v2"))
        advice = "convert it with lerobot's convert_dataset_v21_to_v30" if old else "see docs/data.md"
        raise UserError(f"expected a LeRobotDataset {VERSION} at {path}, found codebase_version {version!r}; {advice}")
    known = {one.name for one in dataclasses.fields(Info)}
    try:
        info = decode(Info, {name: value for name, value in values.items() if name in known})
    except StrictError as error:
        raise UserError(f"{path / INFO}: {error}; write the data set again") from None
    if not info.fps > 0:
        raise UserError(f"expected a positive fps in {path / INFO}, found {info.fps:g}; correct it")
    return info


def read_features(info: Info, path: Path) -> dict[str, Feature]:
    features = {name: _feature(name, values, path) for name, values in info.features.items()}
    for name in INDICES:
        if name not in features:
            raise UserError(
                f"expected the feature {name} in {path / INFO}, found {', '.join(features)}; write it again"
            )
    return features


def _feature(name: str, values: dict[str, Any], path: Path) -> Feature:
    dtype, shape = values.get("dtype"), values.get("shape")
    if not isinstance(dtype, str) or not (isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)):
        raise UserError(
            f"expected a dtype and a shape of the feature {name} in {path / INFO}, found dtype {dtype!r} and shape "
            f"{shape!r}; write it again"
        )
    more = values.get("info") or values.get("video_info") or {}
    depth = bool(more.get("is_depth_map") or more.get("video.is_depth_map"))
    feature = Feature(dtype, tuple(shape), _names(values.get("names")), depth)
    if feature.camera and len(shape) != 3:
        raise UserError(
            f"expected pictures of {name} of three dimensions in {path / INFO}, found shape {shape}; correct it"
        )
    return feature


def _names(names: Any) -> tuple[str, ...] | None:
    """A list, or lists by kind as in {"motors": [...]}; anything else names no dimension."""
    if isinstance(names, dict):
        lists = [part for part in names.values() if isinstance(part, list)]
        names = [name for part in lists for name in part] if len(lists) == len(names) else None
    return tuple(map(str, names)) if isinstance(names, list) and names else None


def read_tasks(path: Path) -> list[str]:
    """The sentences by task_index. lerobot writes them as the index of a pandas table, which may have no name."""
    table = read_table(path / TASKS)
    names = [name for name in ("task", "__index_level_0__") if name in table.column_names]
    if not names or "task_index" not in table.column_names:
        raise UserError(
            f"expected the columns task and task_index in {path / TASKS}, found {', '.join(table.column_names)}; "
            "write the data set again"
        )
    pairs = dict(zip(table["task_index"].to_pylist(), table[names[0]].to_pylist(), strict=True))
    if sorted(pairs) != list(range(len(pairs))):
        raise UserError(f"expected task_index 0, 1, ... in {path / TASKS}, found {sorted(pairs)[:5]}; write it again")
    return [str(pairs[index] or "") for index in range(len(pairs))]


def read_episodes(path: Path, info: Info, features: dict[str, Feature]) -> list[Episode]:
    """In their order. Raises UserError unless they cover the frames of the data set without a gap."""
    files = sorted((path / EPISODES).glob("*/*.parquet"))
    if not files:
        raise UserError(f"expected {EPISODES}/*/*.parquet in {path}, found none; copy the data set again")
    videos = [name for name, feature in features.items() if feature.dtype == "video"]
    columns = [
        "episode_index",
        "tasks",
        "dataset_from_index",
        "dataset_to_index",
        "data/chunk_index",
        "data/file_index",
    ]
    at = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    columns += [f"videos/{name}/{part}" for name in videos for part in at]
    rows = [row for file in files for row in read_table(file, columns).to_pylist()]
    episodes = [_episode(path, info, row, videos) for row in sorted(rows, key=lambda row: row["episode_index"])]
    ends = [0, *(episode.end for episode in episodes)]
    wanted = (list(range(info.total_episodes)), info.total_frames)
    consistent = all(episode.start == end < episode.end for episode, end in zip(episodes, ends[:-1], strict=True))
    if not consistent or ([episode.index for episode in episodes], ends[-1]) != wanted:
        raise UserError(
            f"expected {info.total_episodes} episodes of {info.total_frames} frames in all in {path / EPISODES}, found "
            f"{len(episodes)} of {ends[-1]}{'' if consistent else ' with gaps'}; copy the data set again"
        )
    return episodes


def _episode(path: Path, info: Info, row: dict[str, Any], videos: Sequence[str]) -> Episode:
    def file(template: str | None, kind: str, key: str = "") -> Path:
        numbers = {name: row[f"{kind}/{name}"] for name in ("chunk_index", "file_index")}
        try:
            relative = (template or "").format(**numbers, video_key=key)
        except (KeyError, IndexError, ValueError, AttributeError, TypeError):
            relative = ""
        if not is_inside(relative):
            raise UserError(
                f"expected a path inside of the data set from the template {template!r} in {path / INFO}, "
                f"found {relative!r}; correct it"
            )
        return path / relative

    places = {}
    for name in videos:
        start, end = (float(row[f"videos/{name}/{part}_timestamp"]) for part in ("from", "to"))
        places[name] = Place(file(info.video_path, f"videos/{name}", name), start, end)
    return Episode(
        row["episode_index"],
        row["dataset_from_index"],
        row["dataset_to_index"],
        tuple(row["tasks"] or ()),
        file(info.data_path, "data"),
        places,
    )


def read_table(file: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """These columns of a parquet file. Raises UserError for a broken file and for a column that is missing."""
    with reading(file), pq.ParquetFile(file, memory_map=True) as parquet:
        if columns is None:
            return parquet.read()
        found = parquet.schema_arrow.names
        for column in columns:
            if column not in found:
                raise UserError(f"expected the column {column} in {file}, found none; write the data set again")
        # pyarrow takes a name for a path into nested columns, so "a.b" also brings a column "a.b.c".
        return parquet.read(columns=list(columns)).select(list(columns))


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Around the reading of a parquet file: what goes wrong becomes a UserError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"expected the file {file}, found none; copy the data set again") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"expected a readable parquet file {file}, found: {reason}; copy the data set again") from None


def to_numpy(column: pa.ChunkedArray, feature: Feature) -> np.ndarray:
    """A numeric column as (rows, *shape), or (rows,) for the shape (1,), which is stored as plain numbers."""
    rows, dtype = len(column), np.dtype(feature.dtype)
    array: Any = column.combine_chunks()
    for _ in feature.shape:
        if pa.types.is_nested(array.type):
            array = array.flatten()
    values = array.to_numpy(zero_copy_only=False).astype(dtype, copy=False)
    return values.reshape(rows) if feature.shape == (1,) else values.reshape(rows, *feature.shape)
