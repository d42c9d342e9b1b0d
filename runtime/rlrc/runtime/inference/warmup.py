"""Warm-up: some devices need hundreds of calls before their latency is stable."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter

import numpy as np

WINDOW, TOLERANCE, CAP = 20, 0.02, 25  # medians of two windows agree within 2 %, after at most 25 windows


def warm_up(call: Callable[[], float], patience: float = math.inf) -> tuple[int, bool, float]:
    """Calls until the medians of two successive windows differ by less than 2 %, or for ``patience`` seconds.

    ``call`` returns its latency. -> the number of calls, whether they became stable, and the last median.
    """
    began, before, calls = perf_counter(), math.inf, 0
    for _ in range(CAP):
        times: list[float] = []
        while len(times) < WINDOW and (not calls or perf_counter() - began < patience):
            times.append(call())
            calls += 1
        median = float(np.median(times)) if times else before
        if len(times) < WINDOW:
            return calls, False, median
        if abs(median - before) < TOLERANCE * median:
            return calls, True, median
        before = median
    return calls, False, before
