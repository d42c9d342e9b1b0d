"""The constants of a graph under construction, and the file beside a graph that is too large for one file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx.external_data_helper import set_external_data

from rlrc.compressor.models.storage.scratch import Allocate

EXTERNAL, PAGE = 1024, 4096  # bytes: smallest constant stored in the separate file, and its alignment there
KEPT = 2**20  # bytes: larger constants go where they are allocated


@dataclass(frozen=True)
class Constant:
    name: str
    kind: int
    """of onnx.TensorProto"""
    shape: tuple[int, ...]
    data: NDArray[np.uint8]
    """(bytes,)"""

    def has_values_of(self, other: Constant) -> bool:
        return self.kind == other.kind and self.shape == other.shape and np.array_equal(self.data, other.data)

    def fill(self, tensor: onnx.TensorProto, file: str = "", offset: int | None = None) -> None:
        """Describe it in an empty ``tensor``: with the values, or with a reference to their place in a ``file``."""
        tensor.name, tensor.data_type = self.name, self.kind
        tensor.dims.extend(self.shape)
        if offset is None:
            tensor.raw_data = self.data.tobytes()
        else:
            tensor.raw_data = b""
            set_external_data(tensor, file, offset, self.data.nbytes)
            tensor.ClearField("raw_data")


def flatten(array: NDArray[Any], allocate: Allocate | None) -> NDArray[np.uint8]:
    """The array's bytes. ``allocate`` makes room for large ones; without it they may be the array itself."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if allocate is None or flat.nbytes < KEPT:
        return flat
    room: NDArray[np.uint8] = allocate((flat.nbytes,), dtype=torch.uint8).numpy()
    room[:] = flat
    return room


def write_constants(constants: Iterable[Constant], path: Path) -> dict[str, int]:
    """Write all but small constants to one file. -> their offsets by name."""
    offsets = dict[str, int]()
    with path.open("wb") as stream:
        for constant in constants:
            if constant.data.nbytes >= EXTERNAL:
                offsets[constant.name] = -(-stream.tell() // PAGE) * PAGE  # aligned, so that it can be memory-mapped
                stream.seek(offsets[constant.name])
                stream.write(constant.data.data)
    return offsets
