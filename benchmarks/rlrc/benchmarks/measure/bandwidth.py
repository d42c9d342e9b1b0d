"""Memory read bandwidth: it bounds a decode step, which reads every weight once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

BYTES = 2**28  # of the whole array: far larger than any cache
SWEEPS = 4  # a single sweep takes about 5 ms, of which a slow start of the threads can take up to half


def read_bandwidth(threads: int) -> float:
    """GB/s (1e9 bytes) at which ``threads`` threads read an array too large to be cached, ``SWEEPS`` times."""
    parts, pool = _parts(threads), _pool(threads)
    started = perf_counter()
    list(pool.map(_sweep, parts))
    return SWEEPS * sum(part.nbytes for part in parts) / (perf_counter() - started) / 1e9


def _sweep(part: NDArray[np.int64]) -> None:
    for _ in range(SWEEPS):
        np.max(part)  # vectorised for integers and without Python's lock, so that memory is the limit


@cache
def _parts(threads: int) -> list[NDArray[np.int64]]:
    return np.array_split(np.ones(BYTES // 8, np.int64), threads)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
