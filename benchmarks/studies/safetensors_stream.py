"""Write safetensors files with only part of one tensor in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class Kind:
    """Shape and type of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path,
    stored: Mapping[str, Kind],
    make: Callable[[str, Kind], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the header, then every tensor as the consecutive pieces that ``make`` yields for it."""
    header, offset = dict[str, Any](), 0
    if metadata:
        header["__metadata__"] = dict(metadata)
    for name, kind in stored.items():
        header[name] = {
            "dtype": DTYPES[kind.dtype],
            "shape": list(kind.shape),
            "data_offsets": [offset, offset + kind.bytes],
        }
        offset += kind.bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, kind in stored.items():
            before = file.tell()
            for piece in make(name, kind):
                file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
            if file.tell() - before != kind.bytes:
                raise RuntimeError(f"{name} has {kind.bytes} bytes, but {file.tell() - before} were made")
