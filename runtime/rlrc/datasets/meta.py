"""The metadata of a LeRobotDataset v3.0 folder: meta/info.json, meta/tasks.parquet, meta/episodes/*.

The layout is that of ``lerobot.datasets`` (lerobot 0.4 to 0.6, codebase version v3.0):

    meta/info.json                                  features, frame rate, path templates, size limits
    meta/stats.json                                 statistics of every feature over the whole data set
    meta/tasks.parquet                              task (a sentence) and its task_index
    meta/episodes/chunk-000/file-000.parquet        a row per episode: frames, files, place in the videos, statistics
    data/chunk-000/file-000.parquet                 a row per frame, many episodes in a file; pictures as PNG bytes
    videos/CAMERA/chunk-000/file-000.mp4            or as video, many episodes in a file
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from rlrc.artifact.consistency import is_inside
from rlrc.datasets import columns
from rlrc.errors import UserError
from rlrc.strict import StrictError, decode, parse

VERSION = "v3.0"
INFO, STATS, TASKS, EPISODES = "meta/info.json", "meta/stats.json", "meta/tasks.parquet", "meta/episodes"
CHUNK_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA_PATH = f"data/{CHUNK_FILE}.parquet"
VIDEO_PATH = f"videos/{{video_key}}/{CHUNK_FILE}.mp4"
PICTURES = "observation.images."  # prefix of a camera's key
STATE, ENVIRONMENT, ACTION = "observation.state", "observation.environment_state", "action"
_NUMBERS = {"bool", *(f"{kind}{bits}" for kind in ("int", "uint", "float") for bits in (8, 16, 32, 64))} - {"float8"}


@dataclass(frozen=True)
class Feature:
    """A column. ``dtype``: "image", "video", "string" or a numpy dtype. ``names``: of its dimensions, if any."""

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
        """Height and width of a camera's pictures; the shape may have channels first or last."""
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
    """The keys of info.json that are read, with lerobot's defaults. Other keys are ignored, as in lerobot."""

    codebase_version: str
    fps: float
    features: dict[str, dict[str, Any]]
    total_episodes: int
    total_frames: int
    robot_type: str | None = None
    video_path: str | None = VIDEO_PATH


@dataclass(frozen=True)
class VideoSpan:
    """Where an episode starts in the videos of a camera, in seconds from the start of the file."""

    file: Path
    start: float


@dataclass(frozen=True)
class Episode:
    """Frames [start, end) of the data set. ``places`` has one entry for every camera that is video."""

    index: int
    start: int
    end: int
    places: dict[str, VideoSpan] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.end - self.start


def read_info(path: Path) -> Info:
    """Raises UserError for another version of the format and for a folder that is not a data set."""
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
    features = {name: _parse_feature(name, values, path) for name, values in info.features.items()}
    for name, index in INDICES.items():
        if name not in features:
            raise UserError(
                f"expected the feature {name} in {path / INFO}, found {', '.join(features)}; write it again"
            )
        found = features[name]
        if found.shape != (1,) or not found.numeric:
            raise UserError(
                f"expected the feature {name} of {index.dtype} and shape (1,) in {path / INFO}, found {found.dtype} "
                f"{found.shape}; correct it"
            )
        if index.dtype == "int64":
            features[name] = index
    return features


def _parse_feature(name: str, values: dict[str, Any], path: Path) -> Feature:
    dtype, shape = values.get("dtype"), values.get("shape")
    if not isinstance(dtype, str) or not (isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)):
        raise UserError(
            f"expected a dtype and a shape of the feature {name} in {path / INFO}, found dtype {dtype!r} and shape "
            f"{shape!r}; write it again"
        )
    more = [part for part in (values.get("info"), values.get("video_info")) if isinstance(part, dict)]
    depth = any(part.get("is_depth_map") or part.get("video.is_depth_map") for part in more)
    feature = Feature(dtype, tuple(shape) or (1,), _parse_names(values.get("names")), depth)
    if feature.camera and len(shape) != 3:
        raise UserError(
            f"expected pictures of {name} of three dimensions in {path / INFO}, found shape {shape}; correct it"
        )
    return feature


