"""The files of a data set that is being written: a full file is followed by the next, numbered as by lerobot."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rlrc.datasets.meta import VIDEO_PATH
from rlrc.datasets.video import VideoWriter

FILES_PER_CHUNK = 1000


@dataclass
class ParquetFiles:
    """A sequence of parquet files. ``choose_place`` returns the file of the next rows, ``write`` appends them."""

    folder: Path
    template: str
    limit: float
    files: ExitStack
    number: int = 0  # of the current file
    rows: int = 0  # in the current file
    _writer: pq.ParquetWriter | None = None

    def choose_place(self, rows: int) -> tuple[int, int]:
        """Chunk and file for this many more rows, estimated to be as large as the rows before."""
        size = self._path.stat().st_size / (1 << 20) if self._writer is not None else 0.0
        if self.rows and size + size / self.rows * rows >= self.limit:
            self.close()
            self.number, self.rows = self.number + 1, 0
        return self.place

    @property
    def place(self) -> tuple[int, int]:
        return divmod(self.number, FILES_PER_CHUNK)

    @property
    def _path(self) -> Path:
        chunk, file = self.place
        return self.folder / self.template.format(chunk_index=chunk, file_index=file)

    def write(self, table: pa.Table) -> None:
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(self._path, table.schema)
            self.files.callback(self.close)
        self._writer.write_table(table)
        self.rows += len(table)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


@dataclass
class VideoFiles:
    """The sequence of video files of a camera."""

    folder: Path
    camera: str
    fps: float
    limit: float
    files: ExitStack
    number: int = 0
    episodes: int = 0  # in the current file
    _writer: VideoWriter | None = None

    def write(self, pictures: list[NDArray[np.uint8]]) -> dict[str, Any]:
        """Append an episode; returns the video columns of its row in meta/episodes."""
        if self._writer is not None:
            size = self._writer.bytes / (1 << 20)
            if size + size / self._writer.pictures * len(pictures) >= self.limit:
                self.close()
                self.number += 1
        chunk, file = divmod(self.number, FILES_PER_CHUNK)
        if self._writer is None:
            path = self.folder / VIDEO_PATH.format(video_key=self.camera, chunk_index=chunk, file_index=file)
            self._writer = VideoWriter(path, self.fps, *pictures[0].shape[:2])
            self.files.callback(self.close)
        start = self._writer.seconds
        for i, picture in enumerate(pictures):
            self._writer.append(picture, first=i == 0)
        values = {"chunk_index": chunk, "file_index": file, "from_timestamp": start}
        values["to_timestamp"] = self._writer.seconds
        return {f"videos/{self.camera}/{name}": value for name, value in values.items()}

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
