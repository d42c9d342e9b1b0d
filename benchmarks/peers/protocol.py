"""A contestant's side of a race: a word on its standard input, a line of JSON on its standard output for each.

``act``: one chunk of actions, timed. ``actions``: those of the last one. ``memory``: of this process. Whatever goes
wrong becomes the reason why the contestant is left out. Imported in environments that have no rlrc: the standard
library and numpy alone.
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
    """``infer`` makes a chunk (horizon, dim) of the race's observation, from raw pictures to raw actions."""

    infer: Callable[[], Any]
    precision: str
    version: str


def observation(path: str) -> dict[str, Any]:
    """``image.<camera>`` uint8 (H, W, 3), ``instruction``; where the policy takes them ``state`` float32 (S,) and
    ``noise`` float32 (horizon, width)."""
    with np.load(path) as stored:
        return {name: str(stored[name]) if name == "instruction" else stored[name] for name in stored.files}


def serve(open_policy: Callable[[], Opened]) -> None:
    # What libraries print must not come between the answers.
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
        told = str(error).strip().splitlines() or [""]
        answer(skipped=f"{type(error).__name__}: {told[0][:200]}")
