"""Temporary tensors in files: memory that the operating system can write out and drop when it is short."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class Allocate(Protocol):
    """``torch.empty``, or ``Scratch.empty``."""

    def __call__(self, shape: Sequence[int], /, *, dtype: torch.dtype) -> Tensor: ...


class Scratch:
    """Tensors in files of this folder. A file has no name: it is gone with its tensor, even if the process is killed.

    Raises OSError if the folder's disk is full.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def empty(self, shape: Sequence[int], /, *, dtype: torch.dtype) -> Tensor:
        """A tensor of zeros that can be changed in place."""
        if not prod(shape):
            return torch.empty(*shape, dtype=dtype)
        with tempfile.NamedTemporaryFile(dir=self.folder) as file:
            # Reserved now: writing to a mapped file on a full disk ends the process.
            _reserve(file.fileno(), prod(shape) * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=prod(shape), dtype=dtype).view(*shape)


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def keep(tensor: Tensor, allocate: Allocate | None) -> Tensor:
    """A copy of the tensor in allocated memory; without ``allocate`` the tensor itself."""
    return tensor if allocate is None else allocate(tensor.shape, dtype=tensor.dtype).copy_(tensor)
