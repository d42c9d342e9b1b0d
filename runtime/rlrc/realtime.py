"""Real-time settings of Python and Linux for a control loop, where the system grants them."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

PRIORITY, BACKGROUND_PRIORITY = 20, 10  # of 1 to 99: above ordinary processes, below the kernel's threads
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4


@contextmanager
def real_time(pin: Collection[int] = (), background: Collection[int] = ()) -> Iterator[dict[str, str]]:
    """Real-time settings for this thread within the context. Yields each setting and whether it was granted.

    No garbage collection, all memory locked in RAM, a real-time priority (SCHED_FIFO, not inherited by new processes),
    and only the processors ``pin`` for this thread. All threads of the processes ``background`` (process ids) get a
    lower real-time priority.
    """
    granted = {"garbage collection": "off", "memory": _lock_memory(), "priority": _raise_priority(0, PRIORITY)}
    threads = [thread for process in background for thread in _threads(process)]
    for thread in threads:
        _raise_priority(thread, BACKGROUND_PRIORITY)
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
                with suppress(OSError):  # the processors may have become unavailable
                    os.sched_setaffinity(0, allowed)
            for thread in (0, *threads):
                with suppress(OSError):  # the thread has ended
                    os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def collect_garbage() -> None:
    """Collects garbage between two episodes, while the robot rests. Short: objects from before the loop are frozen.

    Only a collection frees CPython's lists of unused tuples, which grow to 2,000 of each size.
    """
    gc.collect()


def return_large_blocks() -> None:
    """Makes glibc return freed blocks of 1 MB and more to the system. Does nothing with other C libraries.

    By default glibc starts to allocate blocks of up to 32 MB on the heap once such blocks were freed. Small blocks then
    keep the gaps from being returned. 16 MB at the heap's end are kept, so that usual pictures cost no page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 2**20)
        mallopt(M_TRIM_THRESHOLD, 2**24)


def lock_used_memory() -> None:
    """Locks the pages that this process uses in RAM, if granted. Unused pages of a mapped model stay out."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT)


def _threads(process: int) -> list[int]:
    """Empty for a process that has ended: the loop notices that itself."""
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
    except (OSError, ValueError, OverflowError) as error:  # no such processor
        return f"any: {error}; choose some of {', '.join(map(str, sorted(os.sched_getaffinity(0))))}"
    return ", ".join(map(str, sorted(pin)))
