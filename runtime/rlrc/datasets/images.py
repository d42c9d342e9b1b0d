"""Encoded pictures in the columns of data files."""

from __future__ import annotations

import io
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from rlrc.datasets.columns import check_columns, translate_parquet_errors
from rlrc.errors import UserError

_TABLES = 64  # data files kept open
_ROWS = 64 << 20  # bytes of encoded pictures kept in memory
# Modes of PIL with values of 0 to 255, or 0 and 1. The range of other modes is unknown (12 bits, millimetres, ...), and
# PIL would silently clip it to 255.
_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"}
_OTHERS = {"I": "32-bit grey", "F": "floating-point grey"} | {
    f"I;16{order}": "16-bit grey" for order in ("", "B", "L", "N")
}


def decode(data: bytes) -> NDArray[np.uint8]:
    """An encoded picture as uint8 (H, W, 3), rotated by its EXIF orientation, without transparency, as in LeRobot.

    Raises ValueError for anything but a complete picture of 8 bits per channel.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in _MODES:
                raise ValueError(
                    f"{_OTHERS.get(image.mode, f'the mode {image.mode}')} (mark a depth map with "
                    "is_depth_map in meta/info.json)"
                )
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError(f"{len(data)} bytes that are not a picture") from None
    except (OSError, SyntaxError, EOFError, KeyError, IndexError, TypeError, Image.DecompressionBombError) as error:
        raise ValueError(str(error) or type(error).__name__) from None  # PIL's decoders raise all of these


class EncodedPictures:
    """Reads pictures from data files, by whole row groups; the latest row groups stay in memory, encoded."""

    def __init__(self) -> None:
        self._files: dict[Path, tuple[pq.ParquetFile, NDArray[np.int64]]] = {}
        self._groups: OrderedDict[tuple[Path, str, int], pa.Array] = OrderedDict()
        self._bytes = 0

    def picture(self, file: Path, camera: str, row: int) -> NDArray[np.uint8]:
        """uint8 (H, W, 3). Raises UserError, which names the file, the column and the row."""
        with translate_parquet_errors(file):
            parquet, ends = self._open(file)
            group = int(np.searchsorted(ends, row, side="right"))
            column = self._group(file, parquet, camera, group)
        data = column[row - int(ends[group - 1] if group else 0)].as_py()
        try:
            if data is None:
                raise ValueError("no bytes")
            return decode(data)
        except ValueError as error:
            raise UserError(
                f"expected a picture of 8 bits a channel in the column {camera} of {file}, row {row}, found {error}; "
                "write the data set again"
            ) from None

    def _open(self, file: Path) -> tuple[pq.ParquetFile, NDArray[np.int64]]:
        if file not in self._files:
            if len(self._files) == _TABLES:
                self._files.pop(next(iter(self._files)))[0].close()
            parquet = pq.ParquetFile(file, memory_map=True)
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            self._files[file] = (parquet, np.cumsum(sizes))
        return self._files[file]

    def _group(self, file: Path, parquet: pq.ParquetFile, camera: str, group: int) -> pa.Array:
        """The encoded pictures of a row group: a binary column, or the field "bytes" of a struct."""
        key = (file, camera, group)
        column = self._groups.pop(key, None)
        if column is None:
            check_columns(parquet, file, [camera])
            column = parquet.read_row_group(group, columns=[camera])[camera].combine_chunks()
            kind: Any = column.type
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                column = column.field("bytes")
            if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
                raise UserError(
                    f"expected the bytes of pictures in the column {camera} of {file}, found the type {kind}; write "
                    "the data set again"
                )
            self._bytes += column.nbytes
        self._groups[key] = column
        while self._bytes > _ROWS and len(self._groups) > 1:
            self._bytes -= self._groups.popitem(last=False)[1].nbytes
        return column