def _parse_names(names: Any) -> tuple[str, ...] | None:
    """Names from a list, or from lists by kind as in {"motors": [...]}; None for anything else."""
    if isinstance(names, dict):
        lists = [part for part in names.values() if isinstance(part, list)]
        names = [name for part in lists for name in part] if len(lists) == len(names) else None
    return tuple(map(str, names)) if isinstance(names, list) and names else None


def read_tasks(path: Path) -> list[str]:
    """The tasks by task_index. lerobot writes them as the index of a pandas table, which may have no name."""
    file = path / TASKS
    with columns.open_parquet(file, ()) as parquet:
        found = parquet.schema_arrow.names
    names = [name for name in ("task", "__index_level_0__") if name in found]
    if not names or "task_index" not in found:
        raise UserError(
            f"expected the columns task and task_index in {file}, found {', '.join(found)}; write the data set again"
        )
    table = columns.read_table(file, ("task_index", names[0]))
    indices = columns.to_numbers(table["task_index"], "task_index", file, "int64")
    if sorted(indices.tolist()) != list(range(len(indices))):
        raise UserError(
            f"expected task_index 0, 1, ... in {file}, found {sorted(indices.tolist())[:5]}; write it again"
        )
    tasks = columns.to_texts(table[names[0]], names[0], file)
    return [tasks[i] or "" for i in np.argsort(indices)]


def read_episodes(path: Path, info: Info, features: dict[str, Feature]) -> list[Episode]:
    """The episodes in order. Raises UserError unless they cover all frames of the data set without gaps."""
    files = sorted((path / EPISODES).glob("*/*.parquet"))
    if not files:
        raise UserError(f"expected {EPISODES}/*/*.parquet in {path}, found none; copy the data set again")
    videos = [name for name, feature in features.items() if feature.dtype == "video"]
    wanted = {name: "int64" for name in ("episode_index", "dataset_from_index", "dataset_to_index")}
    for name in videos:
        wanted |= {f"videos/{name}/{part}": "int64" for part in ("chunk_index", "file_index")}
        wanted[f"videos/{name}/from_timestamp"] = "float64"
    rows: list[dict[str, Any]] = []
    for file in files:
        table = columns.read_table(file, tuple(wanted))
        values = {name: columns.to_numbers(table[name], name, file, dtype).tolist() for name, dtype in wanted.items()}
        rows += [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    episodes = [_parse_episode(path, info, row, videos) for row in sorted(rows, key=lambda row: row["episode_index"])]
    ends = [0, *(episode.end for episode in episodes)]
    consistent = all(
        (episode.index, episode.start) == (i, end) and end < episode.end
        for i, (episode, end) in enumerate(zip(episodes, ends[:-1], strict=True))
    )
    if not consistent or (len(episodes), ends[-1]) != (info.total_episodes, info.total_frames):
        raise UserError(
            f"expected {info.total_episodes} episodes of {info.total_frames} frames in all in {path / EPISODES}, found "
            f"{len(episodes)} of {ends[-1]}{'' if consistent else ' with gaps'}; copy the data set again"
        )
    return episodes


def _parse_episode(path: Path, info: Info, row: dict[str, Any], videos: Sequence[str]) -> Episode:
    def file(name: str) -> Path:
        numbers = {part: row[f"videos/{name}/{part}"] for part in ("chunk_index", "file_index")}
        try:
            relative = (info.video_path or "").format(**numbers, video_key=name)
        except (KeyError, IndexError, ValueError, AttributeError, TypeError):
            relative = ""
        if not is_inside(relative):
            raise UserError(
                f"expected a path inside of the data set from the template {info.video_path!r} in {path / INFO}, "
                f"found {relative!r}; correct it"
            )
        return path / relative

    places = {}
    for name in videos:
        start = row[f"videos/{name}/from_timestamp"]
        if not (isfinite(start) and start >= 0):
            raise UserError(
                f"expected a from_timestamp of 0 or more for {name} in {path / EPISODES}, found {start:g} in episode "
                f"{row['episode_index']}; write the data set again"
            )
        places[name] = VideoSpan(file(name), start)
    return Episode(row["episode_index"], row["dataset_from_index"], row["dataset_to_index"], places)
