"""Policies that an Arm opens in its process: functions that another process can import."""

from __future__ import annotations

import os
import time

from rlrc.benchmarks.claims.policy_process import Infer, Parts, time_call
from rlrc.errors import UserError


def clockwork(milliseconds: float) -> tuple[Infer, Parts]:
    passes = Parts()

    def infer() -> None:
        time_call(passes, "vision", lambda: time.sleep(milliseconds / 1e3))
        for _ in range(2):
            time_call(passes, "decode", lambda: time.sleep(milliseconds / 1e3))

    return infer, passes


def refused() -> tuple[Infer, Parts]:
    raise UserError("expected one thing, found another; do better")


def dying() -> tuple[Infer, Parts]:
    return lambda: os.kill(os.getpid(), 9), Parts()


def dying_with(*given: object) -> tuple[Infer, Parts]:
    return dying()
