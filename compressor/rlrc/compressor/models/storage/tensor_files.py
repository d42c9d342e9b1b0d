"""Writes safetensors files one tensor at a time, and a computed one in parts.

The safetensors library needs all tensors in memory before it writes the first one. A file written here is equal to the
library's, byte by byte.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch

from rlrc.compressor.models.storage.tensors import DTYPES, Tensors

NAME = "model.safetensors"
INDEX = f"{NAME}.index.json"
SHARD = 2_000_000_000
"""bytes of tensors in a file, at most, unless a single tensor is larger"""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
"""in which the library writes tensors: wide types first, to align them"""


def write_tensors(folder: Path, tensors: Tensors, shard: int = SHARD) -> None:
    """Write ``model.safetensors``, or shards of it with an index as Hugging Face names them. ``folder`` must exist."""
    shards = _divide(tensors, shard)
    if len(shards) == 1:
        write_file(folder / NAME, tensors, shards[0])
        return
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        write_file(folder / file, tensors, names)
    where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    size = sum(_count_bytes(tensors, name) for name in tensors)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2) + "\n")


def write_file(path: Path, tensors: Tensors, names: Sequence[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write these tensors to one file."""
    header, end = dict[str, object](), 0
    if metadata:
        header["__metadata__"] = dict(metadata)
    for name in names:
        start, end = end, end + _count_bytes(tensors, name)
        kind, shape = NAMES[tensors.dtype(name)], list(tensors.shape(name))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            before = file.tell()
            for part in tensors.parts(name):
                tensor = part.detach().cpu()
                if tensor.shape[1:] != tensors.shape(name)[1:] or tensor.dtype != tensors.dtype(name):
                    raise RuntimeError(f"{name} was announced as another tensor than was read")
                if tensor.numel():
                    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if file.tell() - before != _count_bytes(tensors, name):
                raise RuntimeError(f"{name} was announced in another size than was read")


def _divide(tensors: Tensors, shard: int) -> list[list[str]]:
    """Names of the tensors of each file, in the library's order."""
    shards, filled = [list[str]()], 0
    for name in sorted(tensors, key=lambda name: (ORDER.index(NAMES[tensors.dtype(name)]), name)):
        size = _count_bytes(tensors, name)
        if shards[-1] and filled + size > shard:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _count_bytes(tensors: Tensors, name: str) -> int:
    return prod(tensors.shape(name)) * tensors.dtype(name).itemsize
