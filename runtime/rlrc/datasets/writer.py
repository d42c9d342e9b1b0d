"""Write a LeRobotDataset v3.0 folder episode by episode, in lerobot's layout; the folder appears only when complete."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from rlrc.datasets import video
from rlrc.datasets.files import FILES_PER_CHUNK, ParquetFiles, VideoFiles
from rlrc.datasets.meta import (
    CHUNK_FILE,
    DATA_PATH,
    EPISODES,
    INDICES,
    INFO,
    STATS,
    TASKS,
    VERSION,
    VIDEO_PATH,
    Feature,
)
from rlrc.datasets.stats import Colours, Stats, compute_stats
from rlrc.errors import UserError
from rlrc.folders import create_folder, sync

DATA_MB, VIDEO_MB = 100, 200  # lerobot's limits of a file's size
_ROWS = 100  # episodes buffered before their rows are written


@dataclass(frozen=True)
class Recording:
    """An episode to write: its task (a sentence) and its frames, each with a value for every feature.

    Pictures are uint8 (H, W, 3), other values arrays of the feature's shape.
    """

    task: str
    frames: Iterable[Mapping[str, Any]]


def write(
    path: str | Path,
    fps: float,
    features: Mapping[str, Feature],
    episodes: Iterable[Recording],
    robot_type: str | None = None,
    data_mb: float = DATA_MB,
    video_mb: float = VIDEO_MB,
) -> None:
    """Write a new data set. In memory are one episode and the numbers of all (for exact statistics).

    Cameras of dtype "image" are stored as PNG, lossless; those of dtype "video" as H.264, lossy. A new file begins when
    an episode would exceed ``data_mb`` or ``video_mb``. Raises UserError for a value that does not fit its feature, and
    if there are no episodes; nothing is written then.
    """
    _check_features(fps, features)
    with create_folder(path) as folder, ExitStack() as files:
        writer = _Writer(folder, fps, dict(features), robot_type, data_mb, video_mb, files)
        for episode in episodes:
            writer.add(episode)
        writer.finish()
        files.close()
        for written in sorted(folder.rglob("*"), reverse=True):
            sync(written)
        sync(folder)


@dataclass
class _Writer:
    folder: Path
    fps: float
    features: dict[str, Feature]
    robot_type: str | None
    data_mb: float
    video_mb: float
    files: ExitStack
    tasks: list[str] = field(default_factory=list)
    frames: int = 0
    episodes: int = 0

    def __post_init__(self) -> None:
        self._data = ParquetFiles(self.folder, DATA_PATH, self.data_mb, self.files)
        self._meta = ParquetFiles(self.folder, f"{EPISODES}/{CHUNK_FILE}.parquet", self.data_mb, self.files)
        self._videos = {
            name: VideoFiles(self.folder, name, self.fps, self.video_mb, self.files)
            for name, feature in self.features.items()
            if feature.dtype == "video"
        }
        self._schema = _make_schema(self.features | INDICES)
        self._rows: list[dict[str, Any]] = []
        self._numbers: dict[str, list[NDArray[Any]]] = {}
        self._colours = {name: Colours() for name, feature in self.features.items() if feature.camera}

    def add(self, episode: Recording) -> None:
        if not episode.task.strip():
            raise UserError(
                f"expected a task, found none at episode {self.episodes}; describe the episode in a sentence"
            )
        values = self._values(episode.frames)
        length = len(values["index"])
        if episode.task not in self.tasks:
            self.tasks.append(episode.task)
        values["task_index"] = np.full(length, self.tasks.index(episode.task))
        stats = self._stats(values)
        chunk, file = self._data.choose_place(length)
        columns = [_encode_column(values[one.name], one.type) for one in self._schema]
        self._data.write(pa.Table.from_arrays(columns, schema=self._schema))
        row: dict[str, Any] = {"episode_index": self.episodes, "tasks": [episode.task], "length": length}
        row |= {"data/chunk_index": chunk, "data/file_index": file}
        row |= {"dataset_from_index": self.frames, "dataset_to_index": self.frames + length}
        for name, videos in self._videos.items():
            row |= videos.write(values[name])
        row |= {f"stats/{name}/{kind}": value for name, one in stats.items() for kind, value in one.items()}
        self._rows.append(row)
        self.frames, self.episodes = self.frames + length, self.episodes + 1
        if len(self._rows) == _ROWS:
            self._flush()

    def finish(self) -> None:
        if not self.episodes:
            raise UserError("expected at least one episode, found none; nothing is written")
        self._flush()
        sentences = pa.table({"task_index": pa.array(range(len(self.tasks)), pa.int64()), "task": self.tasks})
        pq.write_table(sentences.replace_schema_metadata({"pandas": json.dumps(_INDEX)}), self.folder / TASKS)
        stats = {name: compute_stats(np.concatenate(parts)) for name, parts in self._numbers.items()}
        stats |= {name: colours.stats() for name, colours in self._colours.items()}
        self._json(STATS, stats)
        info = {
            "codebase_version": VERSION,
            "robot_type": self.robot_type,
            "total_episodes": self.episodes,
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": FILES_PER_CHUNK,
            "data_files_size_in_mb": self.data_mb,
            "video_files_size_in_mb": self.video_mb,
            "fps": int(self.fps) if self.fps == int(self.fps) else self.fps,
            "splits": {"train": f"0:{self.episodes}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self._videos else None,
            "features": {
                name: _describe_feature(feature, self.fps) for name, feature in (self.features | INDICES).items()
            },
        }
        self._json(INFO, info)

    def _values(self, frames: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """The validated values of an episode: lists of pictures, and arrays (N, *shape)."""
        values: dict[str, Any] = {name: [] for name in self.features}
        for number, frame in enumerate(frames):
            if frame.keys() != self.features.keys():
                raise UserError(
                    f"expected the features {', '.join(self.features)} in every frame, found {', '.join(frame)} in "
                    f"frame {number} of episode {self.episodes}; give them all"
                )
            for name, feature in self.features.items():
                values[name].append(
                    _check_value(frame[name], name, feature, f"frame {number} of episode {self.episodes}")
                )
        length = len(values[next(iter(self.features))])
        if not length:
            raise UserError(f"expected at least one frame in every episode, found none in episode {self.episodes}")
        values |= {name: np.stack(values[name]) for name, feature in self.features.items() if not feature.camera}
        steps = np.arange(length)
        indices = (steps / self.fps).astype(np.float32), steps, np.full(length, self.episodes), self.frames + steps
        return values | dict(zip(INDICES, indices, strict=False))

    def _stats(self, values: dict[str, Any]) -> dict[str, Stats]:
        """The statistics of an episode; also collects values for those of the data set."""
        stats = {}
        for name, feature in (self.features | INDICES).items():
            if feature.camera:
                colours = Colours()
                for picture in values[name]:
                    colours.add(picture)
                self._colours[name].join(colours)
                stats[name] = colours.stats()
            else:
                self._numbers.setdefault(name, []).append(values[name])
                stats[name] = compute_stats(values[name])
        return stats

    def _flush(self) -> None:
        if not self._rows:
            return
        chunk, file = self._meta.choose_place(len(self._rows))
        place = {"meta/episodes/chunk_index": chunk, "meta/episodes/file_index": file}
        self._meta.write(pa.Table.from_pylist([row | place for row in self._rows]))
        self._rows = []

    def _json(self, relative: str, values: Any) -> None:
        text = json.dumps(values, indent=4, ensure_ascii=False, allow_nan=False)
        (self.folder / relative).write_text(text + "\n", encoding="utf-8")


def _check_features(fps: float, features: Mapping[str, Feature]) -> None:
    if not (np.isfinite(fps) and fps > 0):
        raise UserError(f"expected a positive fps, found {fps:g}; give the rate at which the frames were taken")
    for name, feature in features.items():
        if name in INDICES or "/" in name:
            raise UserError(
                f"expected feature names without a slash and other than {', '.join(INDICES)}, found {name}; rename it"
            )
        if feature.camera:
            if feature.shape[2:] != (3,):
                raise UserError(f"expected pictures of {name} of shape (height, width, 3), found {feature.shape}")
            if feature.dtype == "video" and (feature.shape[0] % 2 or feature.shape[1] % 2):
                raise UserError(
                    f"expected an even height and width of the video {name}, found {feature.shape[0]} x "
                    f"{feature.shape[1]}; store it as images"
                )
        elif len(feature.shape) != 1 or not feature.numeric:
            raise UserError(f"expected numbers of one dimension in {name}, found {feature.dtype} {feature.shape}")


def _check_value(value: Any, name: str, feature: Feature, where: str) -> NDArray[Any]:
    array = np.asarray(value)
    dtype = np.dtype(np.uint8) if feature.camera else np.dtype(feature.dtype)
    if array.shape != feature.shape or array.dtype != dtype:
        raise UserError(
            f"expected {name} as {dtype} {feature.shape}, found {array.dtype} {array.shape} in {where}; give what the "
            "feature says"
        )
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError(
            f"expected finite {name}, found {array[~np.isfinite(array)][0]} in {where}; leave that episode out"
        )
    return array


def _describe_feature(feature: Feature, fps: float) -> dict[str, Any]:
    """A feature's entry in info.json."""
    names = list(feature.names) if feature.names else ["height", "width", "channels"] if feature.camera else None
    described: dict[str, Any] = {"dtype": feature.dtype, "shape": list(feature.shape), "names": names}
    if feature.dtype == "video":
        described["info"] = video.describe_video(fps, *feature.size)
    return described


