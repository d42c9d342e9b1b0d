"""A LeRobotDataset v3.0 folder, read frame by frame: pictures, state, action, task. Needs pyarrow, PyAV and pillow."""

from __future__ import annotations

import io
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from rlrc.datasets.meta import (
    ACTION,
    STATE,
    Episode,
    Feature,
    Info,
    read_episodes,
    read_features,
    read_info,
    read_table,
    read_tasks,
    reading,
    to_numpy,
)
from rlrc.datasets.video import Video
from rlrc.errors import UserError

_OPEN = 8  # videos that stay open, each where its last picture was
_TABLES = 64  # data files that stay open
_ROWS = 64 << 20  # bytes of encoded pictures that are kept


@dataclass(frozen=True)
class Frame:
    """``pictures`` uint8 (H, W, 3) by the feature's full name; state (S,) and action (D,) float32, raw; seconds."""

    pictures: dict[str, NDArray[np.uint8]]
    state: NDArray[np.float32] | None
    action: NDArray[np.float32]
    task: str
    episode: int
    index: int  # within its episode
    timestamp: float


class Dataset:
    """An open data set. Frames are counted through all episodes.

    The columns that are asked for stay in memory (some bytes a dimension and frame); pictures are decoded one by one,
    cheaply for frames in their order: sort what you can. Not for several threads at once.
    """

    def __init__(
        self, path: Path, info: Info, features: dict[str, Feature], tasks: list[str], episodes: list[Episode]
    ) -> None:
        self.path, self.info, self.features, self.tasks, self.episodes = path, info, features, tasks, episodes
        # The first frame of each data file, in the order of their frames.
        self._files: dict[Path, int] = {}
        for episode in episodes:
            self._files.setdefault(episode.data, episode.start)
        self._columns: dict[str, NDArray[Any]] = {}
        self._videos: OrderedDict[Path, Video] = OrderedDict()
        self._pictures = _Pictures()

    @staticmethod
    def open(path: str | Path) -> Dataset:
        """Reads what the folder says about itself and checks that its frames are all there. Raises UserError."""
        path = Path(path)
        info = read_info(path)
        features = read_features(info, path)
        dataset = Dataset(path, info, features, read_tasks(path), read_episodes(path, info, features))
        dataset._check()
        return dataset

    def __len__(self) -> int:
        return self.episodes[-1].end if self.episodes else 0

    @property
    def fps(self) -> float:
        return self.info.fps

    @property
    def cameras(self) -> dict[str, Feature]:
        """By the feature's full name; depth maps are left out."""
        return {name: feature for name, feature in self.features.items() if feature.camera and not feature.depth}

    def column(self, name: str) -> NDArray[Any]:
        """A numeric feature of all frames, (frames, *shape), or (frames,) for the shape (1,). Raises UserError."""
        if name not in self._columns:
            feature = self.features.get(name)
            if feature is None or not feature.numeric:
                raise UserError(
                    f"expected the feature {name} with numbers in {self.path}, found "
                    f"{', '.join(self.features) if feature is None else feature.dtype}; choose another data set"
                )
            parts = [self._numbers(file, name, feature) for file in self._files]
            self._columns[name] = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return self._columns[name]

    def frame(self, i: int) -> Frame:
        """Everything of one frame; IndexError beyond the last one."""
        episode = self.episode(i)
        return Frame(
            {name: self.picture(i, name) for name in self.cameras},
            _floats(self.column(STATE)[i]) if STATE in self.features else None,
            _floats(self.column(ACTION)[i]),
            self.task(i),
            episode.index,
            i - episode.start,
            float(self.column("timestamp")[i]),
        )

    def episode(self, i: int) -> Episode:
        """The one that frame ``i`` belongs to."""
        return self.episodes[int(self.column("episode_index")[self._within(i)])]

    def task(self, i: int) -> str:
        return self.tasks[int(self.column("task_index")[self._within(i)])]

    def chunk(self, i: int, horizon: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Actions (horizon, D) from frame ``i`` on; beyond the episode the last one again, where real is false."""
        last = self.episode(i).end - 1
        steps = np.arange(i, i + horizon)
        return _floats(self.column(ACTION)[np.minimum(steps, last)]), steps <= last

    def picture(self, i: int, camera: str) -> NDArray[np.uint8]:
        """A camera's picture of frame ``i``, uint8 (H, W, 3). Raises UserError for a damaged or missing file."""
        episode, feature = self.episode(i), self.features[camera]
        if feature.dtype == "video":
            place = episode.places[camera]
            picture = self._video(place.file).at(place.start + float(self.column("timestamp")[i]))
        else:
            picture = self._pictures.picture(episode.data, camera, i - self._files[episode.data])
        if picture.shape[:2] != feature.size:
            raise UserError(
                f"expected pictures of {camera} of {feature.size[0]} x {feature.size[1]} pixels in {self.path}, found "
                f"{picture.shape[0]} x {picture.shape[1]} at frame {i}; write the data set again"
            )
        return picture

    def close(self) -> None:
        """Closes the files; the data set can still be read, and opens them again."""
        while self._videos:
            self._videos.popitem()[1].close()
        self._pictures = _Pictures()

    def _numbers(self, file: Path, name: str, feature: Feature) -> NDArray[Any]:
        column = read_table(file, [name])[name]
        try:
            if column.null_count:
                raise ValueError(f"{column.null_count} empty rows")
            return to_numpy(column, feature)
        except (ValueError, TypeError) as error:
            raise UserError(
                f"expected {feature.dtype} {feature.shape} in every row of {name} in {file}, found: {error}; "
                "write the data set again"
            ) from None

    def _check(self) -> None:
        """Whether the rows are the frames that the episodes say, in their order."""
        for name, wanted in (
            ("episode_index", np.repeat(np.arange(len(self.episodes)), [len(e) for e in self.episodes])),
            ("index", np.arange(len(self))),
        ):
            if self.episodes and not np.array_equal(found := self.column(name), wanted):
                raise UserError(
                    f"expected {len(self)} rows with {name} in order in {self.path / 'data'}, found {len(found)} "
                    "rows that are not so; copy or write the data set again"
                )
        self._columns.pop("index", None)  # it is the row's own number
        for file in dict.fromkeys(place.file for episode in self.episodes for place in episode.places.values()):
            if not file.is_file():
                raise UserError(f"expected the file {file}, found none; copy the data set again")
        if not self.episodes:
            return
        least, most = self.column("task_index").min(), self.column("task_index").max()
        if least < 0 or most >= len(self.tasks):
            raise UserError(
                f"expected task_index below {len(self.tasks)}, the number of tasks of {self.path}, found {least} to "
                f"{most}; write the data set again"
            )

    def _within(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"expected a frame from 0 to {len(self) - 1}, found {i}")
        return i

    def _video(self, file: Path) -> Video:
        video = self._videos.pop(file, None) or Video(file, self.fps)
        self._videos[file] = video
        if len(self._videos) > _OPEN:
            self._videos.popitem(last=False)[1].close()
        return video


class _Pictures:
    """Pictures in data files. A row group is the least that can be read; the ones read last are kept, as bytes."""

    def __init__(self) -> None:
        self._files: dict[Path, tuple[pq.ParquetFile, NDArray[np.int64]]] = {}
        self._groups: OrderedDict[tuple[Path, str, int], pa.StructArray] = OrderedDict()
        self._bytes = 0

    def picture(self, file: Path, camera: str, row: int) -> NDArray[np.uint8]:
        with reading(file):
            parquet, ends = self._open(file)
            group = int(np.searchsorted(ends, row, side="right"))
            column = self._group(file, parquet, camera, group)
        encoded = column[row - int(ends[group - 1] if group else 0)].as_py()
        try:
            data = encoded["bytes"] if isinstance(encoded, dict) else None
            with Image.open(io.BytesIO(data or b"")) as image:
                return np.array(image.convert("RGB"))
        except (OSError, KeyError) as error:
            raise UserError(
                f"expected the bytes of a picture in {camera} of {file}, row {row}, found: {error}; write it again"
            ) from None

    def _open(self, file: Path) -> tuple[pq.ParquetFile, NDArray[np.int64]]:
        if file not in self._files:
            if len(self._files) == _TABLES:
                self._files.pop(next(iter(self._files)))[0].close()
            parquet = pq.ParquetFile(file, memory_map=True)
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            self._files[file] = (parquet, np.cumsum(sizes))
        return self._files[file]

    def _group(self, file: Path, parquet: pq.ParquetFile, camera: str, group: int) -> pa.StructArray:
        key = (file, camera, group)
        column = self._groups.pop(key, None)
        if column is None:
            if camera not in parquet.schema_arrow.names:
                raise UserError(f"expected the column {camera} in {file}, found none; write the data set again")
            column = parquet.read_row_group(group, columns=[camera])[camera].combine_chunks()
            self._bytes += column.nbytes
        self._groups[key] = column
        while self._bytes > _ROWS and len(self._groups) > 1:
            self._bytes -= self._groups.popitem(last=False)[1].nbytes
        return column


def _floats(values: NDArray[Any]) -> NDArray[np.float32]:
    """A copy, in at least one dimension."""
    return np.atleast_1d(np.array(values, np.float32))
