"""How fast this machine reads memory: the bound of a decode step, which reads every weight once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

BYTES = 2**28  # in all: far beyond any cache that the threads have


def read_bandwidth(threads: int) -> float:
    """GB/s (1e9 bytes) of ``threads`` threads that read, once, parts of an array that none of them has cached."""
    parts, pool = _parts(threads), _pool(threads)
    started = perf_counter()
    # A maximum of integers: numpy does it with vectors and without Python's lock, so that memory is what limits it.
    list(pool.map(np.max, parts))
    return sum(part.nbytes for part in parts) / (perf_counter() - started) / 1e9


@cache
def _parts(threads: int) -> list[NDArray[np.int64]]:
    return np.array_split(np.ones(BYTES // 8, np.int64), threads)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
