"""What a control loop asks of Python and Linux for the time it runs, as far as they grant it."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

PRIORITY, BESIDE = 20, 10  # of 1 to 99: above ordinary processes, below the kernel's own; BESIDE below the loop
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4


@contextmanager
def real_time(pin: Collection[int] = (), beside: Collection[int] = ()) -> Iterator[dict[str, str]]:
    """For this thread, and a lower priority for the processes ``beside``, all threads of which get it.

    Yields what was asked for and whether it was granted.

    No garbage collection in between, all memory kept in RAM, a real-time priority (SCHED_FIFO, which the processes
    started meanwhile do not inherit), and this thread on the processors ``pin`` only.
    """
    granted = {"garbage collection": "off", "memory": _lock_memory(), "priority": _raise_priority(0, PRIORITY)}
    threads = [thread for process in beside for thread in _threads(process)]
    for thread in threads:
        _raise_priority(thread, BESIDE)
    allowed = os.sched_getaffinity(0) if sys.platform == "linux" else set[int]()
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
            if pin:
                with suppress(OSError):  # they may have been taken away meanwhile
                    os.sched_setaffinity(0, allowed)
            for thread in (0, *threads):
                with suppress(OSError):  # it has ended
                    os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def collect_garbage() -> None:
    """Between two episodes, when the robot rests: a collection, short since nothing from before the loop is looked at.

    CPython's lists of freed tuples, which grow to 2,000 of each size, are given back by collections only.
    """
    gc.collect()


def return_large_blocks() -> None:
    """Blocks of 1 MB and more go back to the system when they are freed (glibc; elsewhere nothing).

    By itself glibc takes blocks of up to 32 MB from the heap once such have been freed, and leaves gaps there that
    small blocks keep from being given back. 16 MB at the heap's end are kept: usual pictures cost no page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)
        mallopt(M_TRIM_THRESHOLD, 2**24)


def lock_used_memory() -> None:
    """What this process has touched or will touch stays in RAM, if that is granted. Of a model more may be mapped."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT)


def _threads(process: int) -> list[int]:
    """None of a process that has ended: the loop tells that by itself."""
    with suppress(OSError):
        return [int(thread) for thread in os.listdir(f"/proc/{process}/task")]
    return []


def _lock_memory() -> str:
    if sys.platform != "linux":
        return "not locked: no Linux"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(MCL_CURRENT | MCL_FUTURE) == 0:
        return "locked"
    return f"not locked: {os.strerror(ctypes.get_errno())}; raise ulimit -l"


def _raise_priority(thread: int, priority: int) -> str:
    if sys.platform != "linux":
        return "not raised: no Linux"
    try:
        os.sched_setscheduler(thread, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
    except OSError as error:
        return f"not raised: {error.strerror}; grant CAP_SYS_NICE or ulimit -r"
    return f"SCHED_FIFO {priority}"


def _pin(pin: Collection[int]) -> str:
    if sys.platform != "linux":
        return "any: no Linux"
    try:
        os.sched_setaffinity(0, pin)
    except (OSError, ValueError, OverflowError) as error:  # numbers below zero, or beyond any processor's
        return f"any: {error}; choose some of {', '.join(map(str, sorted(os.sched_getaffinity(0))))}"
    return ", ".join(map(str, sorted(pin)))
