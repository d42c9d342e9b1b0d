"""How fast this machine reads memory: the bound of a decode step, which reads every weight once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

BYTES = 2**28  # in all: far beyond any cache that the threads have
SWEEPS = 4  # one takes 5 ms here, of which threads that start on one core, or one after the other, lose up to half


def read_bandwidth(threads: int) -> float:
    """GB/s (1e9 bytes) of ``threads`` threads that read parts of an array which is never cached, ``SWEEPS`` times."""
    parts, pool = _parts(threads), _pool(threads)
    started = perf_counter()
    list(pool.map(_sweep, parts))
    return SWEEPS * sum(part.nbytes for part in parts) / (perf_counter() - started) / 1e9


def _sweep(part: NDArray[np.int64]) -> None:
    for _ in range(SWEEPS):
        np.max(part)  # of integers: with vectors and without Python's lock, so that memory is what limits it


@cache
def _parts(threads: int) -> list[NDArray[np.int64]]:
    return np.array_split(np.ones(BYTES // 8, np.int64), threads)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
