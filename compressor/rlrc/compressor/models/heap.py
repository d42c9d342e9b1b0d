"""How much of what is freed stays in the C library's heap (glibc only; elsewhere nothing changes)."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from rlrc.compressor.models.nn import linear

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
TOP = 64 * 2**20  # bytes that may stay at the heap's end


def return_large() -> None:
    """Let the C library return every freed tensor that is larger than a part of a weight at once.

    Its heap keeps the gaps between tensors of up to 32 MB: while OpenVLA-7B was scored by Taylor's method, it grew to
    1.9 GB. Parts stay in the heap, and up to 64 MB at its end: rounding took ten times as long with pages that come
    fresh from the system for every part.
    """
    if (change := _find("mallopt")) is not None:
        change(M_MMAP_THRESHOLD, 5 * linear.PART)  # a part takes 4 bytes a number
        change(M_TRIM_THRESHOLD, TOP)


def trim() -> None:
    """Return what is free between smaller tensors. It takes about a millisecond."""
    if (give_back := _find("malloc_trim")) is not None:
        give_back(TOP)


def _find(function: str) -> Any:
    return getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
