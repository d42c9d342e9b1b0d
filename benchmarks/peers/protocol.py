"""The contestant's side of the race: reads requests from standard input and answers each with a line of JSON.

``act`` computes and times one chunk of actions, ``actions`` returns the last chunk, ``memory`` the peak memory of this
process. On an error, the answer states why the contestant is skipped. This module is imported in environments without
rlrc, so it uses only the standard library and numpy.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Opened:
    """``infer`` computes a chunk (horizon, dim) of raw actions for the race's observation with its raw pictures."""

    infer: Callable[[], Any]
    precision: str
    version: str


def observation(path: str) -> dict[str, Any]:
    """``image.<camera>`` uint8 (H, W, 3) and ``instruction``; optional ``state`` (S,), ``noise`` (horizon, width)."""
    with np.load(path) as stored:
        return {name: str(stored[name]) if name == "instruction" else stored[name] for name in stored.files}


def serve(open_policy: Callable[[], Opened]) -> None:
    # Redirect standard output to standard error, so that libraries cannot print between the answers.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=channel, flush=True)

    try:
        opened = open_policy()
        answer(precision=opened.precision, version=opened.version)
        actions = np.zeros((0, 0), np.float32)
        for line in sys.stdin:
            word = line.strip()
            if word == "act":
                begun, before = time.perf_counter(), time.process_time()
                actions = np.asarray(opened.infer(), np.float32)
                answer(ms=(time.perf_counter() - begun) * 1e3, cpu_ms=(time.process_time() - before) * 1e3)
            elif word == "actions":
                answer(actions=actions.tolist())
            else:
                answer(peak_rss=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    except (Exception, SystemExit) as error:
        reason = str(error).strip().splitlines() or [""]
        answer(skipped=f"{type(error).__name__}: {reason[0][:200]}")