def _make_schema(features: Mapping[str, Feature]) -> pa.Schema:
    """The schema of data files; its metadata marks pictures for Hugging Face's datasets library."""
    fields: list[pa.Field] = []
    descriptions: dict[str, dict[str, Any]] = {}
    for name, feature in features.items():
        if feature.dtype == "video":
            continue
        value = {"dtype": feature.dtype, "_type": "Value"}
        if feature.camera:
            kind, descriptions[name] = pa.struct([("bytes", pa.binary()), ("path", pa.string())]), {"_type": "Image"}
        elif feature.shape == (1,):
            kind, descriptions[name] = pa.from_numpy_dtype(np.dtype(feature.dtype)), value
        else:
            kind = pa.list_(pa.from_numpy_dtype(np.dtype(feature.dtype)), feature.shape[0])
            descriptions[name] = {"feature": value, "length": feature.shape[0], "_type": "Sequence"}
        fields.append(pa.field(name, kind))
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": descriptions}})})


def _encode_column(values: Any, kind: pa.DataType) -> pa.Array:
    if pa.types.is_struct(kind):
        encoded = [{"bytes": _encode_png(picture), "path": f"frame-{i:06d}.png"} for i, picture in enumerate(values)]
        return pa.array(encoded, kind)
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), kind.value_type), kind.list_size)
    return pa.array(values.reshape(-1), kind)


def _encode_png(picture: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


# With this metadata, pandas (with which lerobot reads the tasks) makes the tasks the table's index.
_INDEX: dict[str, Any] = {
    "index_columns": ["task"],
    "column_indexes": [],
    "columns": [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for name, kind, numpy in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
    ],
    "creator": {"library": "pyarrow", "version": pa.__version__},
    "pandas_version": "2.0.0",
}
