"""Read a LeRobotDataset v3.0 folder frame by frame. Needs pyarrow, PyAV and pillow."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlrc.datasets import columns
from rlrc.datasets.images import EncodedPictures
from rlrc.datasets.meta import (
    ACTION,
    STATE,
    Episode,
    Feature,
    Info,
    read_episodes,
    read_features,
    read_info,
    read_tasks,
)
from rlrc.datasets.video import Video, check_header
from rlrc.errors import UserError

_OPEN = 8  # videos kept open, each at its last picture


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
    """An open data set; frames are numbered through all episodes. Not thread-safe.

    Columns stay in memory once they are read (a few bytes per dimension and frame). Pictures are decoded one by one,
    which is cheap for frames in ascending order.
    """

    def __init__(
        self, path: Path, info: Info, features: dict[str, Feature], tasks: list[str], episodes: list[Episode]
    ) -> None:
        self.path, self.info, self.features, self.tasks, self.episodes = path, info, features, tasks, episodes
        # All existing files in the order of their names, as in lerobot, which ignores meta/episodes here.
        self._files = sorted((path / "data").glob("*/*.parquet"))
        if episodes and not self._files:
            raise UserError(f"expected data/*/*.parquet in {path}, found none; copy the data set again")
        self._starts = np.cumsum([0, *map(columns.count_rows, self._files)])  # first frame of each file, and the end
        self._columns: dict[str, NDArray[Any]] = {}
        self._videos: OrderedDict[Path, Video] = OrderedDict()
        self._pictures = EncodedPictures()

    @staticmethod
    def open(path: str | Path) -> Dataset:
        """Read the metadata and check that all frames exist. Raises UserError."""
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
        """The cameras by the feature's full name, without depth maps."""
        return {name: feature for name, feature in self.features.items() if feature.camera and not feature.depth}

    def column(self, name: str) -> NDArray[Any]:
        """A numeric feature of all frames: (frames, *shape), or (frames,) for the shape (1,). Raises UserError."""
        if name not in self._columns:
            self._columns[name] = np.concatenate(list(self.parts(name)) or [np.empty(0)])
        return self._columns[name]

    def parts(self, name: str) -> Iterator[NDArray[Any]]:
        """The same in pieces that do not stay in memory."""
        feature = self.features.get(name)
        if feature is None or not feature.numeric:
            raise UserError(
                f"expected the feature {name} with numbers in {self.path}, found "
                f"{', '.join(self.features) if feature is None else feature.dtype}; choose another data set"
            )
        for file in self._files:
            yield from columns.read_parts(file, name, feature.dtype, feature.shape)

    def frame(self, i: int) -> Frame:
        """All values of one frame; raises IndexError beyond the last one."""
        episode = self.episode(i)
        return Frame(
            {name: self.picture(i, name) for name in self.cameras},
            _to_floats(self.column(STATE)[i]) if STATE in self.features else None,
            _to_floats(self.column(ACTION)[i]),
            self.task(i),
            episode.index,
            i - episode.start,
            float(self.column("timestamp")[i]),
        )

    def episode(self, i: int) -> Episode:
        """The episode of frame ``i``."""
        return self.episodes[int(self.column("episode_index")[self._within(i)])]

    def task(self, i: int) -> str:
        return self.tasks[int(self.column("task_index")[self._within(i)])]

    def chunk(self, i: int, horizon: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Actions (horizon, D) from frame ``i`` on, and which are real: beyond the episode the last one repeats."""
        last = self.episode(i).end - 1
        steps = np.arange(i, i + horizon)
        return _to_floats(self.column(ACTION)[np.minimum(steps, last)]), steps <= last

    def picture(self, i: int, camera: str) -> NDArray[np.uint8]:
        """A camera's picture of frame ``i``, uint8 (H, W, 3). Raises UserError for a damaged or missing file."""
        episode, feature = self.episode(i), self.features[camera]
        if feature.dtype == "video":
            place = episode.places[camera]
            picture = self._video(place.file).at(place.start + float(self.column("timestamp")[i]))
        else:
            number = int(np.searchsorted(self._starts, i, side="right")) - 1
            picture = self._pictures.picture(self._files[number], camera, i - int(self._starts[number]))
        if picture.shape[:2] != feature.size:
            raise UserError(
                f"expected pictures of {camera} of {feature.size[0]} x {feature.size[1]} pixels in {self.path}, found "
                f"{picture.shape[0]} x {picture.shape[1]} at frame {i}; write the data set again"
            )
        return picture

    def close(self) -> None:
        """Close the files; reading opens them again."""
        while self._videos:
            self._videos.popitem()[1].close()
        self._pictures = EncodedPictures()

    def _check(self) -> None:
        """Raises UserError unless the rows are the frames of the episodes, in order."""
        if (found := int(self._starts[-1])) != len(self):
            raise UserError(
                f"expected {len(self)} rows in {self.path / 'data'}, found {found}; copy or write the data set again"
            )
        if not self.episodes:
            return
        for name, wanted in (
            ("episode_index", np.repeat(np.arange(len(self.episodes)), [len(e) for e in self.episodes])),
            ("index", np.arange(len(self))),
        ):
            if not np.array_equal(self.column(name), wanted):
                raise UserError(
                    f"expected rows with {name} in order in {self.path / 'data'}, found another order; write the data "
                    "set again"
                )
        self._columns.pop("index", None)  # equal to the row number
        least, most = self.column("task_index").min(), self.column("task_index").max()
        if least < 0 or most >= len(self.tasks):
            raise UserError(
                f"expected task_index below {len(self.tasks)}, the number of tasks of {self.path}, found {least} to "
                f"{most}; write the data set again"
            )
        for name, feature in self.cameras.items():
            if feature.dtype == "video":
                self._check_videos(name)

    def _check_videos(self, camera: str) -> None:
        """Raises UserError unless every episode has a separate part of a video that is long enough."""
        stamps = np.asarray(self.column("timestamp"), np.float64)
        if not np.isfinite(stamps).all():
            i = int(np.argmin(np.isfinite(stamps)))
            raise UserError(
                f"expected a finite timestamp of every frame in {self.path / 'data'}, found {stamps[i]} at frame {i}; "
                "write the data set again"
            )
        half = 0.5 / self.fps
        parts: dict[Path, list[tuple[float, float, int]]] = {}
        for episode in self.episodes:
            place, own = episode.places[camera], stamps[episode.start : episode.end]
            times = (place.start + own.min(), place.start + own.max(), episode.index)
            parts.setdefault(place.file, []).append(times)
        for file, times_of in parts.items():
            times_of.sort()
            for (first, last, one), (start, _, other) in pairwise(times_of):
                if start < last + half:
                    raise UserError(
                        f"expected a part of {file} for every episode, found episode {one} from {first:.3f} to "
                        f"{last:.3f} s and episode {other} from {start:.3f} s on; merge the data sets again "
                        "(from_timestamp in meta/episodes is wrong)"
                    )
            pictures = sum(len(self.episodes[index]) for *_, index in times_of)
            check_header(file, pictures, max(last for _, last, _ in times_of))

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


def _to_floats(values: NDArray[Any]) -> NDArray[np.float32]:
    """A copy, in at least one dimension."""
    return np.atleast_1d(np.array(values, np.float32))
