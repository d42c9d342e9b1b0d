"""Calling until it takes no longer: some devices need hundreds of calls until their latency is stable."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

WINDOW, TOLERANCE, CAP = 20, 0.02, 25  # medians of two windows agree within 2 %, after at most 25 windows


def warm_up(call: Callable[[], float]) -> tuple[int, bool, float]:
    """Call until the medians of two successive windows differ by less than 2 %.

    -> the calls made, whether that was reached, and the last median of what ``call`` returns.
    """
    before = math.inf
    for window in range(1, CAP + 1):
        median = float(np.median([call() for _ in range(WINDOW)]))
        if abs(median - before) < TOLERANCE * median:
            return window * WINDOW, True, median
        before = median
    return CAP * WINDOW, False, before
