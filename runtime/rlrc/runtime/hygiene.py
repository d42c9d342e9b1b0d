"""What a control loop asks of Python and Linux for the time it runs, as far as they grant it."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager

PRIORITY = 20  # of 1 to 99: above ordinary processes, below the kernel's own
MCL_CURRENT, MCL_FUTURE = 1, 2


@contextmanager
def real_time(pin: Collection[int] = ()) -> Iterator[dict[str, str]]:
    """Yields what was asked for and whether it was granted.

    No garbage collection in between, all memory kept in RAM, a real-time priority (SCHED_FIFO, which the processes
    started meanwhile do not inherit), and this thread on the processors ``pin`` only.
    """
    granted = {"garbage collection": "off", "memory": _lock_memory(), "priority": _raise_priority()}
    granted["processors"] = _pin(pin) if pin else "any"
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield granted
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
        if sys.platform == "linux":
            ctypes.CDLL(None).munlockall()
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def _lock_memory() -> str:
    if sys.platform != "linux":
        return "not locked: no Linux"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(MCL_CURRENT | MCL_FUTURE) == 0:
        return "locked"
    return f"not locked: {os.strerror(ctypes.get_errno())}; raise ulimit -l"


def _raise_priority() -> str:
    if sys.platform != "linux":
        return "not raised: no Linux"
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(PRIORITY))
    except OSError as error:
        return f"not raised: {error.strerror}; grant CAP_SYS_NICE or ulimit -r"
    return f"SCHED_FIFO {PRIORITY}"


def _pin(pin: Collection[int]) -> str:
    if sys.platform != "linux":
        return "any: no Linux"
    try:
        os.sched_setaffinity(0, pin)
    except OSError as error:
        return f"any: {error.strerror}; choose some of {', '.join(map(str, sorted(os.sched_getaffinity(0))))}"
    return ", ".join(map(str, sorted(pin)))
